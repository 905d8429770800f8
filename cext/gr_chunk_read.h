#ifndef GR_CHUNK_READ_H
#define GR_CHUNK_READ_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Runs of pages as one stream that is cut into chunks of equal size (the last one excepted), each of which any thread
 * may read at any time. The pages come from a frozen task, or (source_fd >= 0) from a file, at the run's address as
 * offset.
 */
struct gr_chunk_reader;

/* chunk_pages is at most 1024. The arrays must outlive the reader; source_fd stays the caller's. */
int gr_chunk_reader_create(int pid, int source_fd, const uint64_t *vaddrs, const uint64_t *nr_pages, uint64_t nr_runs,
			   uint32_t chunk_pages, struct gr_chunk_reader **out, struct gr_error *err);
void gr_chunk_reader_destroy(struct gr_chunk_reader *reader);

uint64_t gr_chunk_reader_nr_chunks(const struct gr_chunk_reader *reader);

/* Read chunk `index` into `buffer`, which holds chunk_pages pages; returns its bytes. */
int gr_chunk_read(const struct gr_chunk_reader *reader, uint64_t index, void *buffer, struct gr_error *err);

#endif
