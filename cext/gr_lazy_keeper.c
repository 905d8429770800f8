/*
 * The keeper: a process that does nothing but wait for the handler's death. It shares the handler's table of
 * descriptors, so that every userfaultfd stays open, whichever of the two dies, even one that a fork has just brought.
 * It may be forked while threads of the handler hold locks, so it calls the kernel and little else.
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>

#include "gr_lazy_internal.h"

#define MAX_PROCESSES 131072
#define MAX_PIDS (1 << 22) /* PID_MAX_LIMIT */
#define MAX_LATE_FORKS 1024
#define MAX_ROUNDS 16
#define LINGER_MS 20

struct process {
	int pid, parent;
	bool of_tree;
};

/* Touched only if it comes to that. */
static struct process processes[MAX_PROCESSES];
static uint32_t place_of[MAX_PIDS + 1]; /* by pid: its place in `processes`, from 1 on */

void gr_lazy_report(const struct gr_lazy_options *options, const char *line)
{
	for (uint64_t i = 0; i < options->nr_report_fds; i++) {
		ssize_t unused __attribute__((unused)) = write(options->report_fds[i], line, strlen(line));
	}
}

/* ---- who belongs to the tree */

static int parent_of(int pid)
{
	char path[64], text[512], *end;
	GR_CLOSE int fd = -1;
	ssize_t size;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (size <= 0)
		return -1;
	text[size] = '\0';
	end = strrchr(text, ')'); /* the name may hold anything; the state and the parent follow */
	return end && strlen(end) > 4 ? atoi(end + 4) : -1;
}

static uint32_t list_processes(void)
{
	char buffer[8192] __attribute__((aligned(8)));
	GR_CLOSE int fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	uint32_t nr = 0;
	long size;

	while (fd >= 0 && (size = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))) > 0) {
		for (long at = 0; at < size && nr < MAX_PROCESSES;) {
			const struct dirent64 *entry = (const void *)(buffer + at);
			int pid = atoi(entry->d_name);

			at += entry->d_reclen;
			if (pid > 0 && pid <= MAX_PIDS) {
				processes[nr++] = (struct process){ pid, parent_of(pid), false };
				place_of[pid] = nr;
			}
		}
	}
	return nr;
}

static bool is_alive(const struct gr_lazy_watched *one)
{
	return one->pid > 0 && one->pidfd >= 0 && syscall(SYS_pidfd_send_signal, one->pidfd, 0, NULL, 0) == 0;
}

static void mark(const struct gr_lazy_watched *known, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++)
		if (is_alive(&known[i]) && place_of[known[i].pid])
			processes[place_of[known[i].pid] - 1].of_tree = true;
}

static bool is_marked(int pid)
{
	return pid > 0 && pid <= MAX_PIDS && place_of[pid] && processes[place_of[pid] - 1].of_tree;
}

static void kill_known(const struct gr_lazy_watched *known, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++)
		if (known[i].pid > 0 && known[i].pidfd >= 0)
			syscall(SYS_pidfd_send_signal, known[i].pidfd, SIGKILL, NULL, 0);
}

void gr_lazy_kill_tree(struct gr_lazy_shared *shared)
{
	uint32_t nr_members = __atomic_load_n(&shared->nr_members, __ATOMIC_ACQUIRE);
	uint32_t nr_watched = __atomic_load_n(&shared->nr_watched, __ATOMIC_ACQUIRE);
	uint32_t nr = list_processes();
	bool more = true;

	/* Descendants are found before anybody dies: orphans could not be told from others. */
	mark(shared->members, nr_members);
	mark(shared->watched, nr_watched);
	for (int round = 0; more && round < MAX_ROUNDS; round++) {
		more = false;
		for (uint32_t i = 0; i < nr; i++) {
			if (!processes[i].of_tree && is_marked(processes[i].parent))
				more = processes[i].of_tree = true;
		}
	}
	kill_known(shared->members, nr_members);
	kill_known(shared->watched, nr_watched);
	for (uint32_t i = 0; i < nr; i++)
		if (processes[i].of_tree)
			kill(processes[i].pid, SIGKILL);
}

/* ---- after the handler's death */

/* Forks that began before the handler died: their memory, kept open as well. */
static int late_forks[MAX_LATE_FORKS];
static uint32_t nr_late_forks;

/* A fork that nobody knew shows itself when it touches a page: that must be the last thing it does. */
static void kill_faulting(int uffd)
{
	struct uffd_msg message;

	while (read(uffd, &message, sizeof(message)) == sizeof(message)) {
		if (message.event == UFFD_EVENT_PAGEFAULT && message.arg.pagefault.feat.ptid)
			kill((pid_t)message.arg.pagefault.feat.ptid, SIGKILL);
		else if (message.event == UFFD_EVENT_FORK && nr_late_forks < MAX_LATE_FORKS)
			late_forks[nr_late_forks++] = (int)message.arg.fork.ufd;
	}
}

static bool is_left(int uffd)
{
	if (uffd < 0 || gr_lazy_is_gone(uffd))
		return false;
	kill_faulting(uffd);
	return true;
}

/* Keep everything open until nobody is left who could see zeros. */
static void linger(struct gr_lazy_shared *shared)
{
	const struct timespec nap = { .tv_nsec = LINGER_MS * 1000000L };
	uint32_t nr = __atomic_load_n(&shared->nr_watched, __ATOMIC_ACQUIRE);
	bool left;

	do {
		left = false;
		for (uint32_t i = 0; i < nr; i++)
			left |= is_left(shared->watched[i].uffd);
		for (uint32_t i = 0; i < nr_late_forks; i++)
			left |= is_left(late_forks[i]);
		if (left)
			nanosleep(&nap, NULL);
	} while (left);
}

_Noreturn static void keep(struct gr_lazy_handler *handler, int handler_pidfd)
{
	struct gr_lazy_shared *shared = handler->shared;
	struct gr_lazy_status *status = &shared->status;
	struct pollfd fd = { handler_pidfd, POLLIN, 0 };
	struct gr_lazy_message message = { .word = GR_LAZY_END, .value = 1 };
	char line[400];

	prctl(PR_SET_NAME, "gr-lazy-keeper", 0, 0, 0);
	while (poll(&fd, 1, -1) < 0)
		;
	if (status->state == GR_LAZY_FILLED || status->state == GR_LAZY_ENDED)
		_exit(0);
	gr_lazy_kill_tree(shared);
	if (status->state != GR_LAZY_FAILED) {
		snprintf(status->message, sizeof(status->message),
			 "the handler (pid %d) that brought in the tree's memory died, so the tree was killed: it must not "
			 "go on without its memory; restore it again", status->handler_pid);
		snprintf(line, sizeof(line), "gpurestore: lazy restore: %s\n", status->message);
		status->state = GR_LAZY_FAILED;
		gr_lazy_report(&handler->options, line);
		memcpy(message.text, status->message, sizeof(message.text));
		if (shared->control >= 0)
			gr_lazy_send(shared->control, &message, -1);
	}
	/* Nobody shall wait for us any more. */
	for (uint64_t i = 0; i < handler->options.nr_report_fds; i++)
		close(handler->options.report_fds[i]);
	if (shared->control >= 0)
		close(shared->control);
	linger(shared);
	_exit(1);
}

int gr_lazy_keeper_start(struct gr_lazy_handler *handler)
{
	int handler_pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	long pid;

	if (handler_pidfd < 0)
		return -errno;
	/* Made here: the keeper's copy of this process must not need to map anything. */
	gr_lazy_is_gone(-1);
	pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, NULL, NULL, 0);
	if (pid == 0)
		keep(handler, handler_pidfd);
	if (pid < 0)
		return -errno;
	handler->shared->status.keeper_pid = (int)pid;
	handler->shared->keeper_pidfd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
	return handler->shared->keeper_pidfd < 0 ? -errno : (int)pid;
}
