#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "gr_internal.h"
#include "gr_pages_out.h"
#include "gr_workers.h"

#define PAGE_BYTES 4096UL
/* A chunk has at most one vector element per page, which is below the kernel's limit of 1024 (UIO_MAXIOV). */
#define CHUNK_PAGES 512UL
#define CHUNK_BYTES (CHUNK_PAGES * PAGE_BYTES)

/* Where a chunk begins: page `page` of run `run`. */
struct chunk {
	uint64_t run, page;
};

struct job {
	const struct gr_pages_source *source;
	const uint64_t *vaddrs, *nr_pages;
	uint64_t nr_runs, total_pages;
	int out_fd, mem_fd;
	uint64_t out_offset;
	struct chunk *chunks;
	uint64_t nr_chunks;
	uint64_t next; /* atomic: the next chunk that nobody took */
	int *cancel;
	int stop;
	uint64_t *done_bytes;
};

static int write_all(const struct job *job, const char *buffer, uint64_t bytes, uint64_t offset, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pwrite(job->out_fd, buffer, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "writing %lu bytes of pages at offset %lu", bytes,
				       offset);
		buffer += n;
		bytes -= (uint64_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

/* Fill `buffer` from a file: the task's memory file, which reads what its owner may not, or an object's. */
static int read_file(const struct job *job, char *buffer, uint64_t bytes, uint64_t address, struct gr_error *err)
{
	int is_object = job->source->source_fd >= 0;
	int fd = is_object ? job->source->source_fd : job->mem_fd;

	while (bytes) {
		ssize_t n = pread(fd, buffer, bytes, (off_t)address);

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
				       address, job->source->pid);
		buffer += n;
		bytes -= (uint64_t)n;
		address += (uint64_t)n;
	}
	return 0;
}

/* List the pieces of memory that make up a chunk; returns their number. */
static unsigned int chunk_pieces(const struct job *job, uint64_t index, struct iovec *pieces, uint64_t *bytes)
{
	struct chunk at = job->chunks[index];
	uint64_t left = CHUNK_PAGES;
	unsigned int nr = 0;

	for (; left && at.run < job->nr_runs; at.run++, at.page = 0) {
		uint64_t pages = job->nr_pages[at.run] - at.page;

		if (pages > left)
			pages = left;
		if (!pages)
			continue;
		pieces[nr].iov_base = (void *)(job->vaddrs[at.run] + at.page * PAGE_BYTES);
		pieces[nr++].iov_len = pages * PAGE_BYTES;
		left -= pages;
	}
	*bytes = (CHUNK_PAGES - left) * PAGE_BYTES;
	return nr;
}

static int read_pieces(const struct job *job, char *buffer, struct iovec *pieces, unsigned int nr, uint64_t bytes,
		       struct gr_error *err)
{
	while (nr) {
		struct iovec local = { .iov_base = buffer, .iov_len = bytes };
		ssize_t n = -1;
		int ret;

		if (job->source->source_fd < 0)
			n = process_vm_readv(job->source->pid, &local, 1, pieces, nr, 0);
		if (n < 0)
			n = 0; /* unreadable for its owner, or not ours to read this way: the file below decides */
		buffer += n;
		bytes -= (uint64_t)n;
		for (; nr && (size_t)n >= pieces->iov_len; pieces++, nr--)
			n -= (ssize_t)pieces->iov_len;
		if (!nr)
			break;
		pieces->iov_base = (char *)pieces->iov_base + n;
		pieces->iov_len -= (size_t)n;
		ret = read_file(job, buffer, pieces->iov_len, (uint64_t)pieces->iov_base, err);
		if (ret < 0)
			return ret;
		buffer += pieces->iov_len;
		bytes -= pieces->iov_len;
		pieces++;
		nr--;
	}
	return 0;
}

static int copy_chunks(struct job *job, char *buffer, struct iovec *pieces, struct gr_error *err)
{
	for (;;) {
		uint64_t index = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
		uint64_t bytes;
		unsigned int nr;
		int ret;

		if (index >= job->nr_chunks || __atomic_load_n(&job->stop, __ATOMIC_RELAXED))
			return 0;
		if (job->cancel && __atomic_load_n(job->cancel, __ATOMIC_RELAXED))
			return gr_fail(err, ECANCELED, "writing pages");
		nr = chunk_pieces(job, index, pieces, &bytes);
		ret = read_pieces(job, buffer, pieces, nr, bytes, err);
		if (ret == 0)
			ret = write_all(job, buffer, bytes, job->out_offset + index * CHUNK_BYTES, err);
		if (ret < 0)
			return ret;
		if (job->done_bytes)
			__atomic_fetch_add(job->done_bytes, bytes, __ATOMIC_RELAXED);
	}
}

static int work(void *opaque, struct gr_error *err)
{
	struct iovec *pieces = malloc(CHUNK_PAGES * sizeof(*pieces));
	char *buffer = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int ret = buffer == MAP_FAILED || !pieces ? gr_fail(err, ENOMEM, "making room for pages") :
						    copy_chunks(opaque, buffer, pieces, err);

	if (buffer != MAP_FAILED)
		munmap(buffer, CHUNK_BYTES);
	free(pieces);
	return ret;
}

/* Note where every chunk begins, so that threads can take them in any order. */
static int cut(struct job *job, struct gr_error *err)
{
	uint64_t page = 0, index = 0;

	for (uint64_t i = 0; i < job->nr_runs; i++)
		if (__builtin_add_overflow(job->total_pages, job->nr_pages[i], &job->total_pages) ||
		    job->total_pages > (1UL << 50))
			return gr_fail(err, EINVAL, "adding up %lu runs of pages", job->nr_runs);
	job->nr_chunks = (job->total_pages + CHUNK_PAGES - 1) / CHUNK_PAGES;
	job->chunks = calloc(job->nr_chunks + 1, sizeof(*job->chunks));
	if (!job->chunks)
		return gr_fail(err, ENOMEM, "cutting %lu pages into chunks", job->total_pages);
	for (uint64_t run = 0; run < job->nr_runs; page += job->nr_pages[run++])
		for (; index * CHUNK_PAGES < page + job->nr_pages[run]; index++)
			job->chunks[index] = (struct chunk){ run, index * CHUNK_PAGES - page };
	return 0;
}

int gr_pages_out(const struct gr_pages_source *source, const uint64_t *vaddrs, const uint64_t *nr_pages,
		 uint64_t nr_runs, int out_fd, uint64_t out_offset, uint32_t nr_threads, int *cancel,
		 uint64_t *done_bytes, struct gr_error *err)
{
	GR_CLOSE int mem_fd = -1;
	struct job job = { .source = source, .vaddrs = vaddrs, .nr_pages = nr_pages, .nr_runs = nr_runs,
			   .out_fd = out_fd, .out_offset = out_offset, .cancel = cancel, .done_bytes = done_bytes };
	int ret;

	if (source->source_fd < 0) {
		char path[48];

		snprintf(path, sizeof(path), "/proc/%d/mem", source->pid);
		mem_fd = open(path, O_RDONLY | O_CLOEXEC);
		if (mem_fd < 0)
			return gr_fail(err, errno, "opening %s", path);
		job.mem_fd = mem_fd;
	}
	ret = cut(&job, err);
	if (ret == 0)
		ret = gr_workers_run(job.nr_chunks < nr_threads ? (uint32_t)job.nr_chunks : nr_threads, work, &job,
				     &job.stop, err);
	free(job.chunks);
	return ret;
}
