/*
 * What belongs to one thread besides its registers: name, signal mask, alternate stack, pending signals with their
 * siginfo, robust list, rseq, clear_child_tid (a join works), scheduling policy and priority, nice, affinity, timer slack.
 */
#include "victim.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/rseq.h>

enum { NR_THREADS = 3, STACK_BYTES = 65536 };

struct attributes {
	pid_t tid;
	int policy, priority, nice_value;
	sigset_t mask;
	stack_t alternate;
	cpu_set_t affinity;
	char name[16];
	void *robust_head;
	size_t robust_size;
	int slack;
};

static pthread_mutex_t robust_mutex;
static pthread_barrier_t ready;
static int nr_started;
static int privileged;
static volatile sig_atomic_t handler_stack_ok;

static void read_attributes(struct attributes *all)
{
	struct sched_param parameter;

	memset(all, 0, sizeof(*all));
	all->tid = syscall(SYS_gettid);
	all->policy = sched_getscheduler(0);
	MUST(!sched_getparam(0, &parameter));
	all->priority = parameter.sched_priority;
	all->nice_value = getpriority(PRIO_PROCESS, all->tid);
	MUST(!pthread_sigmask(SIG_BLOCK, NULL, &all->mask));
	MUST(!sigaltstack(NULL, &all->alternate));
	MUST(!sched_getaffinity(0, sizeof(all->affinity), &all->affinity));
	MUST(!prctl(PR_GET_NAME, all->name));
	MUST(!syscall(SYS_get_robust_list, 0, &all->robust_head, &all->robust_size));
	all->slack = prctl(PR_GET_TIMERSLACK);
}

static void compare(unsigned number, const struct attributes *was, const struct attributes *is)
{
	CHECK(was->tid == is->tid, "thread %u: tid %d became %d", number, was->tid, is->tid);
	CHECK(was->policy == is->policy, "thread %u: policy %d became %d", number, was->policy, is->policy);
	CHECK(was->priority == is->priority, "thread %u: priority %d became %d", number, was->priority, is->priority);
	CHECK(was->nice_value == is->nice_value, "thread %u: nice %d became %d", number, was->nice_value, is->nice_value);
	CHECK(!memcmp(&was->mask, &is->mask, 8), "thread %u: signal mask changed", number);
	CHECK(was->alternate.ss_sp == is->alternate.ss_sp && was->alternate.ss_size == is->alternate.ss_size &&
	      was->alternate.ss_flags == is->alternate.ss_flags, "thread %u: alternate stack changed", number);
	CHECK(CPU_EQUAL(&was->affinity, &is->affinity), "thread %u: affinity changed", number);
	CHECK(!strcmp(was->name, is->name), "thread %u: name '%s' became '%s'", number, was->name, is->name);
	CHECK(was->robust_head == is->robust_head, "thread %u: robust list changed", number);
	CHECK(was->slack == is->slack, "thread %u: timer slack %d became %d", number, was->slack, is->slack);
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	stack_t now;

	(void)number;
	(void)info;
	(void)context;
	handler_stack_ok = !sigaltstack(NULL, &now) && (now.ss_flags & SS_ONSTACK);
}

/* A signal for this very thread waits, blocked; it must come with the value it was sent with. */
static void send_pending(pid_t tid, int signal_number, int value)
{
	siginfo_t info;

	memset(&info, 0, sizeof(info));
	info.si_signo = signal_number;
	info.si_code = SI_QUEUE;
	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_int = value;
	MUST(!syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, signal_number, &info));
}

static void check_pending(unsigned number, int signal_number, int value)
{
	struct timespec none = { 0, 0 };
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, signal_number);
	memset(&info, 0, sizeof(info));
	CHECK(sigtimedwait(&set, &info, &none) == signal_number, "thread %u: signal %d is not pending", number,
	      signal_number);
	CHECK(info.si_code == SI_QUEUE && info.si_value.sival_int == value && info.si_pid == getpid(),
	      "thread %u: siginfo changed: code %d value %d pid %d", number, info.si_code, info.si_value.sival_int,
	      info.si_pid);
}

/* The kernel keeps cpu_id in the registered area up to date: that only works when rseq is registered again. */
static void check_rseq(unsigned number)
{
	const struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	unsigned cpu = 0;

	if (!__rseq_size)
		return;
	for (int i = 0; i < 100; i++) {
		unsigned seen = *(volatile unsigned *)&area->cpu_id;

		if (!getcpu(&cpu, NULL) && cpu == seen)
			return;
	}
	CHECK(0, "thread %u: rseq says cpu %d, the kernel %u", number, (int)area->cpu_id, cpu);
}

static void set_up(unsigned number)
{
	struct sched_param parameter = { 0 };
	stack_t alternate = { .ss_size = STACK_BYTES };
	sigset_t set;
	cpu_set_t cpus;
	char name[16];

	snprintf(name, sizeof(name), "thread-%u (x) y", number);
	MUST(!prctl(PR_SET_NAME, name));
	alternate.ss_sp = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(alternate.ss_sp != MAP_FAILED && !sigaltstack(&alternate, NULL));
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + number);
	sigaddset(&set, SIGRTMIN + 10);
	MUST(!pthread_sigmask(SIG_BLOCK, &set, NULL));
	send_pending(syscall(SYS_gettid), SIGRTMIN + number, 100 + number);
	send_pending(syscall(SYS_gettid), SIGUSR1, 200 + number);
	MUST(!sched_getaffinity(0, sizeof(cpus), &cpus));
	for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &cpus) && seen++ == (int)(number % CPU_COUNT(&cpus))) {
			CPU_ZERO(&cpus);
			CPU_SET(cpu, &cpus);
			break;
		}
	MUST(!sched_setaffinity(0, sizeof(cpus), &cpus));
	MUST(!prctl(PR_SET_TIMERSLACK, 60000 + number * 1000));
	if (number == 1) {
		MUST(!sched_setscheduler(0, SCHED_BATCH, &parameter));
		MUST(!setpriority(PRIO_PROCESS, syscall(SYS_gettid), 5));
	} else if (number == 2 && privileged) {
		parameter.sched_priority = 3;
		MUST(!sched_setscheduler(0, SCHED_RR, &parameter));
	} else if (number == 2) {
		MUST(!sched_setscheduler(0, SCHED_IDLE, &parameter));
	}
}

static void *thread_main(void *argument)
{
	unsigned number = (unsigned)(uintptr_t)argument;
	struct attributes before, after;
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	set_up(number);
	read_attributes(&before);
	if (number == 1)
		MUST(!pthread_mutex_lock(&robust_mutex));
	__atomic_fetch_add(&nr_started, 1, __ATOMIC_SEQ_CST);
	victim_wait_quietly();
	read_attributes(&after);
	compare(number, &before, &after);
	check_pending(number, SIGRTMIN + number, 100 + number);
	check_pending(number, SIGUSR1, 200 + number);
	check_rseq(number);
	pthread_barrier_wait(&ready);
	if (number == 0) {
		MUST(!sigaction(SIGUSR2, &action, NULL));
		pthread_kill(pthread_self(), SIGUSR2);
		CHECK(handler_stack_ok, "a handler did not run on the alternate stack");
	}
	/* Thread 1 dies with the robust mutex held. */
	return argument;
}

int main(int argc, char **argv)
{
	pthread_mutexattr_t robust;
	pthread_t threads[NR_THREADS];
	struct attributes before, after;
	char name[16] = "";
	int result;

	victim_init(argc, argv);
	privileged = geteuid() == 0 && argc > 2 && !strcmp(argv[2], "realtime");
	MUST(!pthread_mutexattr_init(&robust) && !pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST));
	MUST(!pthread_mutex_init(&robust_mutex, &robust) && !pthread_barrier_init(&ready, NULL, NR_THREADS));
	read_attributes(&before);
	for (uintptr_t i = 0; i < NR_THREADS; i++)
		MUST(!pthread_create(&threads[i], NULL, thread_main, (void *)i));
	while (__atomic_load_n(&nr_started, __ATOMIC_SEQ_CST) < NR_THREADS)
		victim_nap(1);
	victim_ready();
	victim_wait();
	read_attributes(&after);
	compare(99, &before, &after);
	check_rseq(99);
	for (uintptr_t i = 0; i < NR_THREADS; i++) {
		MUST(!pthread_getname_np(threads[i], name, sizeof(name)) || 1);
		CHECK(!pthread_join(threads[i], NULL), "thread %lu cannot be joined", (long)i);
	}
	result = pthread_mutex_lock(&robust_mutex);
	CHECK(result == EOWNERDEAD, "robust mutex of a dead thread: %s", strerror(result));
	return victim_done();
}
