#ifndef GR_PLACING_H
#define GR_PLACING_H

#include <stdint.h>

/* For less content than that the mappings and the userfaultfd cost more than they save. */
#define GR_PLACING_MIN_BYTES (128UL << 10)

/*
 * Puts pages into memory without the kernel clearing them first or taking a fault for each: by UFFDIO_COPY from a buffer,
 * or straight from the page cache by way of a mapping of a file. The memory is an object of shared memory, or that of a
 * task. A file that cannot be read is an error of the call, as everywhere: only the kernel reads through the mapping.
 *
 * The mapping of an object that is registered for that is one of its own, which nobody else knows and nobody touches,
 * since a fault there would wait for an answer that nobody gives. All other mappings of the object are what they always
 * were.
 */
struct gr_placing {
	uint64_t object, object_bytes; /* the registered mapping; 0: a task's memory, by its own addresses */
	uint64_t file, file_bytes;
	int uffd;
};

/*
 * For the object of `bytes` bytes that is mapped, shared and from its start, at `mapped_at`, and the file behind `fd`
 * (-1: none). -errno where that cannot be had (a kernel without it, seccomp, private memory); nothing has changed then.
 * A process that is forked off meanwhile inherits the mappings, but not the registration.
 */
int gr_placing_of_object(uint64_t mapped_at, uint64_t bytes, int fd, struct gr_placing *out);
/*
 * For private anonymous memory of the task whose userfaultfd this process has as `uffd`, which is the placing's from now on,
 * whatever comes. The task registers its mappings with it, for write protection: then a page that is touched before it is
 * placed is an ordinary fault of the task, for which nobody need answer.
 */
int gr_placing_of_task(int uffd, int fd, struct gr_placing *out);
void gr_placing_destroy(struct gr_placing *placing);

/* Make a range of the file ready to be read: where it lies; or NULL. Any number of threads may be at theirs. */
const void *gr_placing_open(const struct gr_placing *placing, uint64_t file_offset, uint64_t bytes);

/*
 * Put whole pages at `offset` of the object, or at that address of the task. -errno where not all of it was put there;
 * -EEXIST: a page was there already.
 */
int gr_placing_put(const struct gr_placing *placing, uint64_t offset, const void *from, uint64_t bytes);

/*
 * Let go of what was put in place, in our mapping of an object and not in the object, and of what was made ready: while
 * caches know it.
 */
void gr_placing_forget(const struct gr_placing *placing, uint64_t offset, uint64_t bytes);
void gr_placing_close(const void *range, uint64_t bytes);

#endif
