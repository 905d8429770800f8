#ifndef GR_STAGE_H
#define GR_STAGE_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Map a new, empty object of shared anonymous memory at a fixed address of this process, where nothing may be mapped
 * yet. Tasks that are forked off inherit it and map it where they need it. The caller unmaps it.
 */
int gr_stage_map(uint64_t address, uint64_t bytes, int noreserve, struct gr_error *err);
void gr_stage_unmap(uint64_t address, uint64_t bytes);

#endif
