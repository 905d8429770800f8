/* The handler process: it takes address spaces from the main process, has threads serve them, and says how it ended. */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "gr_lazy_internal.h"

#define MAX_RECORD (1UL << 20)

static void tell(struct gr_lazy_handler *handler, enum gr_lazy_word word, int value, const char *text)
{
	struct gr_lazy_message message = { .word = (int)word, .value = value };

	if (handler->shared->control < 0)
		return;
	snprintf(message.text, sizeof(message.text), "%s", text);
	gr_lazy_send(handler->shared->control, &message, -1);
}

static void wake_control(struct gr_lazy_handler *handler)
{
	uint64_t one = 1;

	if (write(handler->ended, &one, sizeof(one)) < 0)
		_exit(1); /* cannot be; the keeper takes care of the tree */
}

void gr_lazy_fail(struct gr_lazy_handler *handler, int code, const char *fmt, ...)
{
	struct gr_lazy_status *status = &handler->shared->status;
	char what[128];
	va_list args;

	if (__atomic_exchange_n(&handler->failed, 1, __ATOMIC_ACQ_REL))
		return;
	va_start(args, fmt);
	vsnprintf(what, sizeof(what), fmt, args);
	va_end(args);
	snprintf(status->message, sizeof(status->message),
		 "%s failed (%s), so the tree was killed: it must not go on without its memory; restore it again", what,
		 strerrordesc_np(code));
	wake_control(handler);
}

/* ---- address spaces */

static bool is_sharing(const struct gr_lazy_source *source)
{
	return !source->pid || source->nr_views;
}

/* A place that was let go by a fork of the same task, or a new one; NULL when there is none. mms_lock is held. */
static struct gr_lazy_mm *find_place(struct gr_lazy_handler *handler, const struct gr_lazy_source *source)
{
	struct gr_lazy_mm *mm;

	for (uint32_t i = 0; handler->nr_free && i < handler->nr_mms; i++) {
		mm = handler->mms[i];
		/* Whoever lets go holds mms_lock. */
		if (mm->source == source && handler->shared->watched[i].uffd < 0) {
			handler->nr_free--;
			return mm;
		}
	}
	if (handler->nr_mms == GR_LAZY_MAX_MMS)
		return NULL;
	mm = calloc(1, sizeof(*mm));
	if (mm) {
		gr_lazy_lock_init(&mm->own_lock);
		mm->lock = is_sharing(source) ? &handler->shared_lock : &mm->own_lock;
		pthread_mutex_init(&mm->order_lock, NULL);
		mm->uffd = -1;
		mm->source = source;
		mm->done_bytes = &handler->shared->status.done_bytes;
		mm->number = handler->nr_mms;
	}
	return mm;
}

static int enter(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm, int pid)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT, .data.u32 = mm->number };
	struct gr_lazy_shared *shared = handler->shared;

	shared->watched[mm->number] = (struct gr_lazy_watched){ mm->uffd, pid, -1 };
	if (pid) {
		struct gr_lazy_watched member = { -1, pid, (int)syscall(SYS_pidfd_open, pid, 0) };

		if (member.pidfd < 0)
			return -errno;
		shared->members[shared->nr_members] = member;
		__atomic_add_fetch(&shared->nr_members, 1, __ATOMIC_RELEASE);
	}
	if (mm->number == handler->nr_mms) {
		handler->mms[mm->number] = mm;
		__atomic_store_n(&shared->nr_watched, mm->number + 1, __ATOMIC_RELEASE);
		__atomic_store_n(&handler->nr_mms, mm->number + 1, __ATOMIC_RELEASE);
	}
	__atomic_fetch_add(&shared->status.total_bytes, mm->remaining << GR_PAGE_SHIFT, __ATOMIC_RELAXED);
	if (mm->source->pid)
		__atomic_fetch_add(&handler->nr_live, 1, __ATOMIC_RELEASE);
	return epoll_ctl(handler->epoll, EPOLL_CTL_ADD, mm->uffd, &event) < 0 ? -errno : 0;
}

int gr_lazy_register(struct gr_lazy_handler *handler, const struct gr_lazy_source *source,
		     const struct gr_lazy_mm *parent, int uffd, int pid, struct gr_lazy_mm **out)
{
	bool is_common = is_sharing(source);
	struct gr_lazy_mm *mm;
	int ret = -ENOSPC;

	if (is_common && !parent) /* else the lock is held: it is the parent's, too */
		pthread_rwlock_wrlock(&handler->shared_lock);
	pthread_mutex_lock(&handler->mms_lock);
	mm = find_place(handler, source);
	if (mm) {
		if (!is_common)
			pthread_rwlock_wrlock(&mm->own_lock); /* free, so nobody holds it for long */
		ret = parent ? gr_lazy_mm_init_fork(mm, parent, uffd) : gr_lazy_mm_init(mm, source, uffd);
		if (ret == 0)
			ret = enter(handler, mm, pid);
		if (!is_common)
			pthread_rwlock_unlock(&mm->own_lock);
	}
	pthread_mutex_unlock(&handler->mms_lock);
	if (is_common && !parent)
		pthread_rwlock_unlock(&handler->shared_lock);
	if (ret == 0 && out)
		*out = mm;
	return ret;
}

bool gr_lazy_is_complete(const struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm)
{
	const struct gr_lazy_source *source = mm->source;

	if (__atomic_load_n(&mm->remaining, __ATOMIC_ACQUIRE))
		return false;
	/* What was mapped at first may be mapped again, so unmapping makes nothing complete. */
	for (uint64_t i = 0; source->nr_views && i < source->nr_segments; i++) {
		uint64_t object = source->segments[i].object;

		if (object && __atomic_load_n(&handler->objects[object - 1].mm->remaining, __ATOMIC_ACQUIRE))
			return false;
	}
	return true;
}

void gr_lazy_finish(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm)
{
	struct gr_lazy_shared *shared = handler->shared;
	struct gr_lazy_watched *watched = &shared->watched[mm->number];
	bool last = false, is_object = false;

	pthread_rwlock_wrlock(mm->lock);
	if (mm->uffd >= 0 && (gr_lazy_is_complete(handler, mm) || gr_lazy_is_gone(mm->uffd))) {
		pthread_mutex_lock(&handler->mms_lock);
		/* Closing it ends the registration of all its ranges; what is missing now are zeros. */
		close(mm->uffd);
		if (watched->pidfd >= 0)
			close(watched->pidfd);
		__atomic_fetch_add(&shared->status.lost_bytes, mm->remaining << GR_PAGE_SHIFT, __ATOMIC_RELAXED);
		__atomic_fetch_add(mm->done_bytes, mm->remaining << GR_PAGE_SHIFT, __ATOMIC_RELAXED);
		gr_lazy_mm_let_go(mm);
		is_object = !mm->source->pid;
		*watched = (struct gr_lazy_watched){ -1, 0, -1 };
		handler->nr_free++;
		last = mm->source->pid && __atomic_sub_fetch(&handler->nr_live, 1, __ATOMIC_ACQ_REL) == 0;
		pthread_mutex_unlock(&handler->mms_lock);
	}
	pthread_rwlock_unlock(mm->lock);
	if (is_object)
		munmap((void *)mm->source->ranges[0].start, mm->source->ranges[0].end - mm->source->ranges[0].start);
	if (last)
		wake_control(handler);
}

/* ---- what the main process wants */

static int take_task(struct gr_lazy_handler *handler, int pid, int uffd)
{
	struct gr_lazy_mm *mm;

	for (uint64_t i = 0; i < handler->nr_sources; i++) {
		if (handler->sources[i]->pid == pid) {
			int ret = gr_lazy_register(handler, handler->sources[i], NULL, uffd, pid, &mm);

			if (ret == 0)
				gr_lazy_fill_hot(handler, mm);
			return ret;
		}
	}
	return -ESRCH;
}

static int start_threads(struct gr_lazy_handler *handler, void *(*body)(void *))
{
	uint32_t started = 0;

	for (uint32_t i = 0; i < handler->options.nr_threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, body, handler) == 0) {
			pthread_detach(thread);
			started++;
		}
	}
	return started ? 0 : -EAGAIN; /* fewer than asked for are slower, not wrong */
}

static int release(struct gr_lazy_handler *handler)
{
	struct gr_lazy_status *status = &handler->shared->status;

	status->released_ns = gr_lazy_now_ns();
	handler->last_fault_ns = status->released_ns;
	status->state = GR_LAZY_FILLING;
	__atomic_store_n(&handler->filling, 1, __ATOMIC_RELEASE);
	if (__atomic_load_n(&handler->nr_live, __ATOMIC_ACQUIRE) == 0)
		wake_control(handler);
	return start_threads(handler, gr_lazy_fill);
}

/* False: the main process is gone or does not want us any more. */
static bool listen_to_main(struct gr_lazy_handler *handler)
{
	struct gr_lazy_message message;
	int fd = -1, ret = gr_lazy_receive(handler->shared->control, &message, &fd);

	if (ret <= 0)
		return false;
	if (message.word == GR_LAZY_ADD && fd >= 0)
		ret = take_task(handler, message.value, fd);
	else if (message.word == GR_LAZY_RELEASE)
		ret = release(handler);
	else
		ret = -EPROTO;
	tell(handler, GR_LAZY_ANSWER, ret < 0 ? -ret : 0, "");
	return true;
}

/* ---- the end */

static void write_log(const struct gr_lazy_handler *handler)
{
	const struct gr_lazy_status *status = &handler->shared->status;

	if (handler->options.log_fd >= 0)
		dprintf(handler->options.log_fd, "lazy restore: %lu of %lu bytes in place %.3f s after the release, %lu faults\n",
			status->done_bytes - status->lost_bytes, status->total_bytes, (double)(status->filled_ns - status->released_ns) / 1e9, status->nr_faults);
}

static void write_record(const struct gr_lazy_handler *handler)
{
	for (uint64_t i = 0; handler->options.record_fd >= 0 && i < handler->nr_record; i++)
		dprintf(handler->options.record_fd, "%d %lx\n", handler->record[i].pid, handler->record[i].address);
}

_Noreturn static void end(struct gr_lazy_handler *handler, enum gr_lazy_state state)
{
	struct gr_lazy_status *status = &handler->shared->status;
	char line[400];

	status->filled_ns = gr_lazy_now_ns();
	if (state == GR_LAZY_FILLED) { /* objects that nobody shows any more */
		status->lost_bytes += status->total_bytes - status->done_bytes;
		status->done_bytes = status->total_bytes;
	}
	if (state == GR_LAZY_FAILED || state == GR_LAZY_ENDED)
		gr_lazy_kill_tree(handler->shared);
	if (state == GR_LAZY_FAILED) {
		snprintf(line, sizeof(line), "gpurestore: lazy restore: %s\n", status->message);
		gr_lazy_report(&handler->options, line);
	}
	if (state == GR_LAZY_FILLED) {
		write_record(handler);
		write_log(handler);
	}
	/* The keeper looks at the state when we are gone. */
	__atomic_store_n(&status->state, (int)state, __ATOMIC_RELEASE);
	tell(handler, GR_LAZY_END, state == GR_LAZY_FAILED, status->message);
	_exit(state == GR_LAZY_FAILED);
}

static void heed_threads(struct gr_lazy_handler *handler)
{
	uint64_t count;

	if (read(handler->ended, &count, sizeof(count)) < 0 && errno != EAGAIN)
		end(handler, GR_LAZY_FAILED);
	if (__atomic_load_n(&handler->failed, __ATOMIC_ACQUIRE))
		end(handler, GR_LAZY_FAILED);
	if (__atomic_load_n(&handler->filling, __ATOMIC_ACQUIRE) &&
	    __atomic_load_n(&handler->nr_live, __ATOMIC_ACQUIRE) == 0)
		end(handler, GR_LAZY_FILLED);
}

static void replace_keeper(struct gr_lazy_handler *handler)
{
	int pid;

	waitpid(handler->shared->status.keeper_pid, NULL, __WALL);
	close(handler->shared->keeper_pidfd);
	pid = gr_lazy_keeper_start(handler);
	if (pid < 0)
		gr_lazy_fail(handler, -pid, "starting the keeper again");
}

_Noreturn static void run(struct gr_lazy_handler *handler)
{
	for (;;) {
		struct pollfd fds[] = {
			{ handler->ended, POLLIN, 0 },
			{ handler->shared->keeper_pidfd, POLLIN, 0 },
			{ handler->shared->control, POLLIN, 0 },
		};

		if (poll(fds, 3, -1) < 0)
			continue;
		if (fds[0].revents)
			heed_threads(handler);
		if (fds[1].revents)
			replace_keeper(handler);
		if (fds[2].revents && !listen_to_main(handler)) {
			/* Before the release the tree is the main process's, and so is its end. */
			if (!handler->filling)
				end(handler, GR_LAZY_ENDED);
			int control = handler->shared->control;

			handler->shared->control = -1; /* the number may soon be another's */
			close(control);
		}
	}
}

static void ask_for_descriptors(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

static int prepare(struct gr_lazy_handler *handler)
{
	int ret;

	prctl(PR_SET_NAME, "gr-lazy-handler", 0, 0, 0);
	ask_for_descriptors();
	handler->max_record = handler->options.record_fd >= 0 ? MAX_RECORD : 0;
	handler->record = calloc(handler->max_record + 1, sizeof(*handler->record));
	handler->epoll = epoll_create1(EPOLL_CLOEXEC);
	handler->ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (chdir("/") < 0 || handler->epoll < 0 || handler->ended < 0)
		return -errno;
	if (!handler->record)
		return -ENOMEM;
	ret = gr_lazy_objects_open(handler);
	if (ret == 0)
		ret = gr_lazy_keeper_start(handler);
	return ret < 0 ? ret : start_threads(handler, gr_lazy_serve);
}

void gr_lazy_handle(struct gr_lazy_handler *handler)
{
	int ret = prepare(handler);

	handler->shared->status.handler_pid = getpid();
	tell(handler, GR_LAZY_READY, ret < 0 ? -ret : 0, "");
	if (ret < 0)
		_exit(1);
	run(handler);
}
