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

/*
 * A second mapping of an object that this process has mapped, shared and from its start: aligned for huge pages and
 * asking for them. What is written through it becomes huge pages of the object, wherever else that is mapped.
 */
struct gr_stage_alias {
	uint64_t address; /* 0: there is none */
	uint64_t reserved_address;
	uint64_t reserved_bytes;
};
int gr_stage_alias_create(uint64_t mapped_at, uint64_t bytes, struct gr_stage_alias *out, struct gr_error *err);
void gr_stage_alias_destroy(struct gr_stage_alias *alias);

#endif
