#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "gr_chunk_read.h"
#include "gr_crc64.h"
#include "gr_internal.h"
#include "gr_pages_out.h"
#include "gr_workers.h"

/* Pages that a thread reads, sums and writes at once: they stay in its core's second cache in between. */
#define CHUNK_PAGES 128U
/* A disk that is written to past the page cache likes larger writes better than warm ones. */
#define DIRECT_CHUNK_PAGES 1024U

/* What one thread works on. */
struct chunk {
	uint64_t index;
	char *buffer;
	struct gr_page_runs left; /* what is in the buffer */
	uint64_t bytes;
	uint64_t offset; /* in the target */
};

struct job {
	const struct gr_chunk_reader *reader;
	struct gr_pages_target *target;
	struct gr_page_runs *stored;
	uint32_t chunk_pages;
	int *cancel;
	int stop;
	/* Chunks are taken in order and get their places in order; reading and writing is done in any order between. */
	pthread_mutex_t lock; /* of what follows, target and stored */
	pthread_cond_t placed_one;
	uint64_t nr_taken, nr_placed;
	uint64_t end; /* of what has its place in the target */
};

static int write_all(const struct job *job, const char *buffer, uint64_t bytes, uint64_t offset, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pwrite(job->target->fd, buffer, bytes, (off_t)offset);

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

/* Take the next chunk; returns whether there is one. */
static int take(struct job *job, struct chunk *chunk)
{
	int is_there;

	pthread_mutex_lock(&job->lock);
	is_there = job->nr_taken < gr_chunk_reader_nr_chunks(job->reader) &&
		   !__atomic_load_n(&job->stop, __ATOMIC_RELAXED);
	if (is_there)
		chunk->index = job->nr_taken++;
	pthread_mutex_unlock(&job->lock);
	return is_there;
}

/* With the lock held and everything before in place. */
static int append(struct job *job, struct chunk *chunk, uint64_t crc, struct gr_error *err)
{
	int ret = gr_chunk_append(job->reader, chunk->index, &chunk->left, job->stored, err);

	if (ret < 0)
		return ret;
	chunk->offset = job->end;
	job->target->crc64 = gr_crc64_combine(job->target->crc64, crc, chunk->bytes);
	job->end += chunk->bytes;
	job->nr_placed++;
	pthread_cond_broadcast(&job->placed_one);
	return 0;
}

/* Give the chunk its place behind all that were taken before. Their threads are still reading, or have failed. */
static int place(struct job *job, struct chunk *chunk, struct gr_error *err)
{
	uint64_t crc = gr_crc64(0, chunk->buffer, chunk->bytes);
	int ret = 0;

	pthread_mutex_lock(&job->lock);
	while (job->nr_placed != chunk->index && !__atomic_load_n(&job->stop, __ATOMIC_RELAXED))
		pthread_cond_wait(&job->placed_one, &job->lock);
	if (job->nr_placed == chunk->index)
		ret = append(job, chunk, crc, err);
	else
		chunk->bytes = 0; /* another thread has failed and says why */
	pthread_mutex_unlock(&job->lock);
	return ret;
}

static int copy_chunks(struct job *job, struct chunk *chunk, uint64_t *bytes, struct gr_error *err)
{
	while (take(job, chunk)) {
		int ret;

		if (gr_is_cancelled(job->cancel))
			return gr_fail(err, ECANCELED, "writing pages");
		ret = gr_chunk_read(job->reader, chunk->index, chunk->buffer, &chunk->left, err);
		if (ret < 0)
			return ret;
		chunk->bytes = (uint64_t)ret;
		ret = place(job, chunk, err);
		if (ret == 0)
			ret = write_all(job, chunk->buffer, chunk->bytes, chunk->offset, err);
		if (ret < 0)
			return ret;
		*bytes += chunk->bytes;
		if (job->target->done_bytes)
			__atomic_fetch_add(job->target->done_bytes, chunk->bytes, __ATOMIC_RELAXED);
	}
	return 0;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Note what this thread did, and after a failure let the others see it. */
static void leave(struct job *job, const struct gr_worker_times *times, int ret)
{
	struct gr_pages_target *target = job->target;

	pthread_mutex_lock(&job->lock);
	if (target->times && target->nr_times < target->max_times)
		target->times[target->nr_times++] = *times;
	if (ret < 0) {
		__atomic_store_n(&job->stop, 1, __ATOMIC_RELAXED);
		pthread_cond_broadcast(&job->placed_one);
	}
	pthread_mutex_unlock(&job->lock);
}

static int work(void *opaque, struct gr_error *err)
{
	struct gr_worker_times times = { .begin_ns = now_ns() };
	struct job *job = opaque;
	struct chunk chunk = { 0 };
	size_t size = job->chunk_pages * GR_PAGE_BYTES;
	int ret;

	chunk.buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (chunk.buffer == MAP_FAILED)
		ret = gr_fail(err, ENOMEM, "making room for pages");
	else
		ret = copy_chunks(job, &chunk, &times.bytes, err);
	times.end_ns = now_ns();
	leave(job, &times, ret);
	if (chunk.buffer != MAP_FAILED)
		munmap(chunk.buffer, size);
	gr_page_runs_destroy(&chunk.left);
	return ret;
}

int gr_pages_out(const struct gr_pages_source *source, const struct gr_runs_view *runs, struct gr_pages_target *target,
		 int *cancel, struct gr_page_runs *stored, struct gr_error *err)
{
	struct gr_chunk_reader *reader = NULL;
	struct job job = { .target = target, .stored = stored, .cancel = cancel, .lock = PTHREAD_MUTEX_INITIALIZER,
			   .placed_one = PTHREAD_COND_INITIALIZER, .end = target->offset };
	uint64_t nr_chunks;
	int ret;

	memset(stored, 0, sizeof(*stored));
	target->crc64 = target->nr_times = 0;
	job.chunk_pages = fcntl(target->fd, F_GETFL) & O_DIRECT ? DIRECT_CHUNK_PAGES : CHUNK_PAGES;
	ret = gr_chunk_reader_create(source, runs, job.chunk_pages, &reader, err);
	if (ret < 0)
		return ret;
	job.reader = reader;
	nr_chunks = gr_chunk_reader_nr_chunks(reader);
	ret = gr_workers_run(nr_chunks < target->nr_threads ? (uint32_t)nr_chunks : target->nr_threads, work, &job,
			     &job.stop, err);
	gr_chunk_reader_destroy(reader);
	if (ret < 0)
		gr_page_runs_destroy(stored);
	return ret;
}

int gr_pages_flush(int fd, uint64_t offset, uint64_t bytes, int wait, struct gr_error *err)
{
	unsigned int how = SYNC_FILE_RANGE_WRITE;

	if (wait)
		how |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
	if (sync_file_range(fd, (off64_t)offset, (off64_t)bytes, how) < 0)
		return gr_fail(err, errno, "bringing %lu bytes at offset %lu to the disk", bytes, offset);
	return 0;
}
