/* What a lazy restore knows from the images: where every page is stored, and the order in which pages are wanted. */
#include <stdlib.h>
#include <string.h>

#include "gr_lazy_internal.h"

static int reserve(struct gr_lazy_source *source, uint64_t *max, struct gr_error *err)
{
	uint64_t more = *max ? *max * 2 : 1024;
	struct gr_lazy_run *grown;

	if (source->nr_runs + 1 < *max)
		return 0;
	grown = realloc(source->runs, more * sizeof(*grown));
	if (!grown)
		return gr_fail(err, ENOMEM, "listing the pages of task %d", source->pid);
	source->runs = grown;
	*max = more;
	return 0;
}

/* The first range that ends behind `address`. */
static uint64_t find_range(const struct gr_lazy_span *ranges, uint64_t nr, uint64_t address)
{
	uint64_t low = 0, high = nr;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (ranges[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Take what lies in the ranges. `first` holds the number of pages until all runs are sorted. */
static int add_entry(struct gr_lazy_source *source, uint64_t *max, uint64_t start, uint64_t end, uint64_t offset,
		     uint32_t file, struct gr_error *err)
{
	uint64_t at = find_range(source->ranges, source->nr_ranges, start);

	for (; at < source->nr_ranges && source->ranges[at].start < end; at++) {
		uint64_t from = start > source->ranges[at].start ? start : source->ranges[at].start;
		uint64_t to = end < source->ranges[at].end ? end : source->ranges[at].end;

		if (reserve(source, max, err) < 0)
			return -err->code;
		source->runs[source->nr_runs++] = (struct gr_lazy_run){
			.vaddr = from, .offset = offset + (from - start), .first = (to - from) >> GR_PAGE_SHIFT, .file = file
		};
	}
	return 0;
}

static int by_address(const void *a, const void *b)
{
	const struct gr_lazy_run *left = a, *right = b;

	return left->vaddr < right->vaddr ? -1 : left->vaddr > right->vaddr;
}

/* Sort, join what belongs together, and number the pages. */
static int number_pages(struct gr_lazy_source *source, struct gr_error *err)
{
	uint64_t nr = 0, pages = 0;

	for (uint64_t i = 1; i < source->nr_runs; i++) {
		if (source->runs[i].vaddr < source->runs[i - 1].vaddr) {
			qsort(source->runs, source->nr_runs, sizeof(*source->runs), by_address);
			break;
		}
	}
	for (uint64_t i = 0; i < source->nr_runs; i++) {
		struct gr_lazy_run run = source->runs[i];
		struct gr_lazy_run *last = nr ? &source->runs[nr - 1] : NULL;
		uint64_t bytes = last ? (pages - last->first) << GR_PAGE_SHIFT : 0;
		uint64_t count = run.first;

		if (last && run.vaddr < last->vaddr + bytes)
			return gr_fail(err, EINVAL, "task %d has two contents for the page at %#lx", source->pid, run.vaddr);
		if (!last || run.vaddr != last->vaddr + bytes || run.offset != last->offset + bytes ||
		    run.file != last->file) {
			run.first = pages;
			source->runs[nr++] = run;
		}
		pages += count;
	}
	source->nr_runs = nr;
	source->nr_pages = pages;
	source->runs[nr] = (struct gr_lazy_run){ .vaddr = UINT64_MAX, .first = pages };
	return 0;
}

static int add_order(struct gr_lazy_source *source, const struct gr_lazy_task *task, struct gr_error *err)
{
	source->order = calloc(task->nr_order ? task->nr_order : 1, sizeof(*source->order));
	if (!source->order)
		return gr_fail(err, ENOMEM, "ordering the pages of task %d", task->pid);
	for (uint64_t i = 0; i < task->nr_order; i++) {
		uint64_t edges[2] = { task->order[i].start, task->order[i].end };

		for (int e = 0; e < 2; e++) {
			uint64_t run = gr_lazy_find_run(source, edges[e]);
			uint64_t index = source->runs[run].first;

			if (run < source->nr_runs && edges[e] > source->runs[run].vaddr)
				index += (edges[e] - source->runs[run].vaddr) >> GR_PAGE_SHIFT;
			edges[e] = index;
		}
		source->order[source->nr_order++] = (struct gr_lazy_pages){ edges[0], edges[1] };
	}
	source->nr_hot = task->nr_hot < task->nr_order ? task->nr_hot : task->nr_order;
	return 0;
}

static int by_start(const void *a, const void *b)
{
	const struct gr_lazy_segment *left = a, *right = b;

	return left->start < right->start ? -1 : left->start > right->start;
}

static int add_segments(struct gr_lazy_source *source, const struct gr_lazy_task *task, struct gr_error *err)
{
	struct gr_lazy_segment *segment;

	source->segments = calloc(task->nr_ranges + task->nr_views + 1, sizeof(*segment));
	if (!source->segments)
		return gr_fail(err, ENOMEM, "listing the mappings of %s", source->name);
	segment = source->segments;
	for (uint64_t i = 0; i < task->nr_ranges; i++)
		*segment++ = (struct gr_lazy_segment){ task->ranges[i].start, task->ranges[i].end, task->ranges[i].start, 0 };
	for (uint64_t i = 0; i < task->nr_views; i++)
		*segment++ = (struct gr_lazy_segment){ task->views[i].start, task->views[i].end, task->views[i].at,
						       task->views[i].object + 1 };
	source->nr_views = task->nr_views;
	source->nr_segments = task->nr_ranges + task->nr_views;
	qsort(source->segments, source->nr_segments, sizeof(*segment), by_start);
	return 0;
}

static int build(struct gr_lazy_source *source, const struct gr_lazy_task *task, struct gr_error *err)
{
	uint64_t max = 0;
	int ret;

	source->pid = task->pid;
	if (task->pid)
		snprintf(source->name, sizeof(source->name), "task %d", task->pid);
	else
		snprintf(source->name, sizeof(source->name), "shared memory %lu", task->shmid);
	source->fds = calloc(task->nr_fds ? task->nr_fds : 1, sizeof(int));
	source->ranges = calloc(task->nr_ranges ? task->nr_ranges : 1, sizeof(*source->ranges));
	if (!source->fds || !source->ranges)
		return gr_fail(err, ENOMEM, "listing the pages of task %d", task->pid);
	memcpy(source->fds, task->fds, task->nr_fds * sizeof(int));
	memcpy(source->ranges, task->ranges, task->nr_ranges * sizeof(*source->ranges));
	source->nr_fds = task->nr_fds;
	source->nr_ranges = task->nr_ranges;
	ret = add_segments(source, task, err);
	if (ret == 0)
		ret = reserve(source, &max, err);
	for (uint64_t i = 0; ret == 0 && i < task->nr_entries; i++) {
		uint64_t start = task->vaddrs[i], end = start + (task->nr_pages[i] << GR_PAGE_SHIFT);

		if (task->files[i] >= task->nr_fds)
			return gr_fail(err, EINVAL, "the pages of task %d at %#lx are in no file", task->pid, start);
		ret = add_entry(source, &max, start, end, task->page_offsets[i] << GR_PAGE_SHIFT, task->files[i], err);
	}
	if (ret == 0)
		ret = number_pages(source, err);
	if (ret == 0)
		ret = add_order(source, task, err);
	return ret;
}

int gr_lazy_source_create(const struct gr_lazy_task *task, struct gr_lazy_source **out, struct gr_error *err)
{
	struct gr_lazy_source *source = calloc(1, sizeof(*source));
	int ret;

	if (!source)
		return gr_fail(err, ENOMEM, "listing the pages of task %d", task->pid);
	ret = build(source, task, err);
	if (ret < 0)
		gr_lazy_source_destroy(source);
	else
		*out = source;
	return ret;
}

void gr_lazy_source_destroy(struct gr_lazy_source *source)
{
	if (!source)
		return;
	free(source->fds);
	free(source->ranges);
	free(source->segments);
	free(source->runs);
	free(source->order);
	free(source);
}

uint64_t gr_lazy_find_run(const struct gr_lazy_source *source, uint64_t address)
{
	uint64_t low = 0, high = source->nr_runs;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		const struct gr_lazy_run *run = &source->runs[middle];

		if (run->vaddr + (gr_lazy_run_pages(source, middle) << GR_PAGE_SHIFT) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

uint64_t gr_lazy_find_index(const struct gr_lazy_source *source, uint64_t index)
{
	uint64_t low = 0, high = source->nr_runs;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (source->runs[middle + 1].first <= index)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}
