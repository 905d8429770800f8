#ifndef GR_CHUNK_READ_H
#define GR_CHUNK_READ_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_pages_out.h"
#include "gr_runs.h"

/*
 * Runs of pages that are cut into chunks of equal size (the last one excepted), each of which any thread may read at any
 * time.
 */
struct gr_chunk_reader;

/* chunk_pages is at most 1024. The arrays of `source` and `runs`, and its descriptor, must outlive the reader. */
int gr_chunk_reader_create(const struct gr_pages_source *source, const struct gr_runs_view *runs, uint32_t chunk_pages,
			   struct gr_chunk_reader **out, struct gr_error *err);
void gr_chunk_reader_destroy(struct gr_chunk_reader *reader);

uint64_t gr_chunk_reader_nr_chunks(const struct gr_chunk_reader *reader);

/*
 * Read chunk `index` into `buffer`, which holds chunk_pages pages, and list its pages in `left`, which is emptied first.
 * Returns the bytes that are left, one behind the other.
 */
int gr_chunk_read(const struct gr_chunk_reader *reader, uint64_t index, void *buffer, struct gr_page_runs *left,
		  struct gr_error *err);

/* Append what is left of chunk `index` to `stored`, which holds what is left of those before. */
int gr_chunk_append(const struct gr_chunk_reader *reader, uint64_t index, const struct gr_page_runs *left,
		    struct gr_page_runs *stored, struct gr_error *err);

#endif
