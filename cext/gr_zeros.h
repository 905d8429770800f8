#ifndef GR_ZEROS_H
#define GR_ZEROS_H

#include <stdint.h>

/* Whether a page, aligned to 8 bytes at least, holds nothing but zeros. */
int gr_is_zero_page(const char *page);

#endif
