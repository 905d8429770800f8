#ifndef GR_SCATTER_H
#define GR_SCATTER_H

#include <stdint.h>
#include "gr_error.h"

/* Where the bytes of a stream of pages belong: pages are put there from a buffer, by any number of threads at once. */
struct gr_scatter;

/*
 * The runs of a pagemap that gr_pump_queue_create accepted: ascending, stored, inside of mappings. The skip ranges,
 * ascending too, are not written to, though their pages are in the stream. Arrays are not needed afterwards.
 */
int gr_scatter_create(const uint64_t *vaddrs, const uint64_t *nr_pages, uint64_t nr_runs, const uint64_t *skip_starts,
		      const uint64_t *skip_ends, uint64_t nr_skips, struct gr_scatter **out, struct gr_error *err);
void gr_scatter_destroy(struct gr_scatter *scatter);

/* Bytes that were put in place so far, and those of them that were put there as whole pages. */
uint64_t gr_scatter_done_bytes(const struct gr_scatter *scatter);
uint64_t gr_scatter_placed_bytes(const struct gr_scatter *scatter);

/*
 * What is put into our own memory is for the object of `bytes` bytes that is mapped, shared and from its start, at `base`:
 * as far as the kernel does that, pages are put there as a whole. Before any of it is put, and undone after the last.
 */
void gr_scatter_begin_object(struct gr_scatter *scatter, uint64_t base, uint64_t bytes);
void gr_scatter_end_object(struct gr_scatter *scatter);

/*
 * Put `bytes` of the stream, from `offset` on (both whole pages), in place: in the memory of task `pid`, whose mappings
 * must be writable, or (pid 0) in ours, where every address is relative to `base`.
 */
int gr_scatter_put(struct gr_scatter *scatter, int pid, uint64_t base, uint64_t offset, const void *buffer,
		   uint64_t bytes, struct gr_error *err);

#endif
