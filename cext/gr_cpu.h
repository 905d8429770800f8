#ifndef GR_CPU_H
#define GR_CPU_H

#include <stdint.h>

/* Components of the XSAVE area: bit numbers of XCR0. */
#define GR_XSTATE_COMPONENTS 64

/*
 * Where this CPU keeps the components of a standard-format XSAVE area that the kernel has switched on: bit i of the
 * result says that offsets[i] and sizes[i] (both arrays of 64) were filled; `*bytes` is the size of the whole area,
 * which is what ptrace takes and gives. 0 when the CPU has no XSAVE. Components 0 and 1 are the legacy area.
 */
uint64_t gr_xstate_layout(uint32_t *bytes, uint32_t *offsets, uint32_t *sizes);

#endif
