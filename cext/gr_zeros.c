#include "gr_internal.h"
#include "gr_zeros.h"

int gr_is_zero_page(const char *page)
{
	const uint64_t *word = (const uint64_t *)page, *end = (const uint64_t *)(page + GR_PAGE_BYTES);

	for (; word < end; word += 8)
		if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7])
			return 0;
	return 1;
}
