#ifndef GR_PLACING_H
#define GR_PLACING_H

#include <stdint.h>

/*
 * Puts pages of a file in the page cache into an object of shared memory, straight from one to the other and without the
 * kernel clearing them first or taking a fault for each: by UFFDIO_COPY from a mapping of the file. The mapping of the
 * object that is registered for that is one of its own, which nobody else knows and nobody touches, since a fault there
 * would wait for an answer that nobody gives. All other mappings of the object are what they always were.
 *
 * A file that cannot be read is an error of the call, as everywhere: only the kernel reads through the mapping.
 */
struct gr_placing {
	uint64_t object, object_bytes; /* the registered mapping */
	uint64_t file, file_bytes;
	int uffd;
};

/*
 * For the object of `bytes` bytes that is mapped, shared and from its start, at `mapped_at`, and the file behind `fd`.
 * -errno where that cannot be had (a kernel without it, seccomp, private memory); nothing has changed then. A process
 * that is forked off meanwhile inherits the mappings, but not the registration.
 */
int gr_placing_create(uint64_t mapped_at, uint64_t bytes, int fd, struct gr_placing *out);
void gr_placing_destroy(struct gr_placing *placing);

/*
 * The parts of one piece of work; any number of threads may be at theirs. gr_placing_begin makes a range of the file ready,
 * gr_placing_put puts whole pages of it in place, and gr_placing_end lets go of both ranges, while the caches know them
 * still. -errno where not all was put in place; -EEXIST: a page was there already.
 */
int gr_placing_begin(const struct gr_placing *placing, uint64_t file_offset, uint64_t bytes);
int gr_placing_put(const struct gr_placing *placing, uint64_t offset, uint64_t file_offset, uint64_t bytes);
void gr_placing_end(const struct gr_placing *placing, uint64_t start, uint64_t end, uint64_t file_offset,
		    uint64_t bytes);

#endif
