#include <cpuid.h>

#include "gr_cpu.h"

#define CPUID_OSXSAVE (1u << 27)
#define CPUID_XSAVE_LEAF 0xd

static uint64_t enabled_components(void)
{
	uint32_t low, high;

	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return low | (uint64_t)high << 32;
}

uint64_t gr_xstate_layout(uint32_t *bytes, uint32_t *offsets, uint32_t *sizes)
{
	uint32_t a, b, c, d;
	uint64_t filled = 0, enabled;

	*bytes = 0;
	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & CPUID_OSXSAVE))
		return 0;
	if (!__get_cpuid_count(CPUID_XSAVE_LEAF, 0, &a, &b, &c, &d))
		return 0;
	*bytes = b;
	enabled = enabled_components();
	for (unsigned int i = 2; i < GR_XSTATE_COMPONENTS; i++) {
		if (!(enabled >> i & 1) || !__get_cpuid_count(CPUID_XSAVE_LEAF, i, &a, &b, &c, &d))
			continue;
		sizes[i] = a;
		offsets[i] = b;
		filled |= 1ull << i;
	}
	return filled;
}
