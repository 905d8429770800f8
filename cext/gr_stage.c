#include <sys/mman.h>

#include "gr_internal.h"
#include "gr_stage.h"

#define HUGE_BYTES (2UL << 20)

int gr_stage_map(uint64_t address, uint64_t bytes, int noreserve, struct gr_error *err)
{
	int flags = MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | (noreserve ? MAP_NORESERVE : 0);
	void *got = mmap((void *)address, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (got == MAP_FAILED)
		return gr_fail(err, errno, "mapping %lu bytes of shared memory at %#lx", bytes, address);
	if ((uint64_t)got == address)
		return 0;
	munmap(got, bytes);
	return gr_fail(err, EEXIST, "mapping %lu bytes of shared memory at %#lx", bytes, address);
}

void gr_stage_unmap(uint64_t address, uint64_t bytes)
{
	munmap((void *)address, bytes);
}

int gr_stage_alias_create(uint64_t mapped_at, uint64_t bytes, struct gr_stage_alias *out, struct gr_error *err)
{
	uint64_t reserved_bytes = bytes + HUGE_BYTES, address;
	void *reserved = mmap(NULL, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (reserved == MAP_FAILED)
		return gr_fail(err, errno, "reserving %lu bytes of address space", reserved_bytes);
	address = ((uint64_t)reserved + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
	/* An old size of 0 maps the same object once more. */
	if (mremap((void *)mapped_at, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)address) == MAP_FAILED) {
		int code = errno;

		munmap(reserved, reserved_bytes);
		return gr_fail(err, code, "mapping %lu bytes of shared memory again", bytes);
	}
	/* Where the kernel has no huge pages the advice fails, and what is written becomes small ones. */
	madvise((void *)address, bytes, MADV_HUGEPAGE);
	*out = (struct gr_stage_alias){ address, (uint64_t)reserved, reserved_bytes };
	return 0;
}

void gr_stage_alias_destroy(struct gr_stage_alias *alias)
{
	if (alias->address)
		munmap((void *)alias->reserved_address, alias->reserved_bytes);
	alias->address = 0;
}
