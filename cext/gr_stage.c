#include <sys/mman.h>

#include "gr_internal.h"
#include "gr_stage.h"

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
