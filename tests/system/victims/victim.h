/*
 * What every victim shares: a victim prepares state, says that it is ready, waits for `go`, checks itself and writes a
 * verdict. All of that goes through files in the folder that it gets as its first argument:
 *
 *   ready     made by the victim (renamed into place) once the state to be carried stands
 *   beats     8 bytes, a counter that grows while the victim waits: proof that it runs
 *   go        made by the test when the victim shall check itself
 *   wrong     one line for every check that failed, in whichever task of the tree
 *   verdict   "ok" or the content of `wrong`; the exit status is 0 or 1 accordingly
 */
#ifndef VICTIM_H
#define VICTIM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char victim_folder[PATH_MAX];
static int victim_ready_pipe = -1; /* in a child: where it says that it is ready */

static inline const char *victim_path(const char *name)
{
	static __thread char path[PATH_MAX + 64];

	snprintf(path, sizeof(path), "%s/%s", victim_folder, name);
	return path;
}

static inline void victim_fail(const char *file, int line, const char *format, ...)
{
	char text[1024];
	int saved = errno, used, fd;
	va_list args;

	used = snprintf(text, sizeof(text), "%s:%d (pid %d): ", file, line, getpid());
	va_start(args, format);
	used += vsnprintf(text + used, sizeof(text) - used - 1, format, args);
	va_end(args);
	if (used > (int)sizeof(text) - 2)
		used = sizeof(text) - 2;
	text[used++] = '\n';
	fd = open(victim_path("wrong"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
	if (fd >= 0) {
		if (write(fd, text, used) != used)
			abort();
		close(fd);
	}
	errno = saved;
}

/* Note a failed check and go on: a verdict lists everything that is wrong. */
#define CHECK(condition, ...)                                                    \
	do {                                                                     \
		if (!(condition))                                                \
			victim_fail(__FILE_NAME__, __LINE__, __VA_ARGS__); \
	} while (0)

#define CHECK_EQUAL(got, wanted, what)                                                                     \
	do {                                                                                               \
		long long got_ = (long long)(got), wanted_ = (long long)(wanted);                          \
		CHECK(got_ == wanted_, "%s is %lld (%#llx), wanted %lld (%#llx)", what, got_, got_,        \
		      wanted_, wanted_);                                                                   \
	} while (0)

/* For preparing: what fails before the victim is ready is the test's fault, not the tool's. */
#define MUST(condition)                                                                            \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition,         \
				strerror(errno));                                                  \
			_exit(99);                                                                 \
		}                                                                                  \
	} while (0)

static inline void victim_init(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "usage: %s FOLDER [ARGUMENT...]\n", argv[0]);
		_exit(99);
	}
	MUST(realpath(argv[1], victim_folder));
}

static inline void victim_nap(long milliseconds)
{
	struct timespec nap = { milliseconds / 1000, milliseconds % 1000 * 1000000 };

	while (nanosleep(&nap, &nap) && errno == EINTR)
		;
}

static inline double victim_now(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static inline void victim_put(const char *name, const void *bytes, size_t size)
{
	char temporary[PATH_MAX + 128];
	int fd;

	snprintf(temporary, sizeof(temporary), "%s.%d", victim_path(name), getpid());
	fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	MUST(fd >= 0 && write(fd, bytes, size) == (ssize_t)size);
	close(fd);
	MUST(!rename(temporary, victim_path(name)));
}

static inline int victim_exists(const char *name)
{
	return access(victim_path(name), F_OK) == 0;
}

/* The root task: everything stands. A child made by victim_child(): its own part stands. */
static inline void victim_ready(void)
{
	if (victim_ready_pipe >= 0) {
		MUST(write(victim_ready_pipe, "r", 1) == 1);
		close(victim_ready_pipe);
		victim_ready_pipe = -1;
		return;
	}
	victim_put("ready", "ready\n", 6);
}

/* Wait without touching the counter: for all tasks and threads but one. */
static inline void victim_wait_quietly(void)
{
	while (!victim_exists("go"))
		victim_nap(2);
}

static inline void victim_wait(void)
{
	uint64_t beats = 0;
	int fd;

	while (!victim_exists("go")) {
		beats++;
		fd = open(victim_path("beats"), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
		if (fd >= 0) {
			if (pwrite(fd, &beats, sizeof(beats), 0) != sizeof(beats))
				abort();
			close(fd);
		}
		victim_nap(2);
	}
}

/* Fork a child that runs `body` and exits with its result; returns once the child called victim_ready(). */
static inline pid_t victim_child(int (*body)(void *), void *argument)
{
	int ends[2];
	char byte;
	pid_t pid;

	MUST(!pipe2(ends, O_CLOEXEC));
	pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		close(ends[0]);
		victim_ready_pipe = ends[1];
		_exit(body(argument));
	}
	close(ends[1]);
	MUST(read(ends[0], &byte, 1) == 1);
	close(ends[0]);
	return pid;
}

/* Wait for a child and check that it exited with `status`. */
static inline void victim_expect_exit(pid_t pid, int wanted)
{
	int status = 0;
	pid_t got = waitpid(pid, &status, 0);

	CHECK(got == pid, "waiting for child %d: %d (%s)", pid, got, strerror(errno));
	CHECK(got == pid && WIFEXITED(status) && WEXITSTATUS(status) == wanted,
	      "child %d: wait status %#x, wanted exit status %d", pid, status, wanted);
}

static inline int victim_done(void)
{
	static char text[65536];
	ssize_t size = 0;
	int fd = open(victim_path("wrong"), O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		victim_put("verdict", "ok\n", 3);
		return 0;
	}
	size = read(fd, text, sizeof(text));
	close(fd);
	victim_put("verdict", text, size > 0 ? size : 0);
	return 1;
}

/* A byte stream that every task can compute again: what memory and files are filled with. */
static inline void victim_fill(void *memory, size_t size, uint64_t seed)
{
	uint64_t *words = memory, state = seed * 0x9e3779b97f4a7c15ull + 1;

	for (size_t i = 0; i < size / 8; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		words[i] = state;
	}
}

static inline int victim_filled(const void *memory, size_t size, uint64_t seed)
{
	const uint64_t *words = memory;
	uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;

	for (size_t i = 0; i < size / 8; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		if (words[i] != state)
			return 0;
	}
	return 1;
}

static inline int victim_zero(const void *memory, size_t size)
{
	const unsigned char *bytes = memory;

	for (size_t i = 0; i < size; i++)
		if (bytes[i])
			return 0;
	return 1;
}

/* A whole victim: it prepares, waits, and checks. `prepare` may start children. */
static inline int victim_main(int argc, char **argv, void (*prepare)(void), void (*check)(void))
{
	victim_init(argc, argv);
	prepare();
	victim_ready();
	victim_wait();
	check();
	return victim_done();
}

#endif
