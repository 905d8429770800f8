#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "gr_internal.h"
#include "gr_read_pieces.h"

#define PAGE_BYTES 4096UL

/* From the memory file, which reads what its owner may not. */
static int read_task(int pid, int mem_fd, char *buffer, uint64_t bytes, uint64_t address, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pread(mem_fd, buffer, bytes, (off_t)address);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at %#lx of task %d", bytes,
				       address, pid);
		buffer += n;
		bytes -= (uint64_t)n;
		address += (uint64_t)n;
	}
	return 0;
}

static int read_object(int fd, char *buffer, uint64_t bytes, uint64_t offset, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pread(fd, buffer, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 && bytes < PAGE_BYTES) {
			memset(buffer, 0, bytes); /* the last page of an object whose size is no multiple of pages */
			return 0;
		}
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at offset %#lx of an object",
				       bytes, offset);
		buffer += n;
		bytes -= (uint64_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

int gr_read_pieces(int pid, int source_fd, int mem_fd, char *buffer, struct iovec *pieces, unsigned int nr,
		   uint64_t bytes, struct gr_error *err)
{
	while (nr) {
		struct iovec local = { .iov_base = buffer, .iov_len = bytes };
		ssize_t n = -1;
		uint64_t left, address;
		int ret;

		if (source_fd < 0)
			n = process_vm_readv(pid, &local, 1, pieces, nr, 0);
		if (n < 0)
			n = 0; /* unreadable for its owner, or not ours to read this way: the file below decides */
		buffer += n;
		bytes -= (uint64_t)n;
		for (; nr && (size_t)n >= pieces->iov_len; pieces++, nr--)
			n -= (ssize_t)pieces->iov_len;
		if (!nr)
			break;
		left = pieces->iov_len - (size_t)n;
		address = (uint64_t)pieces->iov_base + (uint64_t)n;
		ret = source_fd < 0 ? read_task(pid, mem_fd, buffer, left, address, err) :
				      read_object(source_fd, buffer, left, address, err);
		if (ret < 0)
			return ret;
		buffer += left;
		bytes -= left;
		pieces++;
		nr--;
	}
	return 0;
}
