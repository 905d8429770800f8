#include <stdlib.h>
#include <sys/syscall.h>

#include "gr_internal.h"
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

int gr_pump_is_cold(const struct gr_pump_source *source, const struct gr_chunk *chunk)
{
	if (source->direct_fd < 0)
		return 0;
	return source->always_direct ||
	       gr_cached_bytes(source->fd, chunk->file_offset, chunk->bytes) < chunk->bytes / 2;
}

struct fill_job {
	struct gr_pump_queue *queue;
	uint64_t base, huge_base;
	const struct gr_pump_source *source;
	int *cancel;
	int stop;
};

static void set_vectors(const struct fill_job *job, const struct gr_chunk *chunk, struct iovec *vectors)
{
	const struct iovec *from = &job->queue->iovecs[chunk->first];
	uint64_t base = chunk->huge_bytes && job->huge_base ? job->huge_base : job->base;

	for (uint32_t i = 0; i < chunk->nr; i++)
		vectors[i] = (struct iovec){ (char *)from[i].iov_base + base, from[i].iov_len };
}

/* Read a whole chunk into `vectors`, which are used up on the way. */
static int read_chunk(const struct gr_chunk *chunk, struct iovec *vectors, int fd, struct gr_error *err)
{
	uint64_t offset = chunk->file_offset, left = chunk->bytes;
	uint32_t nr = chunk->nr;

	while (left) {
		ssize_t n = preadv(fd, vectors, (int)nr, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at offset %lu of the pages file",
				       left, offset);
		offset += (uint64_t)n;
		left -= (uint64_t)n;
		for (; nr && (size_t)n >= vectors->iov_len; vectors++, nr--)
			n -= (ssize_t)vectors->iov_len;
		if (nr) {
			vectors->iov_base = (char *)vectors->iov_base + n;
			vectors->iov_len -= (size_t)n;
		}
	}
	return 0;
}

/* What cannot be read past the page cache after all is read through it. */
static int fill_chunk(const struct fill_job *job, const struct gr_chunk *chunk, struct gr_error *err)
{
	struct iovec vectors[GR_MAX_IOVECS];
	int direct = gr_pump_is_cold(job->source, chunk), ret = -1;

	set_vectors(job, chunk, vectors);
	if (direct)
		ret = read_chunk(chunk, vectors, job->source->direct_fd, err);
	if (ret < 0) {
		direct = 0;
		set_vectors(job, chunk, vectors);
		ret = read_chunk(chunk, vectors, job->source->fd, err);
	}
	if (ret == 0)
		gr_pump_done(job->queue, chunk, chunk->huge_bytes && job->huge_base, direct);
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
		if (gr_pump_cancelled(job->cancel))
			return gr_fail(err, ECANCELED, "filling shared memory");
		ret = fill_chunk(job, chunk, err);
	}
	return ret;
}

int gr_pump_fill(struct gr_pump_queue *queue, uint64_t base, uint64_t huge_base, const struct gr_pump_source *source,
		 uint32_t nr_threads, int *cancel, struct gr_error *err)
{
	struct fill_job job = { .queue = queue, .base = base, .huge_base = huge_base, .source = source, .cancel = cancel };

	if (nr_threads > queue->nr_chunks)
		nr_threads = (uint32_t)queue->nr_chunks;
	return gr_workers_run(nr_threads, fill_chunks, &job, &job.stop, err);
}
