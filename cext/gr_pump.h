#ifndef GR_PUMP_H
#define GR_PUMP_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_placing.h"
#include "gr_region.h"

/*
 * A queue of reads that fill memory from a pages file: cut into chunks of bounded size, whose destinations are vectors
 * and whose sources are contiguous in the file. Any number of threads may take chunks from one queue.
 *
 * A chunk is plain - its reads go to where the pages belong - or *huge*: whole 2 MiB blocks that are to become huge
 * pages. Where the pages belong huge pages cannot be asked for without leaving a flag on the mapping. So a huge chunk is
 * read into a staging mapping that has the flag, and its page tables are moved over by userfaultfd (UFFDIO_MOVE).
 */
struct gr_pump_queue;

/* Room for the largest huge chunk; every worker has a staging mapping of its own, aligned to 2 MiB. */
enum { GR_PUMP_STAGING_BYTES = 4194304 };

/*
 * What an address range means to a pagemap entry. FILL: its pages are read. FILL_EMPTY: the same, and as there is no page
 * yet, they may be placed as whole pages. FILL_HUGE: the same, and blocks may become huge pages. SKIP: they are in the
 * file, but the kernel gives them anew (vdso). REFUSE: nothing may be there.
 */
enum gr_pump_kind { GR_PUMP_FILL, GR_PUMP_SKIP, GR_PUMP_REFUSE, GR_PUMP_FILL_HUGE, GR_PUMP_FILL_EMPTY };

/* What a queue does with a range, bits of `touched`: it writes there, moves huge pages there, places small ones there. */
enum gr_pump_touch { GR_PUMP_WRITTEN = 1, GR_PUMP_MOVED = 2, GR_PUMP_PLACED = 4 };

/* The address ranges of a task, or the one range of an object: ascending, apart from each other, page-aligned. */
struct gr_pump_ranges {
	const uint64_t *starts;
	const uint64_t *ends;
	const uint8_t *kinds;
	uint8_t *touched; /* out: bits of enum gr_pump_touch */
	uint64_t nr;
};

/*
 * Which 2 MiB blocks inside FILL_HUGE ranges become huge pages: those in which at least min_pages are stored and, if
 * `starts` is not NULL, that lie inside one of the nr ranges [starts[i], ends[i]), ascending and apart.
 */
struct gr_pump_huge {
	const uint64_t *starts;
	const uint64_t *ends;
	uint64_t nr;
	uint64_t min_pages;
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
			 const struct gr_pump_huge *huge, uint64_t file_bytes, uint64_t chunk_bytes,
			 struct gr_pump_queue **out, struct gr_error *err);
void gr_pump_queue_destroy(struct gr_pump_queue *queue);

/* What a queue holds and what became of it so far. Bytes are those of stored pages. */
struct gr_pump_counts {
	uint64_t total_bytes;
	uint64_t huge_bytes; /* of total_bytes: in chunks that are to become huge pages */
	uint64_t nr_chunks;
	uint64_t done_bytes;
	uint64_t moved_bytes;  /* of done_bytes: that came to their place by UFFDIO_MOVE, or through a huge mapping */
	uint64_t direct_bytes; /* of done_bytes: that were read past the page cache */
	uint64_t placed_bytes; /* of done_bytes: that were placed as whole pages */
};
void gr_pump_queue_counts(const struct gr_pump_queue *queue, struct gr_pump_counts *out);

/* A pages file. The numbers are alike in this process and in the task. */
struct gr_pump_source {
	int fd;
	int direct_fd;     /* the same file with O_DIRECT, for chunks that are not in the page cache; or -1 */
	int always_direct; /* for all others as well */
};

/* A thread of a task that takes part. */
struct gr_pump_worker {
	uint32_t slot;
	int pid;
	int uffd;         /* the task's, all ranges that are MOVED registered; or -1: nothing is moved */
	uint32_t reserved;
	uint64_t staging; /* address of its staging mapping */
	const struct gr_placing *placing; /* of the task, all ranges that are PLACED registered; or NULL: nothing is placed */
};

/*
 * Take chunks until the queue is empty, and place their pages, or have the thread that serves the worker's slot read them
 * into its own memory. One caller per slot; several slots may work on one queue. `cancel` (may be NULL) is polled between
 * batches of a few MiB. What cannot be placed, moved or read directly after all is read plainly.
 */
int gr_pump_run(struct gr_region *region, const struct gr_pump_worker *worker, const struct gr_pump_source *source,
		struct gr_pump_queue *queue, int *cancel, struct gr_error *err);

/*
 * Take chunks until the queue is empty and have the thread that serves the worker's slot move empty huge pages to the
 * blocks of huge ones, for somebody else to write to. Where that does not work there are none, which is no error.
 */
int gr_pump_populate(struct gr_region *region, const struct gr_pump_worker *worker, struct gr_pump_queue *queue,
		     int *cancel, struct gr_error *err);

/* Memory of this process; addresses in a queue are relative to its start. */
struct gr_pump_memory {
	uint64_t base;
	uint64_t bytes;
	uint64_t huge_base; /* where huge chunks go: the same object, mapped with MADV_HUGEPAGE; or 0: nowhere */
};

/*
 * The same as gr_pump_run for memory of this process, by nr_threads threads, which are joined. Pages of shared memory are
 * put in place as a whole where the kernel does that.
 */
int gr_pump_fill(struct gr_pump_queue *queue, const struct gr_pump_memory *memory, const struct gr_pump_source *source,
		 uint32_t nr_threads, int *cancel, struct gr_error *err);

/*
 * How much of [offset, offset + bytes) of a file lies in the page cache, in bytes (cachestat, Linux 6.5). Where the
 * kernel does not tell, all of it.
 */
uint64_t gr_cached_bytes(int fd, uint64_t offset, uint64_t bytes);

#endif
