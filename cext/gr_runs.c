#include <stdlib.h>
#include <string.h>

#include "gr_internal.h"
#include "gr_runs.h"

static int grow(struct gr_page_runs *runs, struct gr_error *err)
{
	uint64_t capacity = runs->capacity ? runs->capacity * 2 : 256;
	uint64_t *vaddrs = realloc(runs->vaddrs, capacity * sizeof(*vaddrs));
	uint64_t *nr_pages;

	if (!vaddrs)
		return gr_fail(err, ENOMEM, "listing pages");
	runs->vaddrs = vaddrs;
	nr_pages = realloc(runs->nr_pages, capacity * sizeof(*nr_pages));
	if (!nr_pages)
		return gr_fail(err, ENOMEM, "listing pages");
	runs->nr_pages = nr_pages;
	runs->capacity = capacity;
	return 0;
}

int gr_page_runs_add(struct gr_page_runs *runs, uint64_t floor, uint64_t start, uint64_t end, struct gr_error *err)
{
	uint64_t pages = (end - start) / GR_PAGE_BYTES;
	uint64_t last = runs->nr_runs - 1;

	runs->total_pages += pages;
	if (runs->nr_runs && runs->vaddrs[last] >= floor &&
	    runs->vaddrs[last] + runs->nr_pages[last] * GR_PAGE_BYTES == start) {
		runs->nr_pages[last] += pages;
		return 0;
	}
	if (runs->nr_runs == runs->capacity) {
		int ret = grow(runs, err);

		if (ret < 0)
			return ret;
	}
	runs->vaddrs[runs->nr_runs] = start;
	runs->nr_pages[runs->nr_runs++] = pages;
	return 0;
}

void gr_page_runs_destroy(struct gr_page_runs *runs)
{
	free(runs->vaddrs);
	free(runs->nr_pages);
	memset(runs, 0, sizeof(*runs));
}

static uint64_t end_of(const struct gr_runs_view *runs, uint64_t i)
{
	return runs->vaddrs[i] + runs->nr_pages[i] * GR_PAGE_BYTES;
}

static int check(const struct gr_runs_view *runs, struct gr_error *err)
{
	for (uint64_t i = 0; i < runs->nr_runs; i++) {
		if (!runs->nr_pages[i] || runs->nr_pages[i] > (UINT64_MAX - runs->vaddrs[i]) / GR_PAGE_BYTES)
			return gr_fail(err, EINVAL, "a run of %lu pages at %#lx", runs->nr_pages[i], runs->vaddrs[i]);
		if (i && runs->vaddrs[i] < end_of(runs, i - 1))
			return gr_fail(err, EINVAL, "runs of pages are out of order at %#lx", runs->vaddrs[i]);
	}
	return 0;
}

/* What `b` has, or lacks, of [start, end). *at: the first run of `b` that may matter, now and later. */
static int cut(const struct gr_runs_view *b, uint64_t *at, uint64_t start, uint64_t end, int op,
	       struct gr_page_runs *out, struct gr_error *err)
{
	uint64_t from = start;
	int ret = 0;

	while (*at < b->nr_runs && end_of(b, *at) <= start)
		++*at;
	for (uint64_t i = *at; i < b->nr_runs && b->vaddrs[i] < end && ret == 0; i++) {
		uint64_t low = b->vaddrs[i] > start ? b->vaddrs[i] : start;
		uint64_t high = end_of(b, i) < end ? end_of(b, i) : end;

		if (op == GR_RUNS_AND)
			ret = gr_page_runs_add(out, start, low, high, err);
		else if (low > from)
			ret = gr_page_runs_add(out, start, from, low, err);
		from = high;
		*at = i; /* it may reach into the next range */
	}
	if (ret == 0 && op == GR_RUNS_MINUS && from < end)
		ret = gr_page_runs_add(out, start, from, end, err);
	return ret;
}

static int unite(const struct gr_runs_view *a, const struct gr_runs_view *b, struct gr_page_runs *out,
		 struct gr_error *err)
{
	uint64_t i = 0, j = 0, done = 0;
	int ret = 0;

	while ((i < a->nr_runs || j < b->nr_runs) && ret == 0) {
		int first = j == b->nr_runs || (i < a->nr_runs && a->vaddrs[i] <= b->vaddrs[j]);
		const struct gr_runs_view *next = first ? a : b;
		uint64_t at = first ? i++ : j++;
		uint64_t start = next->vaddrs[at] > done ? next->vaddrs[at] : done;

		if (start < end_of(next, at)) {
			done = end_of(next, at);
			ret = gr_page_runs_add(out, 0, start, done, err);
		}
	}
	return ret;
}

int gr_page_runs_combine(const struct gr_runs_view *a, const struct gr_runs_view *b, int op, struct gr_page_runs *out,
			 struct gr_error *err)
{
	uint64_t at = 0;
	int ret = check(a, err);

	memset(out, 0, sizeof(*out));
	if (ret == 0)
		ret = check(b, err);
	if (ret == 0 && op == GR_RUNS_OR)
		ret = unite(a, b, out, err);
	for (uint64_t i = 0; i < a->nr_runs && ret == 0 && op != GR_RUNS_OR; i++)
		ret = cut(b, &at, a->vaddrs[i], end_of(a, i), op, out, err);
	if (ret < 0)
		gr_page_runs_destroy(out);
	return ret;
}
