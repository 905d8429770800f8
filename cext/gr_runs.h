#ifndef GR_RUNS_H
#define GR_RUNS_H

#include <stdint.h>
#include "gr_error.h"

/* Runs of pages, in ascending order, apart from each other. The owner destroys them. */
struct gr_page_runs {
	uint64_t *vaddrs;
	uint64_t *nr_pages;
	uint64_t nr_runs;
	uint64_t capacity;
	uint64_t total_pages;
};

/* The same, somebody else's. */
struct gr_runs_view {
	const uint64_t *vaddrs;
	const uint64_t *nr_pages;
	uint64_t nr_runs;
};

/* Append [start, end). It is joined with the run before if that ends at `start` and begins at `floor` or above. */
int gr_page_runs_add(struct gr_page_runs *runs, uint64_t floor, uint64_t start, uint64_t end, struct gr_error *err);
void gr_page_runs_destroy(struct gr_page_runs *runs);

/* AND: pages of both. MINUS: pages of `a` that `b` lacks. OR: pages of either. */
enum gr_runs_op { GR_RUNS_AND, GR_RUNS_MINUS, GR_RUNS_OR };

/*
 * Combine two ascending lists in one pass; -EINVAL if one is not ascending. A run of the result of AND and MINUS never
 * reaches across two runs of `a`, even where these touch; OR joins whatever touches.
 */
int gr_page_runs_combine(const struct gr_runs_view *a, const struct gr_runs_view *b, int op, struct gr_page_runs *out,
			 struct gr_error *err);

#endif
