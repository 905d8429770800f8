/* Threads of the handler: those that take the kernel's messages, and what all of them share. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "gr_lazy_internal.h"

/* How many messages one thread takes at a time: the other threads shall have some, too. */
#define FEW_MESSAGES 4
#define MANY_MESSAGES 32
/* How long memory may be short before the tree is given up, in steps of 10 ms. */
#define ENOMEM_TRIES 500

void gr_lazy_nap_us(long us)
{
	struct timespec nap = { .tv_nsec = us * 1000 };

	nanosleep(&nap, NULL);
}

uint64_t gr_lazy_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000UL + (uint64_t)now.tv_nsec;
}

int gr_lazy_worker_open(struct gr_lazy_worker *worker, struct gr_lazy_handler *handler)
{
	void *buffer = mmap(NULL, GR_LAZY_WINDOW_PAGES << GR_PAGE_SHIFT, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*worker = (struct gr_lazy_worker){ .handler = handler, .buffer = buffer };
	if (buffer == MAP_FAILED) {
		gr_lazy_fail(handler, errno, "making a buffer");
		return -1;
	}
	return 0;
}

void gr_lazy_worker_close(struct gr_lazy_worker *worker)
{
	munmap(worker->buffer, GR_LAZY_WINDOW_PAGES << GR_PAGE_SHIFT);
	free(worker->faults);
}

/* ---- messages of the kernel */

static void add_fault(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t address, int tid)
{
	if (worker->nr_faults == worker->max_faults) {
		uint64_t more = worker->max_faults ? worker->max_faults * 2 : 64;
		struct gr_lazy_fault *grown = realloc(worker->faults, more * sizeof(*grown));

		if (!grown) {
			gr_lazy_fail(worker->handler, ENOMEM, "listing faults");
			return;
		}
		worker->faults = grown;
		worker->max_faults = more;
	}
	worker->faults[worker->nr_faults++] = (struct gr_lazy_fault){ mm, address & ~(GR_PAGE_BYTES - 1), tid };
}

/* A fork makes itself known by its first fault. */
static void know_pid(struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm, int tid)
{
	struct gr_lazy_watched *watched = &handler->shared->watched[mm->number];
	char path[64], text[1024], *line;
	GR_CLOSE int fd = -1;
	ssize_t size;

	if (watched->pid || tid <= 0)
		return;
	snprintf(path, sizeof(path), "/proc/%d/status", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (size <= 0)
		return;
	text[size] = '\0';
	line = strstr(text, "\nTgid:");
	if (!line)
		return;
	watched->pidfd = (int)syscall(SYS_pidfd_open, atoi(line + 6), 0);
	if (watched->pidfd >= 0)
		__atomic_store_n(&watched->pid, atoi(line + 6), __ATOMIC_RELEASE);
}

static void apply(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, const struct gr_lazy_advice *advice,
		  const struct uffd_msg *message)
{
	struct gr_lazy_handler *handler = worker->handler;
	int ret = 0;

	switch (message->event) {
	case UFFD_EVENT_PAGEFAULT:
		know_pid(handler, mm, (int)message->arg.pagefault.feat.ptid);
		add_fault(worker, mm, message->arg.pagefault.address, (int)message->arg.pagefault.feat.ptid);
		__atomic_fetch_add(&handler->shared->status.nr_faults, 1, __ATOMIC_RELAXED);
		return;
	case UFFD_EVENT_FORK:
		ret = gr_lazy_register(handler, mm->source, mm, (int)message->arg.fork.ufd, 0, NULL);
		break;
	case UFFD_EVENT_REMAP:
		ret = gr_lazy_mm_moved(mm, message->arg.remap.from, message->arg.remap.to, message->arg.remap.len);
		break;
	case UFFD_EVENT_REMOVE:
		gr_lazy_mm_removed(mm, message->arg.remove.start, message->arg.remove.end);
		ret = gr_lazy_views_removed(handler, mm, advice, message->arg.remove.start, message->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		ret = gr_lazy_mm_unmapped(mm, message->arg.remove.start, message->arg.remove.end);
		break;
	default:
		ret = -EPROTO;
	}
	if (ret < 0)
		gr_lazy_fail(handler, -ret, "following event %d of %s", message->event, mm->source->name);
}

/*
 * Take messages; events are applied at once, faults go to the worker's list. With `all`, until there are none: events
 * come behind faults. The lock is held meanwhile, so that no page is placed between an event and its consequences.
 * Returns how many there were.
 */
static uint64_t take_messages(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, bool all)
{
	struct uffd_msg messages[MANY_MESSAGES];
	struct gr_lazy_advice advice;
	size_t wanted = (all ? MANY_MESSAGES : FEW_MESSAGES) * sizeof(messages[0]);
	uint64_t taken = 0;

	pthread_rwlock_wrlock(mm->lock);
	while (mm->uffd >= 0) {
		ssize_t size;

		gr_lazy_note_advice(worker->handler, mm, &advice);
		size = read(mm->uffd, messages, wanted);
		if (size <= 0)
			break;
		for (size_t i = 0; i < (size_t)size / sizeof(messages[0]); i++, taken++)
			apply(worker, mm, &advice, &messages[i]);
		if (!all)
			break;
	}
	pthread_rwlock_unlock(mm->lock);
	if (gr_lazy_is_complete(worker->handler, mm))
		gr_lazy_finish(worker->handler, mm);
	return taken;
}

bool gr_lazy_again(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, enum gr_lazy_outcome outcome, int code)
{
	if (outcome != GR_LAZY_BROKEN)
		worker->short_of_memory = 0;
	switch (outcome) {
	case GR_LAZY_PLACED:
		if (gr_lazy_is_complete(worker->handler, mm))
			gr_lazy_finish(worker->handler, mm);
		return false;
	case GR_LAZY_CHANGING:
		/* An event is under way: it can be read once its system call is that far. */
		if (take_messages(worker, mm, true) == 0)
			gr_lazy_nap_us(20);
		return true;
	case GR_LAZY_GONE:
		gr_lazy_finish(worker->handler, mm);
		return false;
	default:
		if (code == ENOMEM && worker->short_of_memory++ < ENOMEM_TRIES) {
			gr_lazy_nap_us(10000);
			return true;
		}
		gr_lazy_fail(worker->handler, code, "placing pages of %s", mm->source->name);
		return false;
	}
}

void *gr_lazy_serve(void *opaque)
{
	struct gr_lazy_handler *handler = opaque;
	struct gr_lazy_worker worker;

	if (gr_lazy_worker_open(&worker, handler) < 0)
		return NULL;
	for (;;) {
		struct epoll_event event;
		struct gr_lazy_mm *mm;

		if (epoll_wait(handler->epoll, &event, 1, -1) != 1)
			continue;
		mm = handler->mms[event.data.u32];
		take_messages(&worker, mm, false);
		/* From now on another thread may take the next ones. */
		pthread_rwlock_rdlock(mm->lock);
		event.events = EPOLLIN | EPOLLONESHOT;
		if (mm->uffd >= 0)
			epoll_ctl(handler->epoll, EPOLL_CTL_MOD, mm->uffd, &event);
		pthread_rwlock_unlock(mm->lock);
		gr_lazy_answer_faults(&worker);
	}
	return NULL;
}
