#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "gr_agent.h"
#include "gr_internal.h"
#include "gr_pump.h"
#include "gr_workers.h"

#define PAGE_BYTES 4096UL
#define HUGE_BYTES (2UL << 20)
#define MAX_IOVECS 1024UL /* UIO_MAXIOV */
/* A thread is woken once for this much, unless a single chunk is larger. */
#define WAKE_BYTES (4UL << 20)
#define ADDRESS_LIMIT (1UL << 63)

#define PE_PARENT 1u
#define PE_PRESENT 4u

struct chunk {
	uint64_t file_offset;
	uint64_t first; /* index into iovecs */
	uint64_t bytes;
	uint32_t nr;
	uint32_t full; /* takes no more, even if it is a bit below the size wanted */
};

struct gr_pump_queue {
	struct iovec *iovecs;
	uint64_t nr_iovecs, max_iovecs;
	struct chunk *chunks;
	uint64_t nr_chunks, max_chunks;
	uint64_t chunk_bytes, total_bytes;
	uint64_t next;       /* atomic: the next chunk that nobody took */
	uint64_t done_bytes; /* atomic */
};

static int is_cancelled(const int *cancel)
{
	return cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED);
}

static int reserve(void **array, uint64_t nr, uint64_t *max, size_t size, struct gr_error *err)
{
	uint64_t more = *max ? *max * 2 : 256;
	void *grown;

	if (nr < *max)
		return 0;
	grown = realloc(*array, more * size);
	if (!grown)
		return gr_fail(err, ENOMEM, "queueing %lu reads", nr);
	*array = grown;
	*max = more;
	return 0;
}

/* The chunk that can take bytes from file_offset on: the last one, if it has room and ends there, else a new one. */
static struct chunk *open_chunk(struct gr_pump_queue *queue, uint64_t file_offset, struct gr_error *err)
{
	struct chunk *last = queue->nr_chunks ? &queue->chunks[queue->nr_chunks - 1] : NULL;

	if (last && !last->full && last->bytes < queue->chunk_bytes && last->nr < MAX_IOVECS &&
	    last->file_offset + last->bytes == file_offset)
		return last;
	if (reserve((void **)&queue->chunks, queue->nr_chunks, &queue->max_chunks, sizeof(*last), err) < 0)
		return NULL;
	last = &queue->chunks[queue->nr_chunks++];
	*last = (struct chunk){ .file_offset = file_offset, .first = queue->nr_iovecs };
	return last;
}

/* Queue one range of memory. Cuts fall on borders of huge pages, so that no two threads fault in the same one. */
static int add_range(struct gr_pump_queue *queue, uint64_t address, uint64_t bytes, uint64_t file_offset,
		     struct gr_error *err)
{
	queue->total_bytes += bytes;
	while (bytes) {
		struct chunk *chunk = open_chunk(queue, file_offset, err);
		uint64_t part, border;

		if (!chunk)
			return -err->code;
		part = queue->chunk_bytes - chunk->bytes;
		if (part < bytes) {
			border = (address + part) & ~(HUGE_BYTES - 1);
			if (border > address)
				part = border - address;
		} else {
			part = bytes;
		}
		if (reserve((void **)&queue->iovecs, queue->nr_iovecs, &queue->max_iovecs, sizeof(struct iovec),
			    err) < 0)
			return -err->code;
		queue->iovecs[queue->nr_iovecs++] = (struct iovec){ (void *)address, part };
		chunk->bytes += part;
		chunk->nr++;
		chunk->full = part < bytes;
		address += part;
		file_offset += part;
		bytes -= part;
	}
	return 0;
}

/* Queue the entry [start, end), which may reach over several ranges that touch; `*at` is the first that may matter. */
static int add_entry(struct gr_pump_queue *queue, const struct gr_pump_ranges *ranges, uint64_t *at, uint64_t start,
		     uint64_t end, uint64_t file_offset, struct gr_error *err)
{
	while (*at < ranges->nr && ranges->ends[*at] <= start)
		++*at;
	for (uint64_t i = *at; start < end; i++) {
		uint64_t stop;
		int ret = 0;

		if (i >= ranges->nr || start < ranges->starts[i])
			return gr_fail(err, EINVAL, "pages at %#lx-%#lx lie outside of every mapping", start, end);
		if (ranges->kinds[i] == GR_PUMP_REFUSE)
			return gr_fail(err, EINVAL, "pages at %#lx-%#lx lie in a mapping that has none", start, end);
		stop = end < ranges->ends[i] ? end : ranges->ends[i];
		if (ranges->kinds[i] == GR_PUMP_FILL) {
			ret = add_range(queue, start, stop - start, file_offset, err);
			ranges->touched[i] = 1;
		}
		if (ret < 0)
			return ret;
		file_offset += stop - start;
		start = stop;
	}
	return 0;
}

static int check_entry(uint64_t vaddr, uint64_t nr_pages, uint32_t flags, uint64_t previous_end, uint64_t index,
		       struct gr_error *err)
{
	if (vaddr % PAGE_BYTES || vaddr >= ADDRESS_LIMIT)
		return gr_fail(err, EINVAL, "entry %lu: address %#lx cannot be a page's", index, vaddr);
	if (nr_pages == 0 || nr_pages > (ADDRESS_LIMIT - vaddr) / PAGE_BYTES)
		return gr_fail(err, EINVAL, "entry %lu: %lu pages at %#lx", index, nr_pages, vaddr);
	if (vaddr < previous_end)
		return gr_fail(err, EINVAL, "entry %lu: %#lx is not behind the entry before", index, vaddr);
	if (flags & PE_PARENT)
		return gr_fail(err, EINVAL, "entry %lu: the pages at %#lx are in a parent image", index, vaddr);
	if (!(flags & PE_PRESENT))
		return gr_fail(err, EINVAL, "entry %lu: the pages at %#lx are not stored", index, vaddr);
	return 0;
}

static int check_ranges(const struct gr_pump_ranges *ranges, struct gr_error *err)
{
	uint64_t previous_end = 0;

	for (uint64_t i = 0; i < ranges->nr; i++) {
		uint64_t start = ranges->starts[i], end = ranges->ends[i];

		if (start % PAGE_BYTES || end % PAGE_BYTES || start < previous_end || end <= start)
			return gr_fail(err, EINVAL, "mapping %#lx-%#lx is empty or out of order", start, end);
		previous_end = end;
		ranges->touched[i] = 0;
	}
	return 0;
}

static int build(struct gr_pump_queue *queue, const struct gr_pump_pagemap *pagemap,
		 const struct gr_pump_ranges *ranges, uint64_t file_bytes, struct gr_error *err)
{
	uint64_t previous_end = 0, file_offset = 0, at = 0;
	int ret = check_ranges(ranges, err);

	for (uint64_t i = 0; ret == 0 && i < pagemap->nr; i++) {
		uint64_t start = pagemap->vaddrs[i], bytes;

		ret = check_entry(start, pagemap->nr_pages[i], pagemap->flags[i], previous_end, i, err);
		if (ret < 0)
			break;
		bytes = pagemap->nr_pages[i] * PAGE_BYTES;
		if (bytes > file_bytes - file_offset)
			return gr_fail(err, EINVAL, "the pages at %#lx-%#lx lie behind the end of a file of %lu bytes",
				       start, start + bytes, file_bytes);
		ret = add_entry(queue, ranges, &at, start, start + bytes, file_offset, err);
		file_offset += bytes;
		previous_end = start + bytes;
	}
	return ret;
}

int gr_pump_queue_create(const struct gr_pump_pagemap *pagemap, const struct gr_pump_ranges *ranges,
			 uint64_t file_bytes, uint64_t chunk_bytes, struct gr_pump_queue **out, struct gr_error *err)
{
	struct gr_pump_queue *queue = calloc(1, sizeof(*queue));
	int ret;

	if (!queue)
		return gr_fail(err, ENOMEM, "queueing %lu reads", pagemap->nr);
	queue->chunk_bytes = chunk_bytes < PAGE_BYTES ? PAGE_BYTES : chunk_bytes & ~(PAGE_BYTES - 1);
	ret = build(queue, pagemap, ranges, file_bytes, err);
	if (ret < 0)
		gr_pump_queue_destroy(queue);
	else
		*out = queue;
	return ret;
}

void gr_pump_queue_destroy(struct gr_pump_queue *queue)
{
	if (!queue)
		return;
	free(queue->iovecs);
	free(queue->chunks);
	free(queue);
}

uint64_t gr_pump_queue_total_bytes(const struct gr_pump_queue *queue)
{
	return queue->total_bytes;
}

uint64_t gr_pump_queue_done_bytes(const struct gr_pump_queue *queue)
{
	return __atomic_load_n(&queue->done_bytes, __ATOMIC_RELAXED);
}

uint64_t gr_pump_queue_nr_chunks(const struct gr_pump_queue *queue)
{
	return queue->nr_chunks;
}

static const struct chunk *take(struct gr_pump_queue *queue)
{
	uint64_t index = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);

	return index < queue->nr_chunks ? &queue->chunks[index] : NULL;
}

/* A batch under construction in a slot: calls grow up from its start, vectors down from its end. */
struct filling {
	struct gr_batch *batch;
	char *vectors;
	uint64_t bytes;
};

/* The bytes of vectors that a single chunk may need fit next to its call: 1024 vectors are 16 KiB of 120. */
static int add_to_batch(struct filling *filling, const struct gr_pump_queue *queue, const struct chunk *chunk,
			int pages_fd)
{
	struct gr_call *call = &filling->batch->calls[filling->batch->nr_calls];
	size_t size = chunk->nr * sizeof(struct iovec);

	if (filling->batch->nr_calls && filling->bytes + chunk->bytes > WAKE_BYTES)
		return 0;
	if ((size_t)(filling->vectors - (char *)call) < size + sizeof(*call))
		return 0;
	filling->vectors -= size;
	memcpy(filling->vectors, &queue->iovecs[chunk->first], size);
	*call = (struct gr_call){ .nr = __NR_preadv,
				  .args = { (uint64_t)pages_fd, (uint64_t)filling->vectors, chunk->nr,
					    chunk->file_offset },
				  .expect = GR_EXPECT_EXACT,
				  .want = (int64_t)chunk->bytes };
	filling->bytes += chunk->bytes;
	filling->batch->nr_calls++;
	return 1;
}

static int check_batch(const struct gr_batch *batch, int pid, struct gr_error *err)
{
	const struct gr_call *call;
	const struct iovec *first;

	if (!batch->status)
		return 0;
	call = &batch->calls[batch->next];
	first = (const struct iovec *)call->args[1];
	if (call->result < 0)
		return gr_fail(err, (int)-call->result, "reading %ld bytes of pages into %p of task %d",
			       call->want, first->iov_base, pid);
	return gr_fail(err, EIO, "reading pages into %p of task %d: only %ld of %ld bytes came from the pages file",
		       first->iov_base, pid, call->result, call->want);
}

int gr_pump_run(struct gr_region *region, uint32_t slot, int pid, int pages_fd, struct gr_pump_queue *queue,
		int *cancel, struct gr_error *err)
{
	char *base = (char *)region->slots + (uint64_t)slot * GR_SLOT_BYTES + GR_SLOT_BATCH_OFFSET;
	struct gr_batch *batch = (struct gr_batch *)base;
	const struct chunk *chunk = take(queue);

	while (chunk) {
		struct filling filling = { .batch = batch, .vectors = base + GR_SLOT_BATCH_BYTES };
		int ret;

		if (is_cancelled(cancel))
			return gr_fail(err, ECANCELED, "filling the memory of task %d", pid);
		memset(batch, 0, sizeof(*batch));
		while (chunk && add_to_batch(&filling, queue, chunk, pages_fd))
			chunk = take(queue);
		ret = gr_slot_run(region, slot, pid, cancel, err);
		if (ret == 0)
			ret = check_batch(batch, pid, err);
		if (ret < 0)
			return ret;
		__atomic_fetch_add(&queue->done_bytes, filling.bytes, __ATOMIC_RELAXED);
	}
	return 0;
}

struct fill_job {
	struct gr_pump_queue *queue;
	uint64_t base;
	int pages_fd;
	int *cancel;
	int stop;
};

/* Read a whole chunk into `vectors`, which are used up on the way. */
static int read_chunk(const struct chunk *chunk, struct iovec *vectors, int pages_fd, struct gr_error *err)
{
	uint64_t offset = chunk->file_offset, left = chunk->bytes;
	uint32_t nr = chunk->nr;

	while (left) {
		ssize_t n = preadv(pages_fd, vectors, (int)nr, (off_t)offset);

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

static int fill_chunks(void *opaque, struct gr_error *err)
{
	struct fill_job *job = opaque;
	struct iovec vectors[MAX_IOVECS];
	const struct chunk *chunk;

	while ((chunk = take(job->queue))) {
		int ret;

		if (__atomic_load_n(&job->stop, __ATOMIC_RELAXED))
			return 0;
		if (is_cancelled(job->cancel))
			return gr_fail(err, ECANCELED, "filling shared memory");
		for (uint32_t i = 0; i < chunk->nr; i++) {
			const struct iovec *from = &job->queue->iovecs[chunk->first + i];

			vectors[i] = (struct iovec){ (char *)from->iov_base + job->base, from->iov_len };
		}
		ret = read_chunk(chunk, vectors, job->pages_fd, err);
		if (ret < 0)
			return ret;
		__atomic_fetch_add(&job->queue->done_bytes, chunk->bytes, __ATOMIC_RELAXED);
	}
	return 0;
}

int gr_pump_fill(struct gr_pump_queue *queue, uint64_t base, int pages_fd, uint32_t nr_threads, int *cancel,
		 struct gr_error *err)
{
	struct fill_job job = { .queue = queue, .base = base, .pages_fd = pages_fd, .cancel = cancel };

	if (nr_threads > queue->nr_chunks)
		nr_threads = (uint32_t)queue->nr_chunks;
	return gr_workers_run(nr_threads, fill_chunks, &job, &job.stop, err);
}
