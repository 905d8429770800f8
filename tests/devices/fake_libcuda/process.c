/* The part of the driver that lives in a process that computes: its restore thread, and what its program calls. */
#include "fake.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

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

/* What comes back may be on another device; without `uuid` it is on the one that it was on. */
static void take_uuid(const char uuid[33])
{
	if (uuid[0])
		memcpy(own.uuid, uuid, sizeof own.uuid);
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
		take_uuid(uuid);
		own.state = move(0) ? FAILED : LOCKED;
	} else if (!strcmp(verb, "export")) {
		own.state = CHECKPOINTING;
		own.custom = 1;
	} else if (!strcmp(verb, "exported"))
		own.state = remake(0) ? FAILED : CHECKPOINTED;
	else if (!strcmp(verb, "import")) {
		take_uuid(uuid);
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
