/* The background: everything that nobody has touched yet, in the order of first need. */
#include <fcntl.h>

#include "gr_lazy_internal.h"

#define READ_AHEAD_BYTES (16UL << 20)

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
		*end = gr_lazy_at_most(span->end, mm->next_page + GR_LAZY_CHUNK_PAGES);
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
	return gr_lazy_at_most(stop, end) - index;
}

/* Place pages that were read, wherever they are now. */
static void place(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t run, uint64_t index, uint64_t nr_pages)
{
	const struct gr_lazy_source *source = mm->source;
	uint64_t at = 0;

	while (at < nr_pages && !__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		uint64_t address, room, nr = 1;
		enum gr_lazy_outcome outcome = GR_LAZY_PLACED;
		int code = 0;

		while (source->runs[run + 1].first <= index + at)
			run++;
		pthread_rwlock_rdlock(mm->lock);
		if (mm->uffd < 0) {
			pthread_rwlock_unlock(mm->lock);
			return;
		}
		if (gr_lazy_mm_where(mm, source->runs[run].vaddr + ((index + at - source->runs[run].first) << GR_PAGE_SHIFT),
				     &address, &room)) {
			nr = gr_lazy_at_most(nr_pages - at, gr_lazy_at_most(room >> GR_PAGE_SHIFT, source->runs[run + 1].first - index - at));
			outcome = gr_lazy_mm_copy(mm, address, index + at, nr, worker->buffer + (at << GR_PAGE_SHIFT), &code);
		} else {
			gr_lazy_mm_set_done(mm, index + at, 1);
		}
		pthread_rwlock_unlock(mm->lock);
		if (!gr_lazy_again(worker, mm, outcome, code))
			at += nr;
	}
}

static void bring_in(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t first, uint64_t end)
{
	const struct gr_lazy_source *source = mm->source;

	while (first < end && !__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		uint64_t run, nr = contiguous(source, first, gr_lazy_at_most(end, first + GR_LAZY_CHUNK_PAGES), &run);
		const struct gr_lazy_run *at = &source->runs[run];

		if (!gr_lazy_read_pages(worker, source, at, first, nr))
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

	if (offset % READ_AHEAD_BYTES / GR_PAGE_BYTES < GR_LAZY_CHUNK_PAGES)
		posix_fadvise(source->fds[run->file], (off_t)offset, 2 * READ_AHEAD_BYTES, POSIX_FADV_WILLNEED);
}

/* One chunk of some task; tasks take turns. */
static bool fill_some(struct gr_lazy_worker *worker)
{
	struct gr_lazy_handler *handler = worker->handler;
	uint32_t nr = __atomic_load_n(&handler->nr_mms, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < nr; i++) {
		struct gr_lazy_mm *mm = handler->mms[__atomic_fetch_add(&handler->turn, 1, __ATOMIC_RELAXED) % nr];
		uint64_t first, end;
		bool found = false, is_complete;

		pthread_rwlock_rdlock(mm->lock);
		if (mm->uffd >= 0)
			found = take_pages(mm, &first, &end);
		is_complete = !found && mm->uffd >= 0 && gr_lazy_is_complete(handler, mm);
		pthread_rwlock_unlock(mm->lock);
		if (is_complete) /* since shared memory is, or from birth on */
			gr_lazy_finish(handler, mm);
		if (found) {
			read_ahead(mm->source, first);
			bring_in(worker, mm, first, end);
			return true;
		}
	}
	return false;
}

void gr_lazy_fill_hot(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm)
{
	struct gr_lazy_worker worker;

	if (gr_lazy_worker_open(&worker, handler) < 0)
		return;
	for (uint64_t i = 0; i < mm->source->nr_hot; i++)
		bring_in(&worker, mm, mm->source->order[i].first, mm->source->order[i].end);
	gr_lazy_answer_faults(&worker);
	gr_lazy_worker_close(&worker);
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
	struct gr_lazy_worker worker;

	if (gr_lazy_worker_open(&worker, handler) < 0)
		return NULL;
	while (is_busy(handler))
		gr_lazy_nap_us(10000);
	while (!__atomic_load_n(&handler->failed, __ATOMIC_RELAXED)) {
		if (!fill_some(&worker))
			gr_lazy_nap_us(1000);
		gr_lazy_answer_faults(&worker);
	}
	return NULL;
}
