#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>

#include "gr_crc64.h"
#include "gr_internal.h"
#include "gr_pages_out.h"
#include "gr_read_pieces.h"
#include "gr_workers.h"
#include "gr_zeros.h"

#define PAGE_BYTES 4096UL
/*
 * Pages that a thread reads, sums and writes at once: they stay in its core's second cache in between. A chunk has at
 * most one vector element per page, which is below the kernel's limit of 1024 (UIO_MAXIOV).
 */
#define CHUNK_PAGES 128UL
#define CHUNK_BYTES (CHUNK_PAGES * PAGE_BYTES)

/* A part of a run: what a chunk is made of, and what is left of it without pages of zeros. */
struct piece {
	uint64_t floor; /* where its run begins */
	uint64_t start, end;
};

/* What one thread works on. */
struct chunk {
	uint64_t index; /* of all chunks */
	char *buffer;
	struct iovec *vector;
	struct piece pieces[CHUNK_PAGES], left[CHUNK_PAGES];
	unsigned int nr_pieces, nr_left;
	uint64_t bytes; /* in the buffer */
	uint64_t offset; /* in the target */
};

struct job {
	const struct gr_pages_source *source;
	const struct gr_opened_source *opened;
	const struct gr_runs_view *runs;
	struct gr_pages_target *target;
	struct gr_page_runs *stored;
	int *cancel;
	int stop;
	/* Chunks are taken in order and get their places in order; reading and writing is done in any order between. */
	pthread_mutex_t lock; /* of what follows, target and stored */
	pthread_cond_t placed_one;
	uint64_t run, page; /* where the next chunk begins */
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

/* Take the next pieces of memory; returns their number, 0 when nothing is left. */
static unsigned int take(struct job *job, struct chunk *chunk)
{
	uint64_t left = CHUNK_PAGES;
	unsigned int nr = 0;

	pthread_mutex_lock(&job->lock);
	while (left && job->run < job->runs->nr_runs && !__atomic_load_n(&job->stop, __ATOMIC_RELAXED)) {
		uint64_t floor = job->runs->vaddrs[job->run], pages = job->runs->nr_pages[job->run] - job->page;
		uint64_t start = floor + job->page * PAGE_BYTES;

		if (pages > left)
			pages = left;
		if (pages)
			chunk->pieces[nr++] = (struct piece){ floor, start, start + pages * PAGE_BYTES };
		left -= pages;
		job->page += pages;
		if (job->page == job->runs->nr_pages[job->run]) {
			job->run++;
			job->page = 0;
		}
	}
	if (nr)
		chunk->index = job->nr_taken++;
	pthread_mutex_unlock(&job->lock);
	chunk->nr_pieces = nr;
	chunk->bytes = (CHUNK_PAGES - left) * PAGE_BYTES;
	return nr;
}

static int read_chunk(const struct job *job, struct chunk *chunk, struct gr_error *err)
{
	for (unsigned int i = 0; i < chunk->nr_pieces; i++)
		chunk->vector[i] = (struct iovec){ (void *)chunk->pieces[i].start,
						   chunk->pieces[i].end - chunk->pieces[i].start };
	return gr_read_pieces(job->opened, chunk->buffer, chunk->vector, chunk->nr_pieces, chunk->bytes, err);
}

static void keep(struct chunk *chunk, const struct piece *piece, uint64_t start, uint64_t end, const char *at)
{
	if (start == end)
		return;
	if (chunk->buffer + chunk->bytes != at)
		memmove(chunk->buffer + chunk->bytes, at, end - start);
	chunk->bytes += end - start;
	chunk->left[chunk->nr_left++] = (struct piece){ piece->floor, start, end };
}

/* Close up the buffer over pages of zeros, and list what is left. */
static void drop_zeros(const struct job *job, struct chunk *chunk)
{
	const char *at = chunk->buffer;

	chunk->bytes = chunk->nr_left = 0;
	for (unsigned int i = 0; i < chunk->nr_pieces; i++) {
		const struct piece *piece = &chunk->pieces[i];
		int all = gr_ranges_hold(job->source->kept_starts, job->source->kept_ends, job->source->nr_kept,
					 piece->floor);
		uint64_t start = piece->start;
		const char *from = at;

		for (uint64_t page = start; page < piece->end; page += PAGE_BYTES, at += PAGE_BYTES) {
			if (all || !gr_is_zero_page(at))
				continue;
			keep(chunk, piece, start, page, from);
			start = page + PAGE_BYTES;
			from = at + PAGE_BYTES;
		}
		keep(chunk, piece, start, piece->end, from);
	}
}

/* With the lock held and everything before in place. */
static int append(struct job *job, struct chunk *chunk, uint64_t crc, struct gr_error *err)
{
	chunk->offset = job->end;
	for (unsigned int i = 0; i < chunk->nr_left; i++) {
		const struct piece *left = &chunk->left[i];
		int ret = gr_page_runs_add(job->stored, left->floor, left->start, left->end, err);

		if (ret < 0)
			return ret;
	}
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

		if (job->cancel && __atomic_load_n(job->cancel, __ATOMIC_RELAXED))
			return gr_fail(err, ECANCELED, "writing pages");
		ret = read_chunk(job, chunk, err);
		if (ret < 0)
			return ret;
		drop_zeros(job, chunk);
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
	struct chunk *chunk = malloc(sizeof(*chunk));
	struct iovec *vector = malloc(CHUNK_PAGES * sizeof(*vector));
	char *buffer = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int ret;

	if (buffer == MAP_FAILED || !vector || !chunk) {
		ret = gr_fail(err, ENOMEM, "making room for pages");
	} else {
		chunk->buffer = buffer;
		chunk->vector = vector;
		ret = copy_chunks(opaque, chunk, &times.bytes, err);
	}
	times.end_ns = now_ns();
	leave(opaque, &times, ret);
	if (buffer != MAP_FAILED)
		munmap(buffer, CHUNK_BYTES);
	free(vector);
	free(chunk);
	return ret;
}

/* How many threads have something to do; refuses sizes that no task has. */
static int count_threads(const struct gr_runs_view *runs, uint32_t wanted, uint32_t *nr_threads, struct gr_error *err)
{
	uint64_t pages = 0, chunks;

	for (uint64_t i = 0; i < runs->nr_runs; i++)
		if (__builtin_add_overflow(pages, runs->nr_pages[i], &pages) || pages > (1UL << 50))
			return gr_fail(err, EINVAL, "adding up %lu runs of pages", runs->nr_runs);
	chunks = (pages + CHUNK_PAGES - 1) / CHUNK_PAGES;
	*nr_threads = chunks < wanted ? (uint32_t)chunks : wanted;
	return 0;
}

int gr_pages_out(const struct gr_pages_source *source, const struct gr_runs_view *runs, struct gr_pages_target *target,
		 int *cancel, struct gr_page_runs *stored, struct gr_error *err)
{
	struct gr_opened_source opened;
	struct job job = { .source = source, .opened = &opened, .runs = runs, .target = target, .stored = stored,
			   .cancel = cancel, .lock = PTHREAD_MUTEX_INITIALIZER,
			   .placed_one = PTHREAD_COND_INITIALIZER, .end = target->offset };
	uint32_t nr_threads = 1;
	int ret;

	memset(stored, 0, sizeof(*stored));
	target->crc64 = target->nr_times = 0;
	ret = gr_source_open(source, &opened, err);
	if (ret == 0)
		ret = count_threads(runs, target->nr_threads, &nr_threads, err);
	if (ret == 0)
		ret = gr_workers_run(nr_threads, work, &job, &job.stop, err);
	gr_source_close(&opened);
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
