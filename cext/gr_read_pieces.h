#ifndef GR_READ_PIECES_H
#define GR_READ_PIECES_H

#include <stdint.h>
#include <sys/uio.h>

#include "gr_error.h"

/*
 * Read pieces of memory one behind the other into `buffer`: of the frozen task `pid`, whose memory file is `mem_fd`, or
 * of the object behind `source_fd` if that is not -1; pieces are then offsets, and the rest of a last page is zeros.
 * `pieces` are used up; `bytes` are their sum.
 */
int gr_read_pieces(int pid, int source_fd, int mem_fd, char *buffer, struct iovec *pieces, unsigned int nr,
		   uint64_t bytes, struct gr_error *err);

#endif
