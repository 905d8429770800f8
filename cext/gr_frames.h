#ifndef GR_FRAMES_H
#define GR_FRAMES_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_runs.h"

/*
 * Whether /proc/PID/pagemap shows us frame numbers: 1 or 0. Needs CAP_SYS_ADMIN in the first user namespace
 * (Documentation/admin-guide/mm/pagemap.rst).
 */
int gr_frames_visible(struct gr_error *err);

/*
 * The pages of `runs` that two frozen tasks hold in common, at the same address: the same frame, or the same place in
 * swap. Pages of files and of the page cache are nobody's own and do not count. Reads 8 bytes per page of each task;
 * `cancel` (may be NULL) is polled. A run of the result never reaches across two of `runs`. The caller owns `out`.
 */
int gr_frames_common(int pid, int other_pid, const struct gr_runs_view *runs, int *cancel, struct gr_page_runs *out,
		     struct gr_error *err);

#endif
