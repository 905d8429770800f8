#ifndef GR_READ_PIECES_H
#define GR_READ_PIECES_H

#include <stdint.h>
#include <sys/uio.h>

#include "gr_error.h"
#include "gr_pages_out.h"

/* An opened gr_pages_source. Any number of threads may read from it at once. */
struct gr_opened_source {
	int pid;
	int source_fd; /* of the source, or -1; stays its owner's */
	int mem_fd, map_fd; /* /proc/PID/mem and pagemap, or -1 */
};

/* Whatever comes of it, gr_source_close() is to be called. */
int gr_source_open(const struct gr_pages_source *source, struct gr_opened_source *out, struct gr_error *err);
void gr_source_close(struct gr_opened_source *source);

/*
 * Read pieces of a frozen task's memory one behind the other into `buffer`, or of an object: pieces are then offsets, and
 * the rest of a last page is zeros. The task's pages stay as they are: shared with others, and huge. `pieces` are used
 * up; `bytes` are their sum.
 */
int gr_read_pieces(const struct gr_opened_source *source, char *buffer, struct iovec *pieces, unsigned int nr,
		   uint64_t bytes, struct gr_error *err);

#endif
