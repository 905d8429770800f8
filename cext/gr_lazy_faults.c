/* Answering faults: what belongs where a task has touched a page that is missing. */
#include "gr_lazy_internal.h"

#define FAULT_PAGES 16UL /* 64 KiB */

bool gr_lazy_read_pages(struct gr_lazy_worker *worker, const struct gr_lazy_source *source, const struct gr_lazy_run *run,
		       uint64_t index, uint64_t nr_pages)
{
	uint64_t offset = run->offset + ((index - run->first) << GR_PAGE_SHIFT), done = 0;
	uint64_t bytes = nr_pages << GR_PAGE_SHIFT;

	while (done < bytes) {
		ssize_t n = pread(source->fds[run->file], worker->buffer + done, bytes - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			gr_lazy_fail(worker->handler, n < 0 ? errno : EIO, "reading pages of %s at offset %lu of its "
				     "pages file", source->name, offset + done);
			return false;
		}
		done += (uint64_t)n;
	}
	return true;
}

/* What answers a fault: stored pages from `index` of `run` on, or zeros. */
struct answer {
	struct gr_lazy_mm *mm; /* that the pages belong to: the one with the fault, or an object that it shows */
	const struct gr_lazy_run *run; /* NULL: zeros, placed in the one with the fault */
	uint64_t address, index, nr_pages, generation;
	uint64_t woken, nr_woken; /* where the fault is, and how many pages behind that come with it */
};

/* Neighbours come along: the block of 64 KiB around, or, behind the last fault, twice as much as then. */
static void widen(struct answer *answer, uint64_t before, uint64_t after)
{
	struct gr_lazy_mm *mm = answer->mm;
	uint64_t block = (answer->address >> GR_PAGE_SHIFT) % FAULT_PAGES;

	if (answer->address == mm->window_end) {
		mm->window_pages = gr_lazy_at_most(mm->window_pages * 2, GR_LAZY_WINDOW_PAGES);
		answer->nr_pages = gr_lazy_at_most(mm->window_pages, after);
	} else {
		uint64_t back = gr_lazy_at_most(block, before);

		mm->window_pages = FAULT_PAGES;
		answer->nr_pages = back + gr_lazy_at_most(FAULT_PAGES - block, after);
		answer->address -= back << GR_PAGE_SHIFT;
		answer->index -= back;
	}
	mm->window_end = answer->address + (answer->nr_pages << GR_PAGE_SHIFT);
}

/* Find the page at `origin` of answer->mm; `room`: how many pages before and behind it may come along. */
static void find_page(struct answer *answer, uint64_t origin, uint64_t room_before, uint64_t room)
{
	const struct gr_lazy_source *source = answer->mm->source;
	uint64_t number = gr_lazy_find_run(source, origin), into;

	if (number >= source->nr_runs || source->runs[number].vaddr > origin) {
		/* Never written before the dump: as far as that goes, in this block. Shared memory has no page for nothing. */
		uint64_t gap = number < source->nr_runs ? (source->runs[number].vaddr - origin) >> GR_PAGE_SHIFT : room;
		uint64_t block = FAULT_PAGES - (answer->address >> GR_PAGE_SHIFT) % FAULT_PAGES;

		if (source->pid)
			answer->nr_pages = gr_lazy_at_most(gr_lazy_at_most(gap, room), block);
		return;
	}
	into = (origin - source->runs[number].vaddr) >> GR_PAGE_SHIFT;
	answer->index = source->runs[number].first + into;
	if (gr_lazy_mm_is_done(answer->mm, answer->index))
		return; /* it was there and has been given back since; or it came, and placing zeros fails and wakes */
	answer->run = &source->runs[number];
	widen(answer, gr_lazy_at_most(into, room_before), gr_lazy_at_most(gr_lazy_run_pages(source, number) - into, room));
}

static struct answer find_answer(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm, uint64_t address,
				 const struct gr_lazy_segment *found)
{
	const struct gr_lazy_segment *segment = gr_lazy_mm_at(mm, address);
	struct answer answer = { .mm = mm, .address = address, .nr_pages = 1, .generation = mm->generation };
	uint64_t before, room;

	if (!segment)
		segment = found;
	if (!segment)
		return answer;
	before = (address - segment->start) >> GR_PAGE_SHIFT;
	room = (segment->end - address) >> GR_PAGE_SHIFT;
	if (!segment->object) {
		find_page(&answer, segment->origin + (address - segment->start), before, room);
		return answer;
	}
	answer.mm = handler->objects[segment->object - 1].mm;
	answer.address = segment->origin + (address - segment->start);
	answer.woken = address;
	answer.nr_woken = room;
	if (answer.mm->uffd >= 0)
		find_page(&answer, answer.address, UINT64_MAX, UINT64_MAX);
	if (!answer.run)
		answer.address = address;
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

/* Place what was read for a fault. The lock is held. */
static enum gr_lazy_outcome place_answer(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm,
					 const struct answer *answer, int *code)
{
	enum gr_lazy_outcome outcome;

	if (answer->mm->uffd < 0) /* then all of the object came meanwhile */
		outcome = GR_LAZY_PLACED;
	else
		outcome = gr_lazy_mm_copy(answer->mm, answer->address, answer->index, answer->nr_pages, worker->buffer, code);
	if (answer->mm == mm) {
		record(worker->handler, mm, answer->run->vaddr + ((answer->index - answer->run->first) << GR_PAGE_SHIFT));
		return outcome;
	}
	record(worker->handler, mm, answer->woken);
	gr_lazy_mm_wake(mm, answer->woken, gr_lazy_at_most(answer->nr_pages, answer->nr_woken));
	return outcome;
}

/* One try; *code where the outcome is BROKEN. */
static enum gr_lazy_outcome try_answer(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t address,
				       const struct gr_lazy_segment *found, int *code)
{
	enum gr_lazy_outcome outcome = GR_LAZY_PLACED;
	struct answer answer;

	pthread_rwlock_rdlock(mm->lock);
	if (mm->uffd < 0)
		goto out;
	answer = find_answer(worker->handler, mm, address, found);
	if (!answer.run) {
		outcome = gr_lazy_mm_zero(mm, answer.address, answer.nr_pages, code);
		goto out;
	}
	/* Without the lock: a slow disk must not hold up who forks or unmaps. */
	pthread_rwlock_unlock(mm->lock);
	if (!gr_lazy_read_pages(worker, answer.mm->source, answer.run, answer.index, answer.nr_pages))
		return GR_LAZY_PLACED;
	pthread_rwlock_rdlock(mm->lock);
	if (mm->uffd < 0)
		goto out;
	if (mm->generation != answer.generation) {
		outcome = GR_LAZY_CHANGING;
		goto out;
	}
	outcome = place_answer(worker, mm, &answer, code);
out:
	pthread_rwlock_unlock(mm->lock);
	return outcome;
}

/* Whether no event told of this address, although it shows shared memory. */
static bool is_new_view(struct gr_lazy_worker *worker, const struct gr_lazy_fault *fault, struct gr_lazy_segment *found)
{
	struct gr_lazy_mm *mm = fault->mm;
	bool is_known;

	if (!mm->source->nr_views)
		return false;
	pthread_rwlock_rdlock(mm->lock);
	is_known = mm->uffd < 0 || gr_lazy_mm_at(mm, fault->address);
	pthread_rwlock_unlock(mm->lock);
	return !is_known && gr_lazy_find_view(worker->handler, fault->tid, fault->address, found);
}

static void answer_fault(struct gr_lazy_worker *worker, const struct gr_lazy_fault *fault)
{
	struct gr_lazy_segment found;
	bool is_new = is_new_view(worker, fault, &found);
	int code = 0;

	while (!__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		enum gr_lazy_outcome outcome = try_answer(worker, fault->mm, fault->address, is_new ? &found : NULL, &code);

		if (!gr_lazy_again(worker, fault->mm, outcome, code))
			return;
	}
}

void gr_lazy_answer_faults(struct gr_lazy_worker *worker)
{
	while (worker->nr_faults) {
		struct gr_lazy_fault fault = worker->faults[--worker->nr_faults];

		__atomic_store_n(&worker->handler->last_fault_ns, gr_lazy_now_ns(), __ATOMIC_RELAXED);
		answer_fault(worker, &fault);
	}
}
