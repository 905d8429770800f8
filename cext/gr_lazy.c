/* The main process's side of a lazy restore: it starts the handler, hands tasks over to it, and learns of its end. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "gr_lazy_internal.h"

#define WAIT_SLICE_MS 5
#define END_WAIT_MS 5000

struct gr_lazy {
	struct gr_lazy_shared *shared;
	int socket;
	bool released;
};

/* ---- messages */

int gr_lazy_send(int socket, const struct gr_lazy_message *message, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec iov = { (void *)message, sizeof(*message) };
	struct msghdr head = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *part = (struct cmsghdr *)control;

		head.msg_control = control;
		head.msg_controllen = sizeof(control);
		*part = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
					  .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(part), &fd, sizeof(fd));
	}
	return sendmsg(socket, &head, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int gr_lazy_receive(int socket, struct gr_lazy_message *message, int *fd)
{
	char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec iov = { message, sizeof(*message) };
	struct msghdr head = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			       .msg_controllen = sizeof(control) };
	ssize_t size;

	do
		size = recvmsg(socket, &head, MSG_CMSG_CLOEXEC);
	while (size < 0 && errno == EINTR);
	if (size < 0)
		return errno == ECONNRESET ? 0 : -errno;
	for (struct cmsghdr *part = CMSG_FIRSTHDR(&head); part; part = CMSG_NXTHDR(&head, part))
		if (fd && part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS)
			memcpy(fd, CMSG_DATA(part), sizeof(*fd));
	return size == sizeof(*message);
}

/* Wait for a word of the handler. */
static int expect(struct gr_lazy *lazy, enum gr_lazy_word word, int *cancel, const char *what, struct gr_error *err)
{
	struct gr_lazy_message message;
	int ret;

	for (;;) {
		struct pollfd fd = { lazy->socket, POLLIN, 0 };

		if (gr_is_cancelled(cancel))
			return gr_fail(err, ECANCELED, "%s", what);
		ret = poll(&fd, 1, WAIT_SLICE_MS);
		if (ret > 0)
			break;
		if (ret < 0 && errno != EINTR)
			return gr_fail(err, errno, "%s", what);
	}
	ret = gr_lazy_receive(lazy->socket, &message, NULL);
	if (ret < 0)
		return gr_fail(err, -ret, "%s", what);
	if (ret == 0)
		return gr_fail(err, EPIPE, "%s: the handler of lazy pages died", what);
	if (message.word == GR_LAZY_END)
		return gr_fail(err, EPIPE, "%s: %.200s", what, message.text);
	if (message.word != (int)word)
		return gr_fail(err, EPROTO, "%s", what);
	return message.value ? gr_fail(err, message.value, "%s", what) : 0;
}

/* ---- before */

int gr_lazy_check(struct gr_error *err)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
					      UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
					      UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_MISSING_SHMEM };
	GR_CLOSE int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		return gr_fail(err, errno, "making a userfaultfd");
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		return gr_fail(err, errno, "asking userfaultfd for fork events");
	return 0;
}

/* ---- the start */

static int by_number(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

/* Nothing of the main process's may stay open: a pipe would never end, a file never be free. */
static int close_others(const struct gr_lazy_handler *handler)
{
	uint64_t nr = 3 + handler->options.nr_report_fds, at = 0;
	unsigned int from = 0;
	int *keep;

	for (uint64_t i = 0; i < handler->nr_sources; i++)
		nr += handler->sources[i]->nr_fds;
	keep = calloc(nr, sizeof(*keep));
	if (!keep)
		return -ENOMEM;
	keep[at++] = handler->shared->control;
	keep[at++] = handler->options.record_fd;
	keep[at++] = handler->options.log_fd;
	for (uint64_t i = 0; i < handler->options.nr_report_fds; i++)
		keep[at++] = handler->options.report_fds[i];
	for (uint64_t i = 0; i < handler->nr_sources; i++)
		for (uint64_t f = 0; f < handler->sources[i]->nr_fds; f++)
			keep[at++] = handler->sources[i]->fds[f];
	qsort(keep, nr, sizeof(*keep), by_number);
	for (uint64_t i = 0; i < nr; i++) {
		if (keep[i] < (int)from)
			continue;
		if ((unsigned int)keep[i] > from)
			close_range(from, (unsigned int)keep[i] - 1, 0);
		from = (unsigned int)keep[i] + 1;
	}
	close_range(from, ~0U, 0);
	free(keep);
	return 0;
}

/* Twice forked, in a session of its own: nobody's child to wait for, and out of reach of a terminal's signals. */
static int fork_handler(struct gr_lazy_handler *handler, int other_end, struct gr_error *err)
{
	sigset_t all, before;
	pid_t child;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	child = fork();
	if (child == 0) {
		close(other_end);
		setsid();
		child = fork();
		if (child != 0)
			_exit(child < 0);
		if (close_others(handler) < 0)
			_exit(1);
		gr_lazy_handle(handler);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (child < 0)
		return gr_fail(err, errno, "forking the handler of lazy pages");
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return 0;
}

static void destroy_handler(struct gr_lazy_handler *handler)
{
	if (!handler)
		return;
	for (uint64_t i = 0; handler->sources && i < handler->nr_sources; i++)
		gr_lazy_source_destroy(handler->sources[i]);
	free(handler->sources);
	free(handler->objects);
	pthread_mutex_destroy(&handler->mms_lock);
	pthread_mutex_destroy(&handler->record_lock);
	free(handler);
}

static struct gr_lazy_handler *create_handler(const struct gr_lazy_task *tasks, uint64_t nr_tasks,
					      const struct gr_lazy_options *options, struct gr_lazy_shared *shared,
					      struct gr_error *err)
{
	struct gr_lazy_handler *handler = calloc(1, sizeof(*handler));

	if (handler)
		handler->sources = calloc(nr_tasks + 1, sizeof(struct gr_lazy_source *));
	if (handler)
		handler->objects = calloc(nr_tasks + 1, sizeof(struct gr_lazy_object));
	if (!handler || !handler->sources || !handler->objects) {
		gr_fail(err, ENOMEM, "preparing the handler of lazy pages");
		destroy_handler(handler);
		return NULL;
	}
	gr_lazy_lock_init(&handler->shared_lock);
	handler->shared = shared;
	handler->options = *options;
	pthread_mutex_init(&handler->mms_lock, NULL);
	pthread_mutex_init(&handler->record_lock, NULL);
	for (uint64_t i = 0; i < nr_tasks; i++, handler->nr_sources++) {
		if (gr_lazy_source_create(&tasks[i], &handler->sources[i], err) < 0) {
			destroy_handler(handler);
			return NULL;
		}
	}
	return handler;
}

int gr_lazy_start(const struct gr_lazy_task *tasks, uint64_t nr_tasks, const struct gr_lazy_options *options,
		  struct gr_lazy **out, struct gr_error *err)
{
	struct gr_lazy *lazy = calloc(1, sizeof(*lazy));
	struct gr_lazy_handler *handler = NULL;
	int ends[2] = { -1, -1 }, ret;

	if (!lazy)
		return gr_fail(err, ENOMEM, "preparing the handler of lazy pages");
	lazy->socket = -1;
	lazy->shared = mmap(NULL, sizeof(*lazy->shared), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (lazy->shared == MAP_FAILED) {
		free(lazy);
		return gr_fail(err, ENOMEM, "preparing the handler of lazy pages");
	}
	handler = create_handler(tasks, nr_tasks, options, lazy->shared, err);
	ret = handler ? 0 : -err->code;
	if (ret == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		ret = gr_fail(err, errno, "making a socket to the handler of lazy pages");
	if (ret == 0) {
		lazy->socket = ends[0];
		handler->shared->control = ends[1];
		ret = fork_handler(handler, ends[0], err);
		close(ends[1]);
	}
	destroy_handler(handler);
	if (ret == 0)
		ret = expect(lazy, GR_LAZY_READY, NULL, "starting the handler of lazy pages", err);
	if (ret < 0)
		gr_lazy_destroy(lazy);
	else
		*out = lazy;
	return ret;
}

/* ---- afterwards */

int gr_lazy_add(struct gr_lazy *lazy, int pid, int uffd, int *cancel, struct gr_error *err)
{
	struct gr_lazy_message message = { .word = GR_LAZY_ADD, .value = pid };
	int ret = gr_lazy_send(lazy->socket, &message, uffd);

	if (ret < 0)
		return gr_fail(err, -ret, "handing task %d to the handler of lazy pages", pid);
	return expect(lazy, GR_LAZY_ANSWER, cancel, "handing a task to the handler of lazy pages", err);
}

int gr_lazy_release(struct gr_lazy *lazy, struct gr_error *err)
{
	struct gr_lazy_message message = { .word = GR_LAZY_RELEASE };
	int ret = gr_lazy_send(lazy->socket, &message, -1);

	if (ret < 0)
		return gr_fail(err, -ret, "letting the handler of lazy pages fill");
	ret = expect(lazy, GR_LAZY_ANSWER, NULL, "letting the handler of lazy pages fill", err);
	lazy->released = ret == 0;
	return ret;
}

int gr_lazy_fd(const struct gr_lazy *lazy)
{
	return lazy->socket;
}

void gr_lazy_read(const struct gr_lazy *lazy, struct gr_lazy_status *out)
{
	*out = lazy->shared->status;
}

/* The handler sees that we are gone, kills the tasks that it has, and ends. */
static void await_end(struct gr_lazy *lazy)
{
	struct gr_lazy_message message;
	struct pollfd fd = { lazy->socket, POLLIN, 0 };

	shutdown(lazy->socket, SHUT_WR);
	while (poll(&fd, 1, END_WAIT_MS) > 0)
		if (gr_lazy_receive(lazy->socket, &message, NULL) <= 0)
			return;
	if (lazy->shared->status.handler_pid > 0)
		kill(lazy->shared->status.handler_pid, SIGKILL);
}

void gr_lazy_destroy(struct gr_lazy *lazy)
{
	if (!lazy)
		return;
	if (lazy->socket >= 0) {
		if (!lazy->released)
			await_end(lazy);
		close(lazy->socket);
	}
	munmap(lazy->shared, sizeof(*lazy->shared));
	free(lazy);
}
