/*
 * Interval timers and POSIX timers, armed and idle, one-shot and periodic, on several clocks, with ids that are not dense
 * and with every way to notify. Remaining time may only have gone down, and by no more than has passed.
 */
#include "victim.h"
#include <sys/time.h>

enum { NR_POSIX = 6 };

static volatile sig_atomic_t alarms, last_value;

static void on_alarm(int number)
{
	(void)number;
	alarms++;
}

static void on_timer(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	last_value = info->si_value.sival_int;
}

/* The raw call: glibc's timer_t is its own id for SIGEV_THREAD, and the kernel's id is what must be the same. */
static int make_timer(clockid_t clock, int notify, int value, int *id)
{
	struct sigevent event = { .sigev_notify = notify, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = value };

	if (notify & SIGEV_THREAD_ID)
		event._sigev_un._tid = syscall(SYS_gettid);
	return syscall(SYS_timer_create, clock, &event, id);
}

static double seconds(struct timespec time)
{
	return time.tv_sec + time.tv_nsec / 1e9;
}

static double micro_seconds(struct timeval time)
{
	return time.tv_sec + time.tv_usec / 1e6;
}

static const int ids_wanted[NR_POSIX] = { 1, 2, 4, 5, 6, 7 }; /* 0 and 3 are deleted again */
static const int notify[NR_POSIX] = { SIGEV_SIGNAL, SIGEV_NONE, SIGEV_SIGNAL | SIGEV_THREAD_ID, SIGEV_SIGNAL,
				      SIGEV_SIGNAL, SIGEV_NONE };
static const clockid_t clocks[NR_POSIX] = { CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME,
					    CLOCK_PROCESS_CPUTIME_ID, CLOCK_MONOTONIC };
static const struct itimerspec specs[NR_POSIX] = {
	{ { 0, 0 }, { 500, 0 } }, { { 7, 500000000 }, { 600, 0 } }, { { 300, 0 }, { 300, 0 } },
	{ { 0, 0 }, { 0, 0 } }, { { 0, 0 }, { 400, 0 } }, { { 11, 0 }, { 222, 0 } },
};
static const struct itimerval intervals[3] = {
	{ { 0, 0 }, { 800, 0 } }, { { 50, 250000 }, { 700, 0 } }, { { 0, 0 }, { 650, 0 } },
};
static int kept[NR_POSIX];
static double armed;

static void prepare(void)
{
	struct sigaction action = { .sa_handler = on_alarm };
	int ids[NR_POSIX + 2], nr_kept = 0;

	MUST(!sigaction(SIGALRM, &action, NULL));
	action.sa_flags = SA_SIGINFO;
	action.sa_sigaction = on_timer;
	MUST(!sigaction(SIGRTMIN + 1, &action, NULL));
	for (int i = 0; i < NR_POSIX + 2; i++) {
		int which = nr_kept < NR_POSIX ? nr_kept : 0;

		MUST(!make_timer(clocks[which], notify[which], 900 + which, &ids[i]));
		if (i != 0 && i != 3)
			kept[nr_kept++] = ids[i];
	}
	MUST(!syscall(SYS_timer_delete, ids[0]) && !syscall(SYS_timer_delete, ids[3]));
	for (int i = 0; i < NR_POSIX; i++)
		MUST(kept[i] - ids[0] == ids_wanted[i] && !syscall(SYS_timer_settime, kept[i], 0, &specs[i], NULL));
	for (int i = 0; i < 3; i++)
		MUST(!setitimer(i, &intervals[i], NULL));
	armed = victim_now(CLOCK_MONOTONIC);
}

static void check_times(void)
{
	double passed = victim_now(CLOCK_MONOTONIC) - armed + 0.1;

	for (int i = 0; i < 3; i++) {
		struct itimerval now;

		MUST(!getitimer(i, &now));
		CHECK(micro_seconds(now.it_interval) == micro_seconds(intervals[i].it_interval), "interval of itimer %d", i);
		CHECK(micro_seconds(now.it_value) <= micro_seconds(intervals[i].it_value) + 0.1 &&
		      micro_seconds(now.it_value) >= micro_seconds(intervals[i].it_value) - passed,
		      "itimer %d has %f s left of %f after %f", i, micro_seconds(now.it_value),
		      micro_seconds(intervals[i].it_value), passed);
	}
	for (int i = 0; i < NR_POSIX; i++) {
		struct itimerspec now;

		memset(&now, 0, sizeof(now));
		CHECK(!syscall(SYS_timer_gettime, kept[i], &now), "timer %d is gone", kept[i]);
		CHECK(seconds(now.it_interval) == seconds(specs[i].it_interval), "interval of timer %d is %f", kept[i],
		      seconds(now.it_interval));
		CHECK(seconds(now.it_value) <= seconds(specs[i].it_value) + 0.1 &&
		      seconds(now.it_value) >= seconds(specs[i].it_value) - passed, "timer %d has %f s left of %f after %f",
		      kept[i], seconds(now.it_value), seconds(specs[i].it_value), passed);
	}
}

static void check_notifications(void)
{
	int extra;

	/* Each kept timer still notifies with its own value, and an id is not handed out twice. */
	for (int i = 0; i < NR_POSIX; i++) {
		struct itimerspec soon = { { 0, 0 }, { 0, 1000000 } };

		if (notify[i] == SIGEV_NONE || clocks[i] == CLOCK_PROCESS_CPUTIME_ID)
			continue;
		last_value = 0;
		CHECK(!syscall(SYS_timer_settime, kept[i], 0, &soon, NULL), "timer %d cannot be set", kept[i]);
		for (int waited = 0; waited < 3000 && !last_value; waited++)
			victim_nap(1);
		CHECK_EQUAL(last_value, 900 + i, "value that a timer sent");
	}
	CHECK(!make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, &extra), "no new timer: %s", strerror(errno));
	for (int i = 0; i < NR_POSIX; i++)
		CHECK(extra != kept[i], "id %d was handed out twice", extra);
	struct itimerval soon = { { 0, 0 }, { 0, 1000 } };
	MUST(!setitimer(ITIMER_REAL, &soon, NULL));
	for (int waited = 0; waited < 3000 && !alarms; waited++)
		victim_nap(1);
	CHECK_EQUAL(alarms, 1, "alarms");
}

int main(int argc, char **argv)
{
	victim_init(argc, argv);
	prepare();
	victim_ready();
	victim_wait();
	check_times();
	check_notifications();
	return victim_done();
}
