#ifndef GR_PUMP_H
#define GR_PUMP_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_region.h"

/*
 * A queue of reads that fill memory from a pages file: cut into chunks of bounded size, whose destinations are vectors
 * and whose sources are contiguous in the file. Any number of threads may take chunks from one queue.
 */
struct gr_pump_queue;

/*
 * What an address range means to a pagemap entry. FILL: its pages are read. SKIP: they are in the file, but the kernel
 * gives them anew (vdso). REFUSE: nothing may be there.
 */
enum gr_pump_kind { GR_PUMP_FILL, GR_PUMP_SKIP, GR_PUMP_REFUSE };

/* The address ranges of a task, or the one range of an object: ascending, apart from each other, page-aligned. */
struct gr_pump_ranges {
	const uint64_t *starts;
	const uint64_t *ends;
	const uint8_t *kinds;
	uint8_t *touched; /* out: 1 where the queue writes into the range */
	uint64_t nr;
};

/* A pagemap as it was read from an image; nothing of it is trusted. */
struct gr_pump_pagemap {
	const uint64_t *vaddrs;
	const uint64_t *nr_pages;
	const uint32_t *flags; /* CRIU's PE_*: 1 in the parent image, 2 lazy, 4 present */
	uint64_t nr;
};

/*
 * Check every entry (ascending, inside the ranges, stored here and not in a parent image, inside a file of file_bytes)
 * and queue it. -EINVAL with the reason in `err` when an entry is wrong. The arrays are not needed afterwards.
 */
int gr_pump_queue_create(const struct gr_pump_pagemap *pagemap, const struct gr_pump_ranges *ranges,
			 uint64_t file_bytes, uint64_t chunk_bytes, struct gr_pump_queue **out, struct gr_error *err);
void gr_pump_queue_destroy(struct gr_pump_queue *queue);

uint64_t gr_pump_queue_total_bytes(const struct gr_pump_queue *queue);
uint64_t gr_pump_queue_done_bytes(const struct gr_pump_queue *queue);
uint64_t gr_pump_queue_nr_chunks(const struct gr_pump_queue *queue);

/*
 * Take chunks until the queue is empty and have the thread that serves `slot` in task `pid` read them into its own
 * memory from `pages_fd`, a descriptor of that task. One caller per slot; several slots may work on one queue.
 * `cancel` (may be NULL) is polled between batches of a few MiB.
 */
int gr_pump_run(struct gr_region *region, uint32_t slot, int pid, int pages_fd, struct gr_pump_queue *queue,
		int *cancel, struct gr_error *err);

/* The same for memory of this process: every address in the queue is relative to `base`. Threads are joined. */
int gr_pump_fill(struct gr_pump_queue *queue, uint64_t base, int pages_fd, uint32_t nr_threads, int *cancel,
		 struct gr_error *err);

#endif
