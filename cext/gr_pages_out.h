#ifndef GR_PAGES_OUT_H
#define GR_PAGES_OUT_H

#include <stdint.h>
#include "gr_error.h"

/* Where the pages are read: the memory of a frozen task, or (source_fd >= 0) a file, at the run's address as offset. */
struct gr_pages_source {
	int pid;
	int source_fd;
};

/*
 * Read the runs and write them one behind the other to out_fd, from out_offset on. Every byte is written or an error
 * names the address. nr_threads threads are used and joined. `cancel` (may be NULL) is polled for every chunk of at
 * most 2 MiB; `done_bytes` (may be NULL) grows as chunks are written.
 */
int gr_pages_out(const struct gr_pages_source *source, const uint64_t *vaddrs, const uint64_t *nr_pages,
		 uint64_t nr_runs, int out_fd, uint64_t out_offset, uint32_t nr_threads, int *cancel,
		 uint64_t *done_bytes, struct gr_error *err);

#endif
