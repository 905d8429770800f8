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

/* Neighbours come along: the block of 64 KiB around, or, behind the last fault, twice as much as then. */
static void widen(struct gr_lazy_mm *mm, struct answer *answer, uint64_t before, uint64_t after)
{
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

		answer.nr_pages = gr_lazy_at_most(gr_lazy_at_most(gap, room), FAULT_PAGES - (address >> GR_PAGE_SHIFT) % FAULT_PAGES);
		return answer;
	}
	into = (origin - source->runs[number].vaddr) >> GR_PAGE_SHIFT;
	answer.index = source->runs[number].first + into;
	if (gr_lazy_mm_is_done(mm, answer.index))
		return answer; /* it was there and has been given back since */
	answer.run = &source->runs[number];
	widen(mm, &answer, gr_lazy_at_most(into, (address - segment->start) >> GR_PAGE_SHIFT),
	      gr_lazy_at_most(gr_lazy_run_pages(source, number) - into, room));
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
static enum gr_lazy_outcome try_answer(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t address, int *code)
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
	if (!gr_lazy_read_pages(worker, mm->source, answer.run, answer.index, answer.nr_pages))
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

static void answer_fault(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, uint64_t address)
{
	int code = 0;

	while (!__atomic_load_n(&worker->handler->failed, __ATOMIC_RELAXED)) {
		enum gr_lazy_outcome outcome = try_answer(worker, mm, address, &code);

		if (!gr_lazy_again(worker, mm, outcome, code))
			return;
	}
}

void gr_lazy_answer_faults(struct gr_lazy_worker *worker)
{
	while (worker->nr_faults) {
		struct gr_lazy_fault fault = worker->faults[--worker->nr_faults];

		__atomic_store_n(&worker->handler->last_fault_ns, gr_lazy_now_ns(), __ATOMIC_RELAXED);
		answer_fault(worker, fault.mm, fault.address);
	}
}
