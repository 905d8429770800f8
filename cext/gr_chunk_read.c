#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "gr_chunk_read.h"
#include "gr_internal.h"

#define PAGE_BYTES 4096UL
#define MAX_CHUNK_PAGES 1024U /* UIO_MAXIOV: one vector for each page at worst */

/* Where a chunk begins: page `page` of run `run`. */
struct start {
	uint64_t run, page;
};

struct gr_chunk_reader {
	int pid, source_fd, mem_fd;
	const uint64_t *vaddrs, *nr_pages;
	uint64_t nr_runs, nr_chunks;
	uint32_t chunk_pages;
	struct start *starts;
};

/* Fill `buffer` from a file: the task's memory file, which reads what its owner may not, or an object's. */
static int read_file(const struct gr_chunk_reader *reader, char *buffer, uint64_t bytes, uint64_t address,
		     struct gr_error *err)
{
	int is_object = reader->source_fd >= 0;

	while (bytes) {
		ssize_t n = pread(is_object ? reader->source_fd : reader->mem_fd, buffer, bytes, (off_t)address);

		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 && is_object && bytes < PAGE_BYTES) {
			memset(buffer, 0, bytes); /* the last page of an object whose size is no multiple of pages */
			return 0;
		}
		if (n <= 0 && is_object)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at offset %#lx of an object",
				       bytes, address);
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at %#lx of task %d", bytes,
				       address, reader->pid);
		buffer += n;
		bytes -= (uint64_t)n;
		address += (uint64_t)n;
	}
	return 0;
}

static int read_pieces(const struct gr_chunk_reader *reader, char *buffer, struct iovec *pieces, unsigned int nr,
		       uint64_t bytes, struct gr_error *err)
{
	while (nr) {
		struct iovec local = { .iov_base = buffer, .iov_len = bytes };
		ssize_t n = -1;
		int ret;

		if (reader->source_fd < 0)
			n = process_vm_readv(reader->pid, &local, 1, pieces, nr, 0);
		if (n < 0)
			n = 0; /* unreadable for its owner, or not ours to read this way: the file below decides */
		buffer += n;
		bytes -= (uint64_t)n;
		for (; nr && (size_t)n >= pieces->iov_len; pieces++, nr--)
			n -= (ssize_t)pieces->iov_len;
		if (!nr)
			break;
		ret = read_file(reader, buffer, pieces->iov_len - (size_t)n, (uint64_t)pieces->iov_base + (uint64_t)n,
				err);
		if (ret < 0)
			return ret;
		buffer += pieces->iov_len - (size_t)n;
		bytes -= pieces->iov_len - (size_t)n;
		pieces++;
		nr--;
	}
	return 0;
}

int gr_chunk_read(const struct gr_chunk_reader *reader, uint64_t index, void *buffer, struct gr_error *err)
{
	struct iovec pieces[MAX_CHUNK_PAGES];
	uint64_t left = reader->chunk_pages;
	struct start at;
	unsigned int nr = 0;
	int ret;

	if (index >= reader->nr_chunks)
		return gr_fail(err, EINVAL, "reading chunk %lu of %lu", index, reader->nr_chunks);
	at = reader->starts[index];
	for (; left && at.run < reader->nr_runs; at.run++, at.page = 0) {
		uint64_t pages = reader->nr_pages[at.run] - at.page;

		if (pages > left)
			pages = left;
		if (!pages)
			continue;
		pieces[nr].iov_base = (void *)(reader->vaddrs[at.run] + at.page * PAGE_BYTES);
		pieces[nr++].iov_len = pages * PAGE_BYTES;
		left -= pages;
	}
	ret = read_pieces(reader, buffer, pieces, nr, (reader->chunk_pages - left) * PAGE_BYTES, err);
	return ret < 0 ? ret : (int)((reader->chunk_pages - left) * PAGE_BYTES);
}

/* Note where every chunk begins, so that threads can take them in any order. */
static int cut(struct gr_chunk_reader *reader, struct gr_error *err)
{
	uint64_t total = 0, page = 0, index = 0;

	for (uint64_t i = 0; i < reader->nr_runs; i++)
		if (__builtin_add_overflow(total, reader->nr_pages[i], &total) || total > (1UL << 50))
			return gr_fail(err, EINVAL, "adding up %lu runs of pages", reader->nr_runs);
	reader->nr_chunks = (total + reader->chunk_pages - 1) / reader->chunk_pages;
	reader->starts = calloc(reader->nr_chunks + 1, sizeof(*reader->starts));
	if (!reader->starts)
		return gr_fail(err, ENOMEM, "cutting %lu pages into chunks", total);
	for (uint64_t run = 0; run < reader->nr_runs; page += reader->nr_pages[run++])
		for (; index * reader->chunk_pages < page + reader->nr_pages[run]; index++)
			reader->starts[index] = (struct start){ run, index * reader->chunk_pages - page };
	return 0;
}

static int open_memory(struct gr_chunk_reader *reader, struct gr_error *err)
{
	char path[48];

	if (reader->source_fd >= 0)
		return 0;
	snprintf(path, sizeof(path), "/proc/%d/mem", reader->pid);
	reader->mem_fd = open(path, O_RDONLY | O_CLOEXEC);
	return reader->mem_fd < 0 ? gr_fail(err, errno, "opening %s", path) : 0;
}

int gr_chunk_reader_create(int pid, int source_fd, const uint64_t *vaddrs, const uint64_t *nr_pages, uint64_t nr_runs,
			   uint32_t chunk_pages, struct gr_chunk_reader **out, struct gr_error *err)
{
	struct gr_chunk_reader *reader;
	int ret;

	if (!chunk_pages || chunk_pages > MAX_CHUNK_PAGES)
		return gr_fail(err, EINVAL, "cutting into chunks of %u pages", chunk_pages);
	reader = calloc(1, sizeof(*reader));
	if (!reader)
		return gr_fail(err, ENOMEM, "reading %lu runs of pages", nr_runs);
	*reader = (struct gr_chunk_reader){ .pid = pid, .source_fd = source_fd, .mem_fd = -1, .vaddrs = vaddrs,
					    .nr_pages = nr_pages, .nr_runs = nr_runs, .chunk_pages = chunk_pages };
	ret = cut(reader, err);
	if (ret == 0)
		ret = open_memory(reader, err);
	if (ret < 0)
		gr_chunk_reader_destroy(reader);
	else
		*out = reader;
	return ret;
}

void gr_chunk_reader_destroy(struct gr_chunk_reader *reader)
{
	if (!reader)
		return;
	if (reader->mem_fd >= 0)
		close(reader->mem_fd);
	free(reader->starts);
	free(reader);
}

uint64_t gr_chunk_reader_nr_chunks(const struct gr_chunk_reader *reader)
{
	return reader->nr_chunks;
}
