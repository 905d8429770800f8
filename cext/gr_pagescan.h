#ifndef GR_PAGESCAN_H
#define GR_PAGESCAN_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_runs.h"

/*
 * What to look for. STORED: pages whose content only the task holds - present or swapped, not backed by a file, not
 * the shared zero page, not a guard. GUARD: pages that madvise(MADV_GUARD_INSTALL) made inaccessible. HUGE: parts of a
 * transparent huge page that is mapped as one; without the ioctl none are found.
 */
enum gr_scan_what { GR_SCAN_STORED, GR_SCAN_GUARD, GR_SCAN_HUGE };

/* AUTO: the PAGEMAP_SCAN ioctl (Linux 6.7), else /proc/PID/pagemap. The others force one of the two, for tests. */
enum gr_scan_how { GR_SCAN_AUTO, GR_SCAN_IOCTL, GR_SCAN_READ };

/*
 * Scan nr_ranges page-aligned ranges [starts[i], ends[i]) of a frozen task. Untouched address space costs nothing with
 * the ioctl and 8 bytes read per page without. `cancel` is polled now and then. The caller owns `out`; a
 * run never reaches across two of the ranges.
 */
int gr_pagescan(int pid, const uint64_t *starts, const uint64_t *ends, uint32_t nr_ranges, int what, int how,
		int *cancel, struct gr_page_runs *out, struct gr_error *err);

#endif
