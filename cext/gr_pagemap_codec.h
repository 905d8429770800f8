#ifndef GR_PAGEMAP_CODEC_H
#define GR_PAGEMAP_CODEC_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Records of a pagemap image: u32 size, then a protobuf message. The first is a pagemap_head, all others are
 * pagemap_entry. `data` is the file, `start` (at most `bytes`) where its magic numbers end. Nothing in it is trusted; an
 * error's context says at which byte and why. Pure functions: they keep nothing and allocate nothing.
 */
struct gr_pagemap_summary {
	uint32_t pages_id;
	uint32_t ascending;     /* entries are sorted by address and do not overlap */
	uint64_t present_pages; /* pages that lie in the pages image */
};

/* Set out_entries to the number of entries. Every entry takes 8 bytes of `data` or more. -EINVAL: damaged. */
int gr_pagemap_count(const uint8_t *data, uint64_t start, uint64_t bytes, uint64_t *out_entries, struct gr_error *err);

/* Fill arrays of nr_entries elements, the number that gr_pagemap_count() found. -EINVAL: damaged. */
int gr_pagemap_decode(const uint8_t *data, uint64_t start, uint64_t bytes, uint64_t nr_entries, uint64_t *vaddrs,
		      uint64_t *nr_pages, uint32_t *flags, struct gr_pagemap_summary *out, struct gr_error *err);

/*
 * Write the records and set out_bytes to their size. With out == NULL only the size is computed. -EINVAL: an entry is
 * not page-aligned, empty, or ends beyond the address space. -ENOSPC: capacity is too small.
 */
int gr_pagemap_encode(uint32_t pages_id, const uint64_t *vaddrs, const uint64_t *nr_pages, const uint32_t *flags,
		      uint64_t nr_entries, uint8_t *out, uint64_t capacity, uint64_t *out_bytes, struct gr_error *err);

#endif
