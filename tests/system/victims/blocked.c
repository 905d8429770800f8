/*
 * Threads that sit in system calls while they are dumped. Each must end as if nothing had happened: no EINTR, no early
 * time-out, the data that comes later arrives.
 */
#include "victim.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/select.h>

static int reader[2], full[2], polled[2], event, nr_blocked;
static uint32_t futex_word;
static pid_t slow_child;
static double started;

#define WAITS_S 2.5

static long futex(uint32_t *word, int operation, uint32_t value, const struct timespec *timeout)
{
	return syscall(SYS_futex, word, operation, value, timeout, NULL, 0xffffffff);
}

static void about_to_block(void)
{
	__atomic_fetch_add(&nr_blocked, 1, __ATOMIC_SEQ_CST);
}

static void check_slept(const char *what, double since, long result)
{
	double slept = victim_now(CLOCK_MONOTONIC) - since;

	CHECK(slept >= WAITS_S - 0.01, "%s ended after %.3f s with %ld (%s)", what, slept, result, strerror(errno));
}

static void *in_nanosleep(void *unused)
{
	struct timespec time = { 2, 500000000 };
	double since = victim_now(CLOCK_MONOTONIC);
	long result;

	about_to_block();
	result = nanosleep(&time, NULL);
	CHECK(result == 0, "nanosleep: %s", strerror(errno));
	check_slept("nanosleep", since, result);
	return unused;
}

static void *in_absolute_sleep(void *unused)
{
	struct timespec until;
	double since = victim_now(CLOCK_MONOTONIC);
	int result;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += 2;
	until.tv_nsec += 500000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	about_to_block();
	result = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	CHECK(result == 0, "clock_nanosleep: %s", strerror(result));
	check_slept("clock_nanosleep", since, result);
	return unused;
}

static void *in_poll_timeout(void *unused)
{
	struct pollfd set = { .fd = polled[0], .events = POLLPRI };
	double since = victim_now(CLOCK_MONOTONIC);
	long result;

	about_to_block();
	result = poll(&set, 1, 2500);
	CHECK(result == 0, "poll: %ld, %s", result, strerror(errno));
	check_slept("poll", since, result);
	return unused;
}

static void *in_poll(void *unused)
{
	struct pollfd set = { .fd = polled[0], .events = POLLIN };

	about_to_block();
	CHECK(poll(&set, 1, -1) == 1 && set.revents == POLLIN, "poll for data: revents %#x, %s", set.revents, strerror(errno));
	return unused;
}

static void *in_ppoll(void *unused)
{
	struct pollfd set = { .fd = polled[0], .events = POLLIN };
	struct timespec long_time = { 500, 0 };
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1);
	about_to_block();
	CHECK(ppoll(&set, 1, &long_time, &mask) == 1, "ppoll: %s", strerror(errno));
	CHECK(!pthread_sigmask(SIG_BLOCK, NULL, &mask) && !sigismember(&mask, SIGUSR1), "ppoll's mask stayed");
	return unused;
}

static void *in_select(void *unused)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(polled[0], &set);
	about_to_block();
	CHECK(select(polled[0] + 1, &set, NULL, NULL, NULL) == 1, "select: %s", strerror(errno));
	return unused;
}

static void *in_read(void *unused)
{
	char text[16] = "";

	about_to_block();
	CHECK(read(reader[0], text, sizeof(text)) == 5 && !memcmp(text, "hello", 5), "read: '%s', %s", text, strerror(errno));
	return unused;
}

static void *in_write(void *unused)
{
	static char block[4096];
	long result;

	/* Nothing of it fits: a write that had begun would end short, in an undisturbed kernel too. */
	about_to_block();
	result = write(full[1], block, sizeof(block));
	CHECK(result == sizeof(block), "write to a full pipe: %ld, %s", result, strerror(errno));
	return unused;
}

static void *in_futex_timeout(void *unused)
{
	struct timespec time = { 2, 500000000 };
	double since = victim_now(CLOCK_MONOTONIC);
	uint32_t other = 0;
	long result;

	about_to_block();
	result = futex(&other, FUTEX_WAIT_PRIVATE, 0, &time);
	CHECK(result == -1 && errno == ETIMEDOUT, "futex with time-out: %ld, %s", result, strerror(errno));
	check_slept("futex", since, result);
	return unused;
}

static void *in_futex(void *unused)
{
	long result;

	about_to_block();
	result = futex(&futex_word, FUTEX_WAIT_PRIVATE, 0, NULL);
	CHECK(result == 0 || (errno == EAGAIN && futex_word), "futex: %ld, %s", result, strerror(errno));
	return unused;
}

static void *in_eventfd(void *unused)
{
	uint64_t value = 0;

	about_to_block();
	CHECK(read(event, &value, 8) == 8 && value == 5, "read from an eventfd: %lu, %s", (long)value, strerror(errno));
	return unused;
}

static void *in_wait(void *unused)
{
	about_to_block();
	victim_expect_exit(slow_child, 3);
	return unused;
}

static void *in_open(void *unused)
{
	int fd;

	about_to_block();
	fd = open(victim_path("rendezvous"), O_RDONLY);
	CHECK(fd >= 0, "open of a FIFO: %s", strerror(errno));
	close(fd);
	return unused;
}

static int child_main(void *unused)
{
	(void)unused;
	victim_ready();
	victim_wait_quietly();
	return 3;
}

/* A thread blocks a moment after it said that it would; /proc says when it does. */
static int asleep(pid_t tid)
{
	char path[64], text[256] = "";
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
	file = fopen(path, "re");
	if (!file)
		return 0;
	text[fread(text, 1, sizeof(text) - 1, file)] = 0;
	fclose(file);
	return strncmp(text, "running", 7) != 0;
}

int main(int argc, char **argv)
{
	void *(*const kinds[])(void *) = { in_nanosleep, in_absolute_sleep, in_poll_timeout, in_poll, in_ppoll, in_select, in_read,
					   in_write, in_futex_timeout, in_futex, in_eventfd, in_wait, in_open };
	enum { NR = sizeof(kinds) / sizeof(*kinds) };
	static char filling[65536];
	pthread_t threads[NR];
	int fd;

	victim_init(argc, argv);
	MUST(!pipe(reader) && !pipe(full) && !pipe(polled) && (event = eventfd(0, 0)) >= 0);
	MUST(!mkfifo(victim_path("rendezvous"), 0600));
	MUST(fcntl(full[1], F_SETPIPE_SZ, sizeof(filling)) == sizeof(filling));
	MUST(write(full[1], filling, sizeof(filling)) == sizeof(filling));
	slow_child = victim_child(child_main, NULL);
	started = victim_now(CLOCK_MONOTONIC);
	for (int i = 0; i < NR; i++)
		MUST(!pthread_create(&threads[i], NULL, kinds[i], NULL));
	while (__atomic_load_n(&nr_blocked, __ATOMIC_SEQ_CST) < NR)
		victim_nap(1);
	for (int i = 1; i <= NR; i++)
		for (int tries = 0; tries < 1000 && !asleep(getpid() + 1 + i); tries++)
			victim_nap(1);
	victim_ready();
	victim_wait();

	CHECK(write(reader[1], "hello", 5) == 5, "writing to a pipe fails");
	CHECK(write(polled[1], "x", 1) == 1, "writing to a pipe fails");
	__atomic_store_n(&futex_word, 1, __ATOMIC_SEQ_CST);
	futex(&futex_word, FUTEX_WAKE_PRIVATE, 100, NULL);
	MUST(!eventfd_write(event, 5));
	fd = open(victim_path("rendezvous"), O_WRONLY);
	CHECK(fd >= 0, "open of a FIFO for writing: %s", strerror(errno));
	CHECK(read(full[0], filling, sizeof(filling)) == sizeof(filling), "the full pipe lost data");
	for (int i = 0; i < NR; i++)
		CHECK(!pthread_join(threads[i], NULL), "thread %d cannot be joined", i);
	close(fd);
	return victim_done();
}
