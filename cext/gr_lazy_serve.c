/* Threads of the handler: some answer faults and follow events, others fill in the background. */
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
#define FAULT_PAGES 16UL /* 64 KiB */
#define READ_AHEAD_BYTES (16UL << 20)
/* How long memory may be short before the tree is given up, in steps of 10 ms. */
#define ENOMEM_TRIES 500

struct fault {
	struct gr_lazy_mm *mm;
	uint64_t address;
};

struct worker {
	struct gr_lazy_handler *handler;
	char *buffer; /* GR_LAZY_WINDOW_PAGES */
	struct fault *faults; /* taken from the kernel, not answered yet */
	uint64_t nr_faults, max_faults;
	int short_of_memory; /* how often in a row */
};

static void nap_us(long us)
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

/* ---- messages of the kernel */

static void add_fault(struct worker *worker, struct gr_lazy_mm *mm, uint64_t address)
{
	if (worker->nr_faults == worker->max_faults) {
		uint64_t more = worker->max_faults ? worker->max_faults * 2 : 64;
		struct fault *grown = realloc(worker->faults, more * sizeof(*grown));

		if (!grown) {
			gr_lazy_fail(worker->handler, ENOMEM, "listing faults");
			return;
		}
		worker->faults = grown;
		worker->max_faults = more;
	}
	worker->faults[worker->nr_faults++] = (struct fault){ mm, address & ~(GR_PAGE - 1) };
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

static void apply(struct worker *worker, struct gr_lazy_mm *mm, const struct uffd_msg *message)
{
	struct gr_lazy_handler *handler = worker->handler;
	int ret = 0;

	switch (message->event) {
	case UFFD_EVENT_PAGEFAULT:
		know_pid(handler, mm, (int)message->arg.pagefault.feat.ptid);
		add_fault(worker, mm, message->arg.pagefault.address);
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
		break;
	case UFFD_EVENT_UNMAP:
		ret = gr_lazy_mm_unmapped(mm, message->arg.remove.start, message->arg.remove.end);
		break;
	default:
		ret = -EPROTO;
	}
	if (ret < 0)
		gr_lazy_fail(handler, -ret, "following event %d of task %d", message->event, mm->source->pid);
}

/*
 * Take messages; events are applied at once, faults go to the worker's list. With `all`, until there are none: events
 * come behind faults. The lock is held meanwhile, so that no page is placed between an event and its consequences.
 * Returns how many there were.
 */
static uint64_t take_messages(struct worker *worker, struct gr_lazy_mm *mm, bool all)
{
	struct uffd_msg messages[MANY_MESSAGES];
	size_t wanted = (all ? MANY_MESSAGES : FEW_MESSAGES) * sizeof(messages[0]);
	uint64_t taken = 0;

	pthread_rwlock_wrlock(&mm->lock);
	while (mm->uffd >= 0) {
		ssize_t size = read(mm->uffd, messages, wanted);

		if (size <= 0)
			break;
		for (size_t i = 0; i < (size_t)size / sizeof(messages[0]); i++, taken++)
			apply(worker, mm, &messages[i]);
		if (!all)
			break;
	}
	pthread_rwlock_unlock(&mm->lock);
	if (__atomic_load_n(&mm->remaining, __ATOMIC_ACQUIRE) == 0)
		gr_lazy_finish(worker->handler, mm);
	return taken;
}

/* What is to be done after pages were placed, or were not; the lock is not held. True: try again. */
static bool again(struct worker *worker, struct gr_lazy_mm *mm, enum gr_lazy_outcome outcome, int code)
{
	if (outcome != GR_LAZY_BROKEN)
		worker->short_of_memory = 0;
	switch (outcome) {
	case GR_LAZY_PLACED:
		if (__atomic_load_n(&mm->remaining, __ATOMIC_ACQUIRE) == 0)
			gr_lazy_finish(worker->handler, mm);
		return false;
	case GR_LAZY_CHANGING:
		/* An event is under way: it can be read once its system call is that far. */
		if (take_messages(worker, mm, true) == 0)
			nap_us(20);
		return true;
	case GR_LAZY_GONE:
		gr_lazy_finish(worker->handler, mm);
		return false;
	default:
		if (code == ENOMEM && worker->short_of_memory++ < ENOMEM_TRIES) {
			nap_us(10000);
			return true;
		}
		gr_lazy_fail(worker->handler, code, "placing pages of task %d", mm->source->pid);
		return false;
	}
}

/* ---- pages */

/* Whole pages from the file, or the tree is given up. */
static bool read_pages(struct worker *worker, const struct gr_lazy_source *source, const struct gr_lazy_run *run,
		       uint64_t index, uint64_t nr_pages)
{
	uint64_t offset = run->offset + ((index - run->first) << GR_PAGE_SHIFT), done = 0;
	uint64_t bytes = nr_pages << GR_PAGE_SHIFT;

	while (done < bytes) {
		ssize_t n = pread(source->fds[run->file], worker->buffer + done, bytes - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			gr_lazy_fail(worker->handler, n < 0 ? errno : EIO, "reading pages of task %d at offset %lu of its "
				     "pages file", source->pid, offset + done);
			return false;
		}
		done += (uint64_t)n;
	}
	return true;
}

/* What answers a fault: stored pages from `index` of `run` on, or zeros. */
struct answer {
	const struct gr_lazy_run *run; /* NULL: zeros */
	uint64_t address, index, nr_pages, generation;
};

static uint64_t at_most(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Neighbours come along: the block of 64 KiB around, or, behind the last fault, twice as much as then. */
static void widen(struct gr_lazy_mm *mm, struct answer *answer, uint64_t before, uint64_t after)
{
	uint64_t block = (answer->address >> GR_PAGE_SHIFT) % FAULT_PAGES;

	if (answer->address == mm->window_end) {
		mm->window_pages = at_most(mm->window_pages * 2, GR_LAZY_WINDOW_PAGES);
		answer->nr_pages = at_most(mm->window_pages, after);
	} else {
		uint64_t back = at_most(block, before);

		mm->window_pages = FAULT_PAGES;
		answer->nr_pages = back + at_most(FAULT_PAGES - block, after);
		answer->address -= back << GR_PAGE_SHIFT;
		answer->index -= back;
	}
	mm->window_end = answer->address + (answer->nr_pages << GR_PAGE_SHIFT);
}

static struct answer find_answer(struct gr_lazy_mm *mm, uint64_t address)
{
	const struct gr_lazy_source *source = mm->source;
	const struct gr_lazy_segment *segment = gr_lazy_mm_at(mm, address);
	struct answer answer = { .address = address, .nr_pages = 1, .generation = mm->generation };
	uint64_t origin, number, into, room;

	if (!segment)
		return answer;
	origin = segment->origin + (address - segment->start);
	number = gr_lazy_find_run(source, origin);
	room = (segment->end - address) >> GR_PAGE_SHIFT;
	if (number >= source->nr_runs || source->runs[number].vaddr > origin) {
		/* Never written before the dump: as far as that goes, in this block. */
		uint64_t gap = number < source->nr_runs ? (source->runs[number].vaddr - origin) >> GR_PAGE_SHIFT : room;

		answer.nr_pages = at_most(at_most(gap, room), FAULT_PAGES - (address >> GR_PAGE_SHIFT) % FAULT_PAGES);
		return answer;
	}
	into = (origin - source->runs[number].vaddr) >> GR_PAGE_SHIFT;
	answer.index = source->runs[number].first + into;
	if (gr_lazy_mm_is_done(mm, answer.index))
		return answer; /* it was there and has been given back since */
	answer.run = &source->runs[number];
	widen(mm, &answer, at_most(into, (address - segment->start) >> GR_PAGE_SHIFT),
	      at_most(gr_lazy_run_pages(source, number) - into, room));
	return answer;
}

static void record(struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm, uint64_t origin)
{
	if (handler->options.record_fd < 0)
		return;
	pthread_mutex_lock(&handler->record_lock);
	if (handler->nr_record < handler->max_record) {
		handler->record[handler->nr_record].pid = mm->source->pid;
		handler->record[handler->nr_record++].address = origin;
	}
	pthread_mutex_unlock(&handler->record_lock);
}

/* One try; *code where the outcome is BROKEN. */
static enum gr_lazy_outcome try_answer(struct worker *worker, struct gr_lazy_mm *mm, uint64_t address, int *code)
{
	enum gr_lazy_outcome outcome = GR_LAZY_PLACED;
	struct answer answer;

	pthread_rwlock_rdlock(&mm->lock);
	if (mm->uffd < 0)
		goto out;
	answer = find_answer(mm, address);
	if (!answer.run) {
		outcome = gr_lazy_mm_zero(mm, answer.address, answer.nr_pages, code);
		goto out;
	}
	/* Without the lock: a slow disk must not hold up who forks or unmaps. */
	pthread_rwlock_unlock(&mm->lock);
	if (!read_pages(worker, mm->source, answer.run, answer.index, answer.nr_pages))
		return GR_LAZY_PLACED;
	pthread_rwlock_rdlock(&mm->lock);
	if (mm->uffd < 0)
		goto out;
	if (mm->generation != answer.generation) {
		outcome = GR_LAZY_CHANGING;
		goto out;
	}
	outcome = gr_lazy_mm_copy(mm, answer.address, answer.index, answer.nr_pages, worker->buffer, code);
	record(worker->handler, mm, answer.run->vaddr + ((answer.index - answer.run->first) << GR_PAGE_SHIFT));
out:
	pthread_rwlock_unlock(&mm->lock);
	return outcome;
}

static void answer_fault(struct worker *worker, struct gr_lazy_mm *mm, uint64_t address)
{
	int code = 0;

	while (!__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		enum gr_lazy_outcome outcome = try_answer(worker, mm, address, &code);

		if (!again(worker, mm, outcome, code))
			return;
	}
}

static void answer_faults(struct worker *worker)
{
	while (worker->nr_faults) {
		struct fault fault = worker->faults[--worker->nr_faults];

		__atomic_store_n(&worker->handler->last_fault_ns, gr_lazy_now_ns(), __ATOMIC_RELAXED);
		answer_fault(worker, fault.mm, fault.address);
	}
}

/* ---- background */

/* The next pages that nobody has taken, in the order of first need. */
static bool take_pages(struct gr_lazy_mm *mm, uint64_t *first, uint64_t *end)
{
	const struct gr_lazy_source *source = mm->source;
	bool found = false;

	pthread_mutex_lock(&mm->order_lock);
	while (!found && mm->next_span < source->nr_order) {
		const struct gr_lazy_pages *span = &source->order[mm->next_span];

		if (mm->next_page < span->first || mm->next_page > span->end)
			mm->next_page = span->first;
		while (mm->next_page < span->end && gr_lazy_mm_is_done(mm, mm->next_page))
			mm->next_page++;
		*first = mm->next_page;
		*end = at_most(span->end, mm->next_page + GR_LAZY_CHUNK_PAGES);
		found = *first < *end;
		mm->next_page = *end;
		if (!found) {
			mm->next_span++;
			mm->next_page = 0;
		}
	}
	pthread_mutex_unlock(&mm->order_lock);
	return found;
}

/* How many pages from `index` on lie one behind the other in one file. */
static uint64_t contiguous(const struct gr_lazy_source *source, uint64_t index, uint64_t end, uint64_t *run)
{
	uint64_t stop, at = gr_lazy_find_index(source, index);

	*run = at;
	for (stop = source->runs[at + 1].first; stop < end && at + 1 < source->nr_runs; stop = source->runs[at + 1].first) {
		const struct gr_lazy_run *here = &source->runs[at], *next = &source->runs[at + 1];

		if (next->file != here->file || next->offset != here->offset + ((next->first - here->first) << GR_PAGE_SHIFT))
			break;
		at++;
	}
	return at_most(stop, end) - index;
}

/* Place pages that were read, wherever they are now. */
static void place(struct worker *worker, struct gr_lazy_mm *mm, uint64_t run, uint64_t index, uint64_t nr_pages)
{
	const struct gr_lazy_source *source = mm->source;
	uint64_t at = 0;

	while (at < nr_pages && !__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		uint64_t address, room, nr = 1;
		enum gr_lazy_outcome outcome = GR_LAZY_PLACED;
		int code = 0;

		while (source->runs[run + 1].first <= index + at)
			run++;
		pthread_rwlock_rdlock(&mm->lock);
		if (mm->uffd < 0) {
			pthread_rwlock_unlock(&mm->lock);
			return;
		}
		if (gr_lazy_mm_where(mm, source->runs[run].vaddr + ((index + at - source->runs[run].first) << GR_PAGE_SHIFT),
				     &address, &room)) {
			nr = at_most(nr_pages - at, at_most(room >> GR_PAGE_SHIFT, source->runs[run + 1].first - index - at));
			outcome = gr_lazy_mm_copy(mm, address, index + at, nr, worker->buffer + (at << GR_PAGE_SHIFT), &code);
		} else {
			gr_lazy_mm_set_done(mm, index + at, 1);
		}
		pthread_rwlock_unlock(&mm->lock);
		if (!again(worker, mm, outcome, code))
			at += nr;
	}
}

static void bring_in(struct worker *worker, struct gr_lazy_mm *mm, uint64_t first, uint64_t end)
{
	const struct gr_lazy_source *source = mm->source;

	while (first < end && !__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		uint64_t run, nr = contiguous(source, first, at_most(end, first + GR_LAZY_CHUNK_PAGES), &run);
		const struct gr_lazy_run *at = &source->runs[run];

		if (!read_pages(worker, source, at, first, nr))
			return;
		place(worker, mm, run, first, nr);
		first += nr;
	}
}

/* Let the disk work ahead; costs next to nothing where the pages are in the page cache. */
static void read_ahead(const struct gr_lazy_source *source, uint64_t index)
{
	const struct gr_lazy_run *run = &source->runs[gr_lazy_find_index(source, index)];
	uint64_t offset = run->offset + ((index - run->first) << GR_PAGE_SHIFT);

	if (offset % READ_AHEAD_BYTES / GR_PAGE < GR_LAZY_CHUNK_PAGES)
		posix_fadvise(source->fds[run->file], (off_t)offset, 2 * READ_AHEAD_BYTES, POSIX_FADV_WILLNEED);
}

/* One chunk of some task; tasks take turns. */
static bool fill_some(struct worker *worker)
{
	struct gr_lazy_handler *handler = worker->handler;
	uint32_t nr = __atomic_load_n(&handler->nr_mms, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < nr; i++) {
		struct gr_lazy_mm *mm = handler->mms[__atomic_fetch_add(&handler->turn, 1, __ATOMIC_RELAXED) % nr];
		uint64_t first, end;
		bool found = false;

		pthread_rwlock_rdlock(&mm->lock);
		if (mm->uffd >= 0)
			found = take_pages(mm, &first, &end);
		pthread_rwlock_unlock(&mm->lock);
		if (found) {
			read_ahead(mm->source, first);
			bring_in(worker, mm, first, end);
			return true;
		}
	}
	return false;
}

static int open_worker(struct worker *worker, struct gr_lazy_handler *handler)
{
	void *buffer = mmap(NULL, GR_LAZY_WINDOW_PAGES << GR_PAGE_SHIFT, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*worker = (struct worker){ .handler = handler, .buffer = buffer };
	if (buffer == MAP_FAILED) {
		gr_lazy_fail(handler, errno, "making a buffer");
		return -1;
	}
	return 0;
}

void gr_lazy_fill_hot(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm)
{
	struct worker worker;

	if (open_worker(&worker, handler) < 0)
		return;
	for (uint64_t i = 0; i < mm->source->nr_hot; i++)
		bring_in(&worker, mm, mm->source->order[i].first, mm->source->order[i].end);
	answer_faults(&worker);
	munmap(worker.buffer, GR_LAZY_WINDOW_PAGES << GR_PAGE_SHIFT);
	free(worker.faults);
}

/* Whether faults come so often that the fill should wait. */
static bool is_busy(struct gr_lazy_handler *handler)
{
	uint64_t wait_ns = handler->options.wait_for_ms * 1000000UL;
	uint64_t last = __atomic_load_n(&handler->last_fault_ns, __ATOMIC_RELAXED);

	return wait_ns && gr_lazy_now_ns() - last < wait_ns;
}

void *gr_lazy_fill(void *opaque)
{
	struct gr_lazy_handler *handler = opaque;
	struct worker worker;

	if (open_worker(&worker, handler) < 0)
		return NULL;
	while (is_busy(handler))
		nap_us(10000);
	while (!__atomic_load_n(&handler->failed, __ATOMIC_RELAXED)) {
		if (!fill_some(&worker))
			nap_us(1000);
		answer_faults(&worker);
	}
	return NULL;
}

void *gr_lazy_serve(void *opaque)
{
	struct gr_lazy_handler *handler = opaque;
	struct worker worker;

	if (open_worker(&worker, handler) < 0)
		return NULL;
	for (;;) {
		struct epoll_event event;
		struct gr_lazy_mm *mm;

		if (epoll_wait(handler->epoll, &event, 1, -1) != 1)
			continue;
		mm = handler->mms[event.data.u32];
		take_messages(&worker, mm, false);
		/* From now on another thread may take the next ones. */
		pthread_rwlock_rdlock(&mm->lock);
		event.events = EPOLLIN | EPOLLONESHOT;
		if (mm->uffd >= 0)
			epoll_ctl(handler->epoll, EPOLL_CTL_MOD, mm->uffd, &event);
		pthread_rwlock_unlock(&mm->lock);
		answer_faults(&worker);
	}
	return NULL;
}
