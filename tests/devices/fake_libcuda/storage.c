/* Custom storage: devices, contexts, streams, and memory that only copies reach. */
#include "fake.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GPUS = 3, MAX_OPERATIONS = 64, MAX_COPIES = 256 };
static const char *const gpus[GPUS] = { "aaaaaaaa000011112222333333333333", "bbbbbbbb000011112222333333333333",
					"cccccccc000011112222333333333333" };
struct copy { void *host; uint64_t device; size_t size; int out; };
struct stream { int gpu, nr; struct copy copies[MAX_COPIES]; };
struct operation {
	storage_info info;
	device_data data;
	struct stream stream;
	unsigned char *memory;
	int pid, restore, live;
};
static pthread_mutex_t storage_lock = PTHREAD_MUTEX_INITIALIZER;
static struct operation operations[MAX_OPERATIONS];
static int held[GPUS], contexts[GPUS];
static __thread int *current;
static int pinned; /* buffers that nobody has freed */

static int device_count(int *out)
{
	*out = is_initialised() ? GPUS : 0;
	return *out ? OK : NOT_INITIALIZED;
}

static int device_get(int *out, int index)
{
	*out = index;
	return index >= 0 && index < GPUS ? OK : INVALID_DEVICE;
}

static int device_uuid(uuid_t16 *out, int device)
{
	for (int i = 0; i < 16; i++)
		sscanf(gpus[device] + 2 * i, "%2hhx", &out->bytes[i]);
	return OK;
}

static int retain(void **out, int device)
{
	held[device]++;
	*out = &contexts[device];
	return OK;
}

static int release(int device)
{
	return held[device]-- > 0 ? OK : INVALID_CONTEXT;
}

static int set_current(void *context)
{
	current = context;
	return OK;
}

static int stream_context(struct stream *stream, void **context, void **green)
{
	*context = &contexts[stream->gpu];
	*green = NULL;
	return OK;
}

static int stream_create(struct stream **out, unsigned int flags)
{
	if (!current || !held[current - contexts] || flags != 1)
		return INVALID_CONTEXT;
	*out = calloc(1, sizeof **out);
	(*out)->gpu = (int)(current - contexts);
	return OK;
}

/* What was queued is done now. Memory of an operation that was completed is not there any more. */
static int stream_wait(struct stream *stream)
{
	int code = OK;
	pthread_mutex_lock(&storage_lock);
	for (int i = 0; i < stream->nr; i++) {
		struct copy *c = &stream->copies[i];
		struct operation *o = NULL;
		for (int n = 0; n < MAX_OPERATIONS; n++)
			if (operations[n].live && c->device >= operations[n].data.address &&
			    c->device + c->size <= operations[n].data.address + operations[n].data.size)
				o = &operations[n];
		if (!o || o->restore == c->out) {
			code = INVALID_VALUE;
			continue;
		}
		unsigned char *at = o->memory + (c->device - o->data.address);
		memcpy(c->out ? c->host : at, c->out ? at : c->host, c->size);
	}
	stream->nr = 0;
	pthread_mutex_unlock(&storage_lock);
	return code;
}

static int stream_destroy(struct stream *stream)
{
	free(stream); /* what is still queued never happens */
	return OK;
}

static int host_alloc(void **out, size_t size, unsigned int flags)
{
	if (!current || !held[current - contexts])
		return INVALID_CONTEXT;
	if (flags != 1 || !(*out = malloc(size)))
		return NO_MEMORY;
	__atomic_add_fetch(&pinned, 1, __ATOMIC_RELAXED);
	return OK;
}

static int host_free(void *pointer)
{
	__atomic_sub_fetch(&pinned, 1, __ATOMIC_RELAXED);
	free(pointer);
	return current ? OK : INVALID_CONTEXT;
}

static int enqueue(struct stream *stream, void *host, uint64_t device, size_t size, int out)
{
	int code = must_fail(out ? "out" : "in", 0, 0);
	if (!current || stream->gpu != current - contexts)
		code = INVALID_CONTEXT;
	if (!code && stream->nr < MAX_COPIES)
		stream->copies[stream->nr++] = (struct copy){ host, device, size, out };
	return code;
}

static int copy_out(void *to, uint64_t from, size_t size, struct stream *stream)
{
	return enqueue(stream, to, from, size, 1);
}

static int copy_in(uint64_t to, void *from, size_t size, struct stream *stream)
{
	return enqueue(stream, from, to, size, 0);
}

API int fakePinned(void)
{
	return pinned;
}

SINCE_615 int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status)
{
	static const struct { const char *name; void *function; } table[] = {
		{ "cuDeviceGetCount", device_count },	   { "cuDeviceGet", device_get },
		{ "cuDeviceGetUuid", device_uuid },	   { "cuDevicePrimaryCtxRetain", retain },
		{ "cuDevicePrimaryCtxRelease", release },  { "cuCtxSetCurrent", set_current },
		{ "cuStreamGetCtx", stream_context },	   { "cuStreamCreate", stream_create },
		{ "cuStreamDestroy", stream_destroy },	   { "cuStreamSynchronize", stream_wait },
		{ "cuMemHostAlloc", host_alloc },	   { "cuMemFreeHost", host_free },
		{ "cuMemcpyDtoHAsync", copy_out },	   { "cuMemcpyHtoDAsync", copy_in },
	};
	*out = NULL;
	*status = 1;
	for (size_t i = 0; version == 13040 && !flags && i < sizeof table / sizeof *table; i++)
		if (!strcmp(table[i].name, name)) {
			*out = table[i].function;
			*status = 0;
		}
	return *out ? OK : INVALID_VALUE;
}

/* Begin an operation: the process's part was done, its device memory is now a file that we map. */
int hand_out(int pid, const char *uuid, int restore, storage_info **out)
{
	char path[4096];
	int code = NO_MEMORY, gpu = 0;
	while (gpu < GPUS && strcmp(gpus[gpu], uuid))
		gpu++;
	name_of(path, sizeof path, folder(), pid, "device");
	int fd = open(path, O_RDWR | O_CLOEXEC);
	pthread_mutex_lock(&storage_lock);
	for (int n = 0; fd >= 0 && n < MAX_OPERATIONS && code; n++) {
		struct operation *o = &operations[n];
		if (o->info.handle)
			continue;
		*o = (struct operation){ .pid = pid, .restore = restore, .live = 1, .stream.gpu = gpu };
		o->data = (device_data){ (uint64_t)(n + 1) << 40, CELLS * sizeof(uint64_t), &o->stream };
		o->memory = mmap(NULL, o->data.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		o->info = (storage_info){ o, &o->data, 1 };
		*out = &o->info;
		code = OK;
	}
	pthread_mutex_unlock(&storage_lock);
	close(fd);
	return code;
}

int holds(const char *uuid)
{
	for (int i = 0; i < GPUS; i++)
		if (!strcmp(gpus[i], uuid))
			return held[i] > 0;
	return 0;
}

SINCE_615 int cuCheckpointOperationComplete(struct operation *o)
{
	struct target t = { 0 };
	int code = o && o->live ? look(o->pid, &t) : INVALID_VALUE;
	if (code)
		return code;
	if (t.state != (o->restore ? RESTORING : CHECKPOINTING))
		code = ILLEGAL_STATE;
	stream_wait(&o->stream);
	if (!code)
		code = must_fail("complete", o->pid, t.tid);
	munmap(o->memory, o->data.size);
	o->live = 0;
	if (!code)
		code = ask(o->pid, t.tid, o->restore ? "imported" : "exported");
	note("complete", o->pid, code, "");
	pthread_mutex_lock(&storage_lock);
	o->info.handle = NULL; /* from here on another operation may have it */
	pthread_mutex_unlock(&storage_lock);
	return code;
}

int checkpoint_custom(int pid, storage_info **out)
{
	struct target t = { 0 };
	int code = look(pid, &t);
	if (!code && !is_initialised())
		code = NOT_INITIALIZED;
	if (!code && (pid == getpid() || !holds(t.uuid)))
		code = INVALID_CONTEXT;
	if (!code)
		code = step_to("checkpoint", pid, LOCKED, "export", "custom");
	return code ? code : hand_out(pid, t.uuid, 0, out);
}
