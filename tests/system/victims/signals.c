/* Signal actions, the blocked mask, and the process-wide queue with order, number and siginfo of what is pending. */
#include "victim.h"

enum { NR_QUEUED = 5 };

static volatile sig_atomic_t caught, caught_value;

static void on_plain(int number)
{
	caught = number;
}

static void on_info(int number, siginfo_t *info, void *context)
{
	(void)context;
	caught = number;
	caught_value = info->si_value.sival_int;
}

struct kernel_action {
	void *handler;
	unsigned long flags;
	void *restorer;
	uint64_t mask;
};

static struct kernel_action before[65], after[65];
static sigset_t blocked;
static int real_time;

static void read_actions(struct kernel_action *actions)
{
	memset(actions, 0, 65 * sizeof(*actions));
	for (int number = 1; number <= 64; number++)
		MUST(!syscall(SYS_rt_sigaction, number, NULL, &actions[number], 8));
}

static void prepare(void)
{
	struct sigaction action = { .sa_handler = on_plain };
	union sigval value;

	real_time = SIGRTMIN + 3;
	action.sa_flags = SA_RESTART | SA_NODEFER;
	sigfillset(&action.sa_mask);
	MUST(!sigaction(SIGHUP, &action, NULL));
	action.sa_flags = SA_SIGINFO | SA_RESETHAND;
	action.sa_sigaction = on_info;
	sigemptyset(&action.sa_mask);
	sigaddset(&action.sa_mask, SIGALRM);
	MUST(!sigaction(SIGUSR2, &action, NULL));
	action.sa_flags = SA_SIGINFO;
	MUST(!sigaction(SIGRTMAX, &action, NULL));
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGUSR2);
	sigaddset(&blocked, SIGTERM);
	sigaddset(&blocked, real_time);
	MUST(!sigprocmask(SIG_SETMASK, &blocked, NULL));
	for (int i = 0; i < NR_QUEUED; i++) {
		value.sival_int = 1000 + i;
		MUST(!sigqueue(getpid(), real_time, value));
	}
	MUST(!kill(getpid(), SIGTERM));
	value.sival_int = 4711;
	MUST(!sigqueue(getpid(), SIGUSR2, value));
	read_actions(before);
}

static void check(void)
{
	struct timespec none = { 0, 0 };
	sigset_t now;
	siginfo_t info;

	read_actions(after);
	for (int number = 1; number <= 64; number++)
		CHECK(!memcmp(&before[number], &after[number], sizeof(before[number])), "action of signal %d changed", number);
	MUST(!sigprocmask(SIG_BLOCK, NULL, &now));
	CHECK(!memcmp(&blocked, &now, 8), "blocked mask changed");
	sigemptyset(&now);
	sigaddset(&now, real_time);
	for (int i = 0; i < NR_QUEUED; i++) {
		memset(&info, 0, sizeof(info));
		CHECK(sigtimedwait(&now, &info, &none) == real_time, "queued signal %d is gone", i);
		CHECK(info.si_value.sival_int == 1000 + i && info.si_code == SI_QUEUE && info.si_pid == getpid(),
		      "queued signal %d: value %d, code %d, pid %d", i, info.si_value.sival_int, info.si_code, info.si_pid);
	}
	CHECK(sigtimedwait(&now, &info, &none) == -1 && errno == EAGAIN, "a signal too many was queued");
	sigemptyset(&now);
	sigaddset(&now, SIGTERM);
	CHECK(sigtimedwait(&now, &info, &none) == SIGTERM && info.si_code == SI_USER, "SIGTERM is not pending as sent");
	sigemptyset(&now);
	CHECK(!sigpending(&now) && sigismember(&now, SIGUSR2) && !sigismember(&now, SIGUSR1) && !sigismember(&now, SIGSTOP),
	      "pending set is wrong");
	sigemptyset(&now);
	MUST(!sigprocmask(SIG_SETMASK, &now, NULL));
	CHECK(caught == SIGUSR2 && caught_value == 4711, "handler got signal %d with value %d", caught, caught_value);
	MUST(!kill(getpid(), SIGHUP));
	CHECK(caught == SIGHUP, "handler for SIGHUP did not run");
	MUST(!kill(getpid(), SIGPIPE));
}

int main(int argc, char **argv)
{
	return victim_main(argc, argv, prepare, check);
}
