/*
 * Holds one thing, named by argument 2, that a dump cannot carry. The dump must say so and leave the victim alone: it waits
 * for `go` as all victims do, and its counter shows that it goes on. Exit status 77: this kernel does not offer the thing.
 */
#include "victim.h"
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/io.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

enum { FD = 77 }; /* the number under which the thing is to be reported */

static void at_fd(int fd)
{
	if (fd < 0)
		_exit(77);
	MUST(dup2(fd, FD) == FD);
	close(fd);
}

static void tcp_socket(void)
{
	at_fd(socket(AF_INET, SOCK_STREAM, 0));
}

static void unix_socket(void)
{
	int ends[2];

	MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	at_fd(ends[0]);
}

static void netlink_socket(void)
{
	at_fd(socket(AF_NETLINK, SOCK_RAW, 0));
}

static void epoll(void)
{
	at_fd(epoll_create1(0));
}

static void terminal(void)
{
	at_fd(posix_openpt(O_RDWR | O_NOCTTY));
}

static void timer_descriptor(void)
{
	at_fd(timerfd_create(CLOCK_MONOTONIC, 0));
}

static void signal_descriptor(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	at_fd(signalfd(-1, &set, 0));
}

static void inotify(void)
{
	at_fd(inotify_init());
}

static void pid_descriptor(void)
{
	at_fd(syscall(SYS_pidfd_open, getpid(), 0));
}

static void ring(void)
{
	struct io_uring_params parameters;

	memset(&parameters, 0, sizeof(parameters));
	at_fd(syscall(SYS_io_uring_setup, 4, &parameters));
}

static void userfault(void)
{
	at_fd(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
}

static void perf(void)
{
	struct perf_event_attr attributes = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(attributes),
					      .config = PERF_COUNT_SW_TASK_CLOCK, .exclude_kernel = 1 };

	at_fd(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0));
}

static void lease(void)
{
	int fd = open(victim_path("leased"), O_RDWR | O_CREAT, 0600);

	MUST(fd >= 0 && dup2(fd, FD) == FD);
	close(fd);
	if (fcntl(FD, F_SETLEASE, F_WRLCK))
		_exit(77);
}

static void seccomp_filter(void)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { 1, &allow };

	MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(77);
}

static void sysv_memory(void)
{
	int id = shmget(IPC_PRIVATE, 8192, 0600 | IPC_CREAT);
	char *memory;

	if (id < 0)
		_exit(77);
	memory = shmat(id, NULL, 0);
	MUST(memory != (void *)-1 && !shmctl(id, IPC_RMID, NULL));
	memory[0] = 1;
}

static int waiting_child(void *unused)
{
	(void)unused;
	victim_ready();
	victim_wait_quietly();
	return 0;
}

static int namespace_child(void *flag)
{
	if (unshare((int)(intptr_t)flag))
		_exit(77);
	return waiting_child(NULL);
}

static pid_t child;

/* A child that cannot make its namespace is gone before it says that it is ready: victim_child() then gives up. */
static void in_namespace(int flag)
{
	pid_t trial = fork();
	int status;

	if (!trial)
		_exit(unshare(flag) ? 77 : 0);
	MUST(waitpid(trial, &status, 0) == trial);
	if (status)
		_exit(77);
	child = victim_child(namespace_child, (void *)(intptr_t)flag);
}

static void network_namespace(void)
{
	in_namespace(CLONE_NEWNET);
}

static void mount_namespace(void)
{
	in_namespace(CLONE_NEWNS);
}

static void uts_namespace(void)
{
	in_namespace(CLONE_NEWUTS);
}

static void user_namespace(void)
{
	in_namespace(CLONE_NEWUSER);
}

static void shared_descriptors(void)
{
	char *stack = malloc(65536);

	MUST(stack);
	child = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL);
	MUST(child >= 0);
	if (!child)
		_exit((victim_wait_quietly(), 0));
}

static void shared_directories(void)
{
	child = syscall(SYS_clone, CLONE_FS | SIGCHLD, NULL, NULL, NULL, NULL);
	MUST(child >= 0);
	if (!child)
		_exit((victim_wait_quietly(), 0));
}

/* It has its parent's thread-local memory: nothing that is kept there may be used, errno and victim_path() included. */
static int clone_main(void *unused)
{
	char path[PATH_MAX + 64];

	(void)unused;
	snprintf(path, sizeof(path), "%s/go", victim_folder);
	while (access(path, F_OK))
		nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
	_exit(0);
}

static void shared_memory_space(void)
{
	char *stack = malloc(1 << 20);

	MUST(stack);
	child = clone(clone_main, stack + (1 << 20), CLONE_VM | SIGCHLD, NULL);
	MUST(child >= 0);
}

/* Everything is allowed, but whoever makes calls in this thread has to look at the selector. */
static void call_dispatch(void)
{
	static char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */

	if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector))
		_exit(77);
}

static void ports(void)
{
	if (ioperm(0x80, 1, 1))
		_exit(77);
}

static const struct {
	const char *name;
	void (*make)(void);
} kinds[] = {
	{ "tcp-socket", tcp_socket }, { "unix-socket", unix_socket }, { "netlink-socket", netlink_socket }, { "epoll", epoll },
	{ "terminal", terminal }, { "timerfd", timer_descriptor }, { "signalfd", signal_descriptor }, { "inotify", inotify },
	{ "pidfd", pid_descriptor }, { "io_uring", ring }, { "userfaultfd", userfault }, { "perf", perf },
	{ "lease", lease }, { "seccomp", seccomp_filter }, { "call-dispatch", call_dispatch }, { "ports", ports },
	{ "sysv-shm", sysv_memory }, { "net-namespace", network_namespace }, { "mount-namespace", mount_namespace },
	{ "uts-namespace", uts_namespace }, { "user-namespace", user_namespace }, { "shared-files", shared_descriptors },
	{ "shared-fs", shared_directories }, { "shared-vm", shared_memory_space },
};

int main(int argc, char **argv)
{
	victim_init(argc, argv);
	MUST(argc > 2);
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		if (!strcmp(kinds[i].name, argv[2])) {
			kinds[i].make();
			victim_ready();
			victim_wait();
			if (child)
				victim_expect_exit(child, 0);
			return victim_done();
		}
	return 99;
}
