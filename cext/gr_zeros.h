#ifndef GR_ZEROS_H
#define GR_ZEROS_H

#include <stdint.h>

/* Whether a page, aligned to 8 bytes at least, holds nothing but zeros. */
int gr_is_zero_page(const char *page);

/* Whether one of the ranges, ascending and apart from each other, holds `address`. */
int gr_ranges_hold(const uint64_t *starts, const uint64_t *ends, uint64_t nr, uint64_t address);

#endif
