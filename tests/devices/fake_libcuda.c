/*
 * A stand-in for libcuda.so.1, built by the tests: the driver's checkpoint calls with their real state machine, and the
 * part of the driver that lives in a process that uses CUDA. No GPU: a "device" is a file in $FAKE_CUDA_DIR.
 *
 *   DIR/PID.state    "STATE TID UUID" of a process, published by its restore thread
 *   DIR/PID.request  what the restore thread is to do next; taken away when it is done
 *   DIR/PID.device   the device's memory; gone while the process is CHECKPOINTED
 *   DIR/PID.busy     as long as it is there, the process's work never comes to rest
 *   DIR/calls        one line for each call: name, pid, result, and how many of its threads ran and were stopped
 *   FAKE_CUDA_FAIL   "NAME:CODE[:PID]" lets a call fail; with CODE 999 the process ends up FAILED
 *   FAKE_CUDA_GPUS   UUIDs (hex) that are here; empty: all
 *
 * From CUDA 13.4 on (VERSION 13040) it has custom storage as NVIDIA documents it: the caller must have called cuInit and
 * hold the primary context of the process's GPU; it gets addresses that only copies understand, and streams; copies are
 * done when their stream is synchronized and not before, by the caller or, for the streams handed out, by the call that
 * completes the operation; in between the process is CHECKPOINTING or RESTORING. Functions of the plain interface are
 * found by cuGetProcAddress alone. A process that went to custom storage does not come back without.
 *
 * As in the real driver, the state and the device's content while it is checkpointed are in the process's own memory,
 * and only its restore thread can do anything: a stopped one leaves every caller waiting (here: an error instead).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 13000
#endif
#define API __attribute__((visibility("default")))
#if VERSION >= 12080
#define SINCE_570 API
#else
#define SINCE_570 __attribute__((visibility("hidden"), used))
#endif
#if VERSION >= 13040
#define SINCE_615 API
#else
#define SINCE_615 __attribute__((visibility("hidden"), used))
#endif

enum { RUNNING, LOCKED, CHECKPOINTED, FAILED, CHECKPOINTING, RESTORING };
enum { OK, INVALID_VALUE, NO_MEMORY, NOT_INITIALIZED, INVALID_DEVICE = 101, ILLEGAL_STATE = 401, NOT_READY = 600, UNKNOWN = 999 };
enum { CELLS = 512, PATIENCE_MS = 3000 };

typedef struct { unsigned char bytes[16]; } uuid_t16;
typedef struct { unsigned int timeout_ms, reserved0; uint64_t reserved1[7]; } lock_args;
typedef struct { uint64_t reserved[8]; } plain_args;
typedef struct { uuid_t16 old, new; } pair;
typedef struct { uint64_t address; size_t size; void *stream; } device_data;
typedef struct { void *handle; device_data *devices; unsigned int count; } storage_info;
typedef struct { storage_info **out; char reserved[56]; } checkpoint_args;
typedef struct { pair *pairs; unsigned int count, padding; storage_info **out; char reserved[40]; } restore_args;
_Static_assert(sizeof(lock_args) == 64 && sizeof(plain_args) == 64 && sizeof(restore_args) == 64, "argument blocks");

static char initialised_in[2048]; /* a test's folder is one life of the driver */

static const char *folder(void)
{
	const char *dir = getenv("FAKE_CUDA_DIR");
	return dir ? dir : "/nonexistent";
}

static void name_of(char *out, size_t size, const char *dir, int pid, const char *what)
{
	snprintf(out, size, "%s/%d.%s", dir, pid, what);
}

static void pause_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static int read_text(const char *path, char *out, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, out, size - 1);
	close(fd);
	out[n > 0 ? n : 0] = 0;
	return n > 0 ? 0 : -1;
}

static void write_text(const char *path, const char *text)
{
	char other[4200];
	snprintf(other, sizeof other, "%s.%ld", path, syscall(SYS_gettid));
	int fd = open(other, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		perror("fake_libcuda");
	close(fd);
	rename(other, path);
}

/* ---- the part that lives in the process */

static struct {
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	int state, tid, pid, custom;
	char uuid[33], dir[2048];
	uint64_t *staged;
} own = { .mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

static int move(int out)
{
	char path[4096];
	name_of(path, sizeof path, own.dir, own.pid, "device");
	if (out) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		own.staged = malloc(CELLS * sizeof(uint64_t));
		ssize_t n = fd < 0 ? -1 : read(fd, own.staged, CELLS * sizeof(uint64_t));
		close(fd);
		unlink(path);
		return n == CELLS * sizeof(uint64_t) ? 0 : -1;
	}
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	ssize_t n = fd < 0 || !own.staged ? -1 : write(fd, own.staged, CELLS * sizeof(uint64_t));
	close(fd);
	free(own.staged);
	own.staged = NULL;
	return n == CELLS * sizeof(uint64_t) ? 0 : -1;
}

static void publish(void)
{
	char path[4096], text[128];
	name_of(path, sizeof path, own.dir, own.pid, "state");
	snprintf(text, sizeof text, "%d %d %s %d", own.state, own.tid, own.uuid, own.custom);
	write_text(path, text);
}

/* Device memory that nobody has filled yet, or that others have in their storage by now. */
static int remake(int there)
{
	char path[4096];
	name_of(path, sizeof path, own.dir, own.pid, "device");
	if (!there)
		return unlink(path);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	int code = fd < 0 ? -1 : ftruncate(fd, CELLS * sizeof(uint64_t));
	close(fd);
	return code;
}

static void obey(const char *request)
{
	char verb[32] = "", uuid[33] = "";
	sscanf(request, "%31s %32s", verb, uuid);
	if (!strcmp(verb, "lock"))
		own.state = LOCKED;
	else if (!strcmp(verb, "unlock"))
		own.state = RUNNING;
	else if (!strcmp(verb, "fail"))
		own.state = FAILED;
	else if (!strcmp(verb, "checkpoint"))
		own.state = move(1) ? FAILED : CHECKPOINTED;
	else if (!strcmp(verb, "restore")) {
		if (uuid[0])
			memcpy(own.uuid, uuid, sizeof uuid);
		own.state = move(0) ? FAILED : LOCKED;
	} else if (!strcmp(verb, "export")) {
		own.state = CHECKPOINTING;
		own.custom = 1;
	} else if (!strcmp(verb, "exported"))
		own.state = remake(0) ? FAILED : CHECKPOINTED;
	else if (!strcmp(verb, "import")) {
		if (uuid[0])
			memcpy(own.uuid, uuid, sizeof uuid);
		own.state = remake(1) ? FAILED : RESTORING;
	} else if (!strcmp(verb, "imported")) {
		own.state = LOCKED;
		own.custom = 0;
	}
}

static void *restore_thread(void *unused)
{
	char path[4096], state[4096], text[128];
	(void)unused;
	own.tid = (int)syscall(SYS_gettid);
	pthread_setname_np(pthread_self(), "cuda00001400006");
	name_of(path, sizeof path, own.dir, own.pid, "request");
	name_of(state, sizeof state, own.dir, own.pid, "state");
	publish();
	for (;;) {
		if (!read_text(path, text, sizeof text)) {
			pthread_mutex_lock(&own.mutex);
			obey(text);
			publish();
			pthread_cond_broadcast(&own.changed);
			pthread_mutex_unlock(&own.mutex);
			unlink(path);
		} else if (access(state, F_OK))
			publish();
		pause_ms(1);
	}
	return NULL;
}

/* What a program calls: use the device. */
API int fakeStart(const char *uuid)
{
	pthread_t thread;
	char path[4096];
	uint64_t zero[CELLS] = { 0 };
	snprintf(own.dir, sizeof own.dir, "%s", folder());
	snprintf(own.uuid, sizeof own.uuid, "%s", uuid);
	own.pid = getpid();
	name_of(path, sizeof path, own.dir, own.pid, "device");
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	ssize_t n = write(fd, zero, sizeof zero);
	close(fd);
	if (n != sizeof zero || pthread_create(&thread, NULL, restore_thread, NULL))
		return UNKNOWN;
	name_of(path, sizeof path, own.dir, own.pid, "state");
	while (access(path, F_OK))
		pause_ms(1);
	return OK;
}

/* A kernel: cell i becomes 3 * cell + i + step. Blocks while the process is locked. */
API int fakeStep(uint64_t step, uint64_t *sum)
{
	char path[4096];
	uint64_t cells[CELLS];
	pthread_mutex_lock(&own.mutex);
	while (own.state != RUNNING)
		pthread_cond_wait(&own.changed, &own.mutex);
	name_of(path, sizeof path, own.dir, own.pid, "device");
	int fd = open(path, O_RDWR | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : pread(fd, cells, sizeof cells, 0);
	*sum = 0;
	for (int i = 0; n > 0 && i < CELLS; i++)
		*sum ^= cells[i] = 3 * cells[i] + i + step;
	if (n > 0)
		n = pwrite(fd, cells, sizeof cells, 0);
	close(fd);
	pthread_mutex_unlock(&own.mutex);
	return n == sizeof cells ? OK : INVALID_DEVICE;
}

/* ---- the calls about other processes */

struct target { int state, tid, custom; char uuid[33]; };

static int look(int pid, struct target *out)
{
	char path[4096], text[128], proc[64];
	snprintf(proc, sizeof proc, "/proc/%d", pid);
	name_of(path, sizeof path, folder(), pid, "state");
	if (access(proc, F_OK) || read_text(path, text, sizeof text))
		return INVALID_VALUE;
	return sscanf(text, "%d %d %32s %d", &out->state, &out->tid, out->uuid, &out->custom) == 4 ? OK : INVALID_VALUE;
}

static char thread_state(int pid, int tid)
{
	char path[96], text[512];
	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
	if (read_text(path, text, sizeof text))
		return '?';
	char *end = strrchr(text, ')');
	return end ? end[2] : '?';
}

static void count_threads(int pid, int *running, int *stopped)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *dir = opendir(path);
	*running = *stopped = 0;
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		if (entry->d_name[0] == '.')
			continue;
		char state = thread_state(pid, atoi(entry->d_name));
		*(state == 't' || state == 'T' ? stopped : running) += 1;
	}
	if (dir)
		closedir(dir);
}

static void note(const char *name, int pid, int code, const char *extra)
{
	char path[4096], line[512];
	int running = 0, stopped = 0;
	if (pid)
		count_threads(pid, &running, &stopped);
	snprintf(path, sizeof path, "%s/calls", folder());
	int n = snprintf(line, sizeof line, "%s %d %d running=%d stopped=%d %s\n", name, pid, code, running, stopped, extra);
	int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
	if (fd >= 0 && write(fd, line, n) < 0)
		perror("fake_libcuda");
	close(fd);
}

static int ask(int pid, int tid, const char *request)
{
	char path[4096];
	char state = thread_state(pid, tid);
	if (state == 't' || state == 'T')
		return UNKNOWN;
	name_of(path, sizeof path, folder(), pid, "request");
	write_text(path, request);
	for (int waited = 0; waited < PATIENCE_MS; waited++) {
		if (access(path, F_OK))
			return OK;
		pause_ms(1);
	}
	unlink(path);
	return UNKNOWN;
}

static int must_fail(const char *name, int pid, int tid)
{
	const char *text = getenv("FAKE_CUDA_FAIL");
	char wanted[32] = "";
	int code = 0, only = 0;
	if (!text || sscanf(text, "%31[^:]:%d:%d", wanted, &code, &only) < 2 || strcmp(wanted, name) || (only && only != pid))
		return OK;
	if (code == UNKNOWN && tid)
		ask(pid, tid, "fail");
	return code;
}

static int check_zero(const void *block, size_t from)
{
	const char *bytes = block;
	for (size_t i = from; block && i < 64; i++)
		if (bytes[i])
			return INVALID_VALUE;
	return OK;
}

static int step_to(const char *name, int pid, int from, const char *request, const char *extra)
{
	struct target t = { 0 };
	int code = look(pid, &t);
	if (!code && t.state != from)
		code = ILLEGAL_STATE;
	if (!code)
		code = must_fail(name, pid, t.tid);
	if (!code)
		code = ask(pid, t.tid, request);
	note(name, pid, code, extra);
	return code;
}

API int cuInit(unsigned int flags)
{
	int code = flags ? INVALID_VALUE : must_fail("init", 0, 0);
	if (!code)
		snprintf(initialised_in, sizeof initialised_in, "%s", folder());
	note("init", 0, code, "");
	return code;
}

API int cuDriverGetVersion(int *out)
{
	*out = VERSION;
	return OK;
}

API int cuGetErrorName(int code, const char **out)
{
	*out = code == NOT_READY ? "CUDA_ERROR_NOT_READY" : code == ILLEGAL_STATE ? "CUDA_ERROR_ILLEGAL_STATE" : NULL;
	return *out ? OK : INVALID_VALUE;
}

API int cuGetErrorString(int code, const char **out)
{
	*out = code == NOT_READY ? "device not ready" : "the fake driver says no";
	return OK;
}

SINCE_570 int cuCheckpointProcessGetState(int pid, int *out)
{
	struct target t = { 0 };
	int code = look(pid, &t);
	*out = t.state;
	return code ? code : must_fail("state", pid, 0);
}

SINCE_570 int cuCheckpointProcessGetRestoreThreadId(int pid, int *out)
{
	struct target t = { 0 };
	int code = look(pid, &t);
	*out = t.tid;
	return code ? code : must_fail("thread", pid, 0);
}

SINCE_570 int cuCheckpointProcessLock(int pid, lock_args *args)
{
	char busy[4096];
	unsigned int timeout = args ? args->timeout_ms : 0;
	if (check_zero(args, 4))
		return INVALID_VALUE;
	name_of(busy, sizeof busy, folder(), pid, "busy");
	for (unsigned int waited = 0; !access(busy, F_OK); waited++) {
		if (timeout && waited >= timeout) {
			note("lock", pid, NOT_READY, "");
			return NOT_READY;
		}
		pause_ms(1);
	}
	return step_to("lock", pid, RUNNING, "lock", "");
}

/* ---- custom storage: devices, contexts, streams, and memory that only copies reach */

enum { GPUS = 3, MAX_OPERATIONS = 64, MAX_COPIES = 256, INVALID_CONTEXT = 201 };
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
	*out = strcmp(initialised_in, folder()) ? 0 : GPUS;
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
static int hand_out(int pid, const char *uuid, int restore, storage_info **out)
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

static int holds(const char *uuid)
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

static int checkpoint_custom(int pid, storage_info **out)
{
	struct target t = { 0 };
	int code = look(pid, &t);
	if (!code && strcmp(initialised_in, folder()))
		code = NOT_INITIALIZED;
	if (!code && (pid == getpid() || !holds(t.uuid)))
		code = INVALID_CONTEXT;
	if (!code)
		code = step_to("checkpoint", pid, LOCKED, "export", "custom");
	return code ? code : hand_out(pid, t.uuid, 0, out);
}

SINCE_570 int cuCheckpointProcessCheckpoint(int pid, checkpoint_args *args)
{
	if (check_zero(args, VERSION < 13040 ? 0 : 8))
		return INVALID_VALUE;
	if (args && args->out)
		return checkpoint_custom(pid, args->out);
	return step_to("checkpoint", pid, LOCKED, "checkpoint", "");
}

static void hex(const uuid_t16 *uuid, char *out)
{
	for (int i = 0; i < 16; i++)
		sprintf(out + 2 * i, "%02x", uuid->bytes[i]);
}

SINCE_570 int cuCheckpointProcessRestore(int pid, restore_args *args)
{
	struct target t = { 0 };
	char target[33] = "", request[64], extra[80] = "", old[33];
	const char *here = getenv("FAKE_CUDA_GPUS");
	unsigned int count = args ? args->count : 0;
	int code = look(pid, &t);
	storage_info **out = VERSION < 13040 || !args ? NULL : args->out;
	if (VERSION < 13000 ? check_zero(args, 0) : VERSION < 13040 ? check_zero(args, 12) : check_zero(args, 24))
		code = INVALID_VALUE;
	if (!code && !out != !t.custom)
		code = ILLEGAL_STATE; /* what is in custom storage comes back from there, and nothing else does */
	if (!code && strcmp(initialised_in, folder()))
		code = NOT_INITIALIZED;
	for (unsigned int i = 0; !code && i < count; i++) {
		hex(&args->pairs[i].old, old);
		if (!strcmp(old, t.uuid))
			hex(&args->pairs[i].new, target);
	}
	if (!code && count && !target[0])
		code = INVALID_VALUE; /* pairs must name every GPU of the process */
	if (!code && here && *here && !strstr(here, target[0] ? target : t.uuid))
		code = INVALID_DEVICE;
	if (!code && out && !holds(target[0] ? target : t.uuid))
		code = INVALID_CONTEXT;
	if (code) {
		note("restore", pid, code, "");
		return code;
	}
	snprintf(request, sizeof request, "%s %s", out ? "import" : "restore", target);
	snprintf(extra, sizeof extra, "pairs=%u %s%s", count, target, out ? "custom" : "");
	code = step_to("restore", pid, CHECKPOINTED, request, extra);
	return code || !out ? code : hand_out(pid, target[0] ? target : t.uuid, 1, out);
}

SINCE_570 int cuCheckpointProcessUnlock(int pid, plain_args *args)
{
	return check_zero(args, 0) ? INVALID_VALUE : step_to("unlock", pid, LOCKED, "unlock", "");
}
