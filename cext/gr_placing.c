#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "gr_internal.h"
#include "gr_placing.h"

/* linux/userfaultfd.h of Linux 5.11: such a descriptor needs no right, since it handles no fault of the kernel's. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
/* asm-generic/mman-common.h of Linux 5.14 */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static int map_file(int fd, struct gr_placing *out)
{
	struct stat status;
	void *file;

	if (fstat(fd, &status) < 0)
		return -errno;
	file = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		return -errno;
	out->file = (uint64_t)file;
	out->file_bytes = (uint64_t)status.st_size;
	return 0;
}

static int map_object(uint64_t mapped_at, uint64_t bytes, struct gr_placing *out)
{
	void *object;

	bytes = (bytes + GR_PAGE_BYTES - 1) & ~(GR_PAGE_BYTES - 1);
	/* An old size of 0 maps the same object once more. */
	object = mremap((void *)mapped_at, 0, bytes, MREMAP_MAYMOVE);
	if (object == MAP_FAILED)
		return -errno;
	out->object = (uint64_t)object;
	out->object_bytes = bytes;
	return 0;
}

static int register_object(struct gr_placing *placing)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .range = { placing->object, placing->object_bytes },
					 .mode = UFFDIO_REGISTER_MODE_MISSING };

	placing->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (placing->uffd < 0 || ioctl(placing->uffd, UFFDIO_API, &api) < 0 ||
	    ioctl(placing->uffd, UFFDIO_REGISTER, &range) < 0)
		return -errno;
	return 0;
}

int gr_placing_of_object(uint64_t mapped_at, uint64_t bytes, int fd, struct gr_placing *out)
{
	int ret;

	*out = (struct gr_placing){ .uffd = -1 };
	ret = fd < 0 ? 0 : map_file(fd, out);
	if (ret == 0)
		ret = map_object(mapped_at, bytes, out);
	if (ret == 0)
		ret = register_object(out);
	if (ret < 0)
		gr_placing_destroy(out);
	return ret;
}

int gr_placing_of_task(int uffd, int fd, struct gr_placing *out)
{
	int ret;

	*out = (struct gr_placing){ .uffd = uffd };
	ret = map_file(fd, out);
	if (ret < 0)
		gr_placing_destroy(out);
	return ret;
}

void gr_placing_destroy(struct gr_placing *placing)
{
	if (placing->object)
		munmap((void *)placing->object, placing->object_bytes);
	if (placing->file)
		munmap((void *)placing->file, placing->file_bytes);
	if (placing->uffd >= 0)
		close(placing->uffd);
}

const void *gr_placing_open(const struct gr_placing *placing, uint64_t file_offset, uint64_t bytes)
{
	void *range = (void *)(placing->file + file_offset);

	if (file_offset > placing->file_bytes || bytes > placing->file_bytes - file_offset)
		return NULL;
	return madvise(range, bytes, MADV_POPULATE_READ) < 0 ? NULL : range;
}

int gr_placing_put(const struct gr_placing *placing, uint64_t offset, const void *from, uint64_t bytes)
{
	while (bytes) {
		struct uffdio_copy copy = { .dst = placing->object + offset, .src = (uint64_t)from, .len = bytes };

		if (ioctl(placing->uffd, UFFDIO_COPY, &copy) == 0)
			return 0;
		/* What stopped it halfway is told by the next call, which begins there. */
		if (errno != EAGAIN || copy.copy <= 0)
			return -errno;
		offset += (uint64_t)copy.copy;
		from = (const char *)from + copy.copy;
		bytes -= (uint64_t)copy.copy;
	}
	return 0;
}

void gr_placing_forget(const struct gr_placing *placing, uint64_t offset, uint64_t bytes)
{
	if (placing->object)
		madvise((void *)(placing->object + offset), bytes, MADV_DONTNEED);
}

void gr_placing_close(const void *range, uint64_t bytes)
{
	madvise((void *)range, bytes, MADV_DONTNEED);
}
