#ifndef GR_PAGES_OUT_H
#define GR_PAGES_OUT_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_runs.h"

/*
 * Where the pages are read: the memory of a frozen task, or (source_fd >= 0) a file, at the run's address as offset.
 * Pages that hold nothing but zeros are left out, except in the ranges `kept`: ascending, and each run within one or none.
 */
struct gr_pages_source {
	int pid;
	int source_fd;
	const uint64_t *kept_starts, *kept_ends;
	uint64_t nr_kept;
};

/* What one thread did. Times are CLOCK_MONOTONIC. */
struct gr_worker_times {
	uint64_t begin_ns, end_ns, bytes;
};

/* Where pages are written. fd may have O_DIRECT; then offset and the sizes of runs are multiples of whole pages anyway. */
struct gr_pages_target {
	int fd;
	uint64_t offset;
	uint32_t nr_threads;
	uint64_t crc64;	      /* result: checksum of what was written, see gr_crc64.h */
	uint64_t *done_bytes; /* may be NULL; grows as pages are written */
	struct gr_worker_times *times; /* result: of the first max_times threads, nr_times of them; may be NULL */
	uint32_t max_times, nr_times;
};

/*
 * Read the runs and write them one behind the other. `stored` are the runs that were written; none reaches across two
 * of `runs`. Every byte is written or an error names the address; then `stored` is empty. The threads are joined.
 * `cancel` (may be NULL) is polled for every chunk of at most 512 KiB; each thread holds one chunk.
 */
int gr_pages_out(const struct gr_pages_source *source, const struct gr_runs_view *runs, struct gr_pages_target *target,
		 int *cancel, struct gr_page_runs *stored, struct gr_error *err);

/*
 * Start to bring a part of a file to the disk, and with `wait` wait until it is there: so a long fsync is done in steps
 * between which one may change one's mind. It is no promise by itself, fsync is.
 */
int gr_pages_flush(int fd, uint64_t offset, uint64_t bytes, int wait, struct gr_error *err);

#endif
