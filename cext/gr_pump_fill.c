#include <stdlib.h>
#include <sys/syscall.h>

#include "gr_internal.h"
#include "gr_placing.h"
#include "gr_pump_internal.h"
#include "gr_workers.h"

/* asm-generic/unistd.h of Linux 6.5 */
#ifndef __NR_cachestat
#define __NR_cachestat 451
#endif

uint64_t gr_cached_bytes(int fd, uint64_t offset, uint64_t bytes)
{
	struct {
		uint64_t offset, bytes;
	} range = { offset, bytes };
	struct {
		uint64_t nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;
	} stat = { 0 };

	if (syscall(__NR_cachestat, fd, &range, &stat, 0) < 0)
		return bytes;
	return stat.nr_cache * GR_PAGE_BYTES;
}

static int is_mostly_cached(const struct gr_pump_source *source, const struct gr_chunk *chunk)
{
	return gr_cached_bytes(source->fd, chunk->file_offset, chunk->bytes) >= chunk->bytes / 2;
}

int gr_pump_is_cold(const struct gr_pump_source *source, const struct gr_chunk *chunk)
{
	return source->direct_fd >= 0 && (source->always_direct || !is_mostly_cached(source, chunk));
}

static int place_runs(const struct gr_placing *placing, const struct iovec *runs, uint32_t nr, const char *from)
{
	int ret = 0;

	for (uint32_t i = 0; ret == 0 && i < nr; i++) {
		ret = gr_placing_put(placing, (uint64_t)runs[i].iov_base, from, runs[i].iov_len);
		from += runs[i].iov_len;
	}
	return ret;
}

int gr_pump_place(struct gr_pump_queue *queue, const struct gr_placing *placing, const struct gr_pump_source *source,
		  const struct gr_chunk *chunk)
{
	const struct iovec *runs = &queue->iovecs[chunk->first], *last = &runs[chunk->nr - 1];
	uint64_t start = (uint64_t)runs->iov_base, end = (uint64_t)last->iov_base + last->iov_len;
	const char *from;
	int ret;

	/* Where direct reads are possible it is known by now that the chunk is cached. */
	if (source->direct_fd < 0 && !is_mostly_cached(source, chunk))
		return 0;
	from = gr_placing_open(placing, chunk->file_offset, chunk->bytes);
	if (!from)
		return 0;
	ret = place_runs(placing, runs, chunk->nr, from);
	gr_placing_forget(placing, start, end - start);
	gr_placing_close(from, chunk->bytes);
	if (ret < 0)
		return 0;
	gr_pump_done(queue, chunk, 0, 0);
	__atomic_fetch_add(&queue->placed_bytes, chunk->bytes, __ATOMIC_RELAXED);
	return 1;
}

struct fill_job {
	struct gr_pump_queue *queue;
	const struct gr_pump_memory *memory;
	const struct gr_pump_source *source;
	const struct gr_placing *placing; /* or NULL: everything is read to where it belongs */
	int *cancel;
	int stop;
};

static int is_huge(const struct fill_job *job, const struct gr_chunk *chunk)
{
	return chunk->huge_bytes && job->memory->huge_base;
}

/* Read `bytes` at `offset` into `vectors`, which are used up on the way. */
static int read_vectors(int fd, uint64_t offset, uint64_t bytes, struct iovec *vectors, uint32_t nr, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = preadv(fd, vectors, (int)nr, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at offset %lu of the pages file",
				       bytes, offset);
		offset += (uint64_t)n;
		bytes -= (uint64_t)n;
		for (; nr && (size_t)n >= vectors->iov_len; vectors++, nr--)
			n -= (ssize_t)vectors->iov_len;
		if (nr) {
			vectors->iov_base = (char *)vectors->iov_base + n;
			vectors->iov_len -= (size_t)n;
		}
	}
	return 0;
}

/* Read a chunk to where its pages belong. */
static int read_chunk(const struct fill_job *job, const struct gr_chunk *chunk, int fd, struct gr_error *err)
{
	const struct iovec *from = &job->queue->iovecs[chunk->first];
	uint64_t base = is_huge(job, chunk) ? job->memory->huge_base : job->memory->base;
	struct iovec vectors[GR_MAX_IOVECS];

	for (uint32_t i = 0; i < chunk->nr; i++)
		vectors[i] = (struct iovec){ (char *)from[i].iov_base + base, from[i].iov_len };
	return read_vectors(fd, chunk->file_offset, chunk->bytes, vectors, chunk->nr, err);
}

/* What cannot be put in place is read there, and what cannot be read past the page cache after all through it. */
static int fill_chunk(const struct fill_job *job, const struct gr_chunk *chunk, struct gr_error *err)
{
	int direct = gr_pump_is_cold(job->source, chunk), ret = -1;

	if (!direct && job->placing && !is_huge(job, chunk) &&
	    gr_pump_place(job->queue, job->placing, job->source, chunk))
		return 0;
	if (direct)
		ret = read_chunk(job, chunk, job->source->direct_fd, err);
	if (ret < 0) {
		direct = 0;
		ret = read_chunk(job, chunk, job->source->fd, err);
	}
	if (ret == 0)
		gr_pump_done(job->queue, chunk, is_huge(job, chunk), direct);
	return ret;
}

static int fill_chunks(void *opaque, struct gr_error *err)
{
	struct fill_job *job = opaque;
	const struct gr_chunk *chunk;
	int ret = 0;

	while (ret == 0 && (chunk = gr_pump_take(job->queue))) {
		if (__atomic_load_n(&job->stop, __ATOMIC_RELAXED))
			return 0;
		if (gr_is_cancelled(job->cancel))
			return gr_fail(err, ECANCELED, "filling shared memory");
		ret = fill_chunk(job, chunk, err);
	}
	return ret;
}

int gr_pump_fill(struct gr_pump_queue *queue, const struct gr_pump_memory *memory, const struct gr_pump_source *source,
		 uint32_t nr_threads, int *cancel, struct gr_error *err)
{
	struct fill_job job = { .queue = queue, .memory = memory, .source = source, .cancel = cancel };
	struct gr_placing placing;
	int ret;

	if (queue->total_bytes >= GR_PLACING_MIN_BYTES &&
	    gr_placing_of_object(memory->base, memory->bytes, source->fd, &placing) == 0)
		job.placing = &placing;
	if (nr_threads > queue->nr_chunks)
		nr_threads = (uint32_t)queue->nr_chunks;
	ret = gr_workers_run(nr_threads, fill_chunks, &job, &job.stop, err);
	if (job.placing)
		gr_placing_destroy(&placing);
	return ret;
}
