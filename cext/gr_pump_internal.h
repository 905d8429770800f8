#ifndef GR_PUMP_INTERNAL_H
#define GR_PUMP_INTERNAL_H

#include <sys/uio.h>

#include "gr_pump.h"

#define GR_HUGE_BYTES (2UL << 20)
#define GR_MAX_IOVECS 1024UL /* UIO_MAXIOV */

struct gr_chunk {
	uint64_t file_offset;
	uint64_t first; /* index into iovecs */
	uint64_t bytes;
	uint64_t huge_start; /* the blocks [huge_start, huge_start + huge_bytes) are to become huge pages */
	uint64_t huge_bytes; /* 0: plain */
	uint32_t nr;
	uint16_t full; /* takes no more, even if it is a bit below the size wanted */
	uint16_t unplaceable; /* some of its pages belong to ranges that are not PLACED */
};

struct gr_pump_queue {
	struct iovec *iovecs;
	uint64_t nr_iovecs, max_iovecs;
	struct gr_chunk *chunks;
	uint64_t nr_chunks, max_chunks;
	uint64_t chunk_bytes, total_bytes, huge_bytes;
	uint64_t next; /* atomic, as are those below: the next chunk that nobody took */
	uint64_t done_bytes, moved_bytes, direct_bytes, placed_bytes;
};

static inline const struct gr_chunk *gr_pump_take(struct gr_pump_queue *queue)
{
	uint64_t index = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);

	return index < queue->nr_chunks ? &queue->chunks[index] : NULL;
}

/* Note that a chunk is in place. */
static inline void gr_pump_done(struct gr_pump_queue *queue, const struct gr_chunk *chunk, int moved, int direct)
{
	__atomic_fetch_add(&queue->done_bytes, chunk->bytes, __ATOMIC_RELAXED);
	if (moved)
		__atomic_fetch_add(&queue->moved_bytes, chunk->bytes, __ATOMIC_RELAXED);
	if (direct)
		__atomic_fetch_add(&queue->direct_bytes, chunk->bytes, __ATOMIC_RELAXED);
}

/*
 * Place the pages of a chunk that is not to be read past the page cache: from there, where most of it is. 1: done and
 * noted; 0: not possible, and nothing has changed that reading the chunk does not mend.
 */
int gr_pump_place(struct gr_pump_queue *queue, const struct gr_placing *placing, const struct gr_pump_source *source,
		  const struct gr_chunk *chunk);

/* Whether a chunk is better read past the page cache: most of it is not there. */
int gr_pump_is_cold(const struct gr_pump_source *source, const struct gr_chunk *chunk);

#endif
