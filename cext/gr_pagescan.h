#ifndef GR_PAGESCAN_H
#define GR_PAGESCAN_H

#include <stdint.h>
#include "gr_error.h"

/* Runs of pages, in ascending order; a run never reaches across two of the ranges that were asked for. */
struct gr_page_runs {
	uint64_t *vaddrs;
	uint64_t *nr_pages;
	uint64_t nr_runs;
	uint64_t capacity;
	uint64_t total_pages;
};

/*
 * What to look for. STORED: pages whose content only the task holds - present or swapped, not backed by a file, not
 * the shared zero page, not a guard. GUARD: pages that madvise(MADV_GUARD_INSTALL) made inaccessible.
 */
enum gr_scan_what { GR_SCAN_STORED, GR_SCAN_GUARD };

/* AUTO: the PAGEMAP_SCAN ioctl (Linux 6.7), else /proc/PID/pagemap. The others force one of the two, for tests. */
enum gr_scan_how { GR_SCAN_AUTO, GR_SCAN_IOCTL, GR_SCAN_READ };

/*
 * Scan nr_ranges page-aligned ranges [starts[i], ends[i]) of a frozen task. Untouched address space costs nothing with
 * the ioctl and 8 bytes read per page without. `cancel` is polled now and then. On success the caller owns `out`.
 */
int gr_pagescan(int pid, const uint64_t *starts, const uint64_t *ends, uint32_t nr_ranges, int what, int how,
		int *cancel, struct gr_page_runs *out, struct gr_error *err);
void gr_page_runs_destroy(struct gr_page_runs *runs);

#endif
