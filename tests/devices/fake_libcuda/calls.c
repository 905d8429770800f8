/* The calls by which one process moves another from state to state. */
#include "fake.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char initialised_in[2048]; /* a test's folder is one life of the driver */

int look(int pid, struct target *out)
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

void note(const char *name, int pid, int code, const char *extra)
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

int ask(int pid, int tid, const char *request)
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

int must_fail(const char *name, int pid, int tid)
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

int step_to(const char *name, int pid, int from, const char *request, const char *extra)
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

int is_initialised(void)
{
	return !strcmp(initialised_in, folder());
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
	if (!code && !is_initialised())
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
