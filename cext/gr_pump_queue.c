#include <stdlib.h>
#include <string.h>
#include <sys/param.h>

#include "gr_internal.h"
#include "gr_pump_internal.h"

#define BLOCK_PAGES (GR_HUGE_BYTES / GR_PAGE_BYTES)
#define ADDRESS_LIMIT (1UL << 63)

/* A task that pages are placed in needs a userfaultfd and a mapping of its image, each range a call to register it. */
#define MIN_PLACED_BYTES (16UL << 20)
#define MIN_PLACED_RANGE_BYTES (512UL << 10)

#define PE_PARENT 1u
#define PE_PRESENT 4u

struct piece {
	uint64_t address, bytes;
};

/* A queue in the making. Pieces of the block that is being read are held back until it is known what it becomes. */
struct builder {
	struct gr_pump_queue *queue;
	const struct gr_pump_huge *huge;
	uint64_t at_huge; /* the first range of `huge` that may matter */
	struct piece pieces[BLOCK_PAGES];
	uint64_t nr_pieces;
	uint64_t block;       /* its address; of no meaning without pieces */
	uint64_t block_bytes; /* of all pieces */
	uint64_t block_offset; /* of the first, in the file; the others follow it */
	int is_candidate;
	int made_huge;    /* whether a block of the range at hand became a huge chunk */
	int is_placeable; /* whether pages of the range at hand may be placed */
};

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

static int add_vector(struct gr_pump_queue *queue, struct gr_chunk *chunk, uint64_t address, uint64_t bytes,
		      struct gr_error *err)
{
	struct iovec *last = chunk->nr ? &queue->iovecs[queue->nr_iovecs - 1] : NULL;

	chunk->bytes += bytes;
	if (last && (uint64_t)last->iov_base + last->iov_len == address) {
		last->iov_len += bytes;
		return 0;
	}
	if (reserve((void **)&queue->iovecs, queue->nr_iovecs, &queue->max_iovecs, sizeof(struct iovec), err) < 0)
		return -err->code;
	queue->iovecs[queue->nr_iovecs++] = (struct iovec){ (void *)address, bytes };
	chunk->nr++;
	return 0;
}

static struct gr_chunk *last_chunk(struct gr_pump_queue *queue)
{
	return queue->nr_chunks ? &queue->chunks[queue->nr_chunks - 1] : NULL;
}

static struct gr_chunk *new_chunk(struct gr_pump_queue *queue, uint64_t file_offset, struct gr_error *err)
{
	if (reserve((void **)&queue->chunks, queue->nr_chunks, &queue->max_chunks, sizeof(struct gr_chunk), err) < 0)
		return NULL;
	queue->nr_chunks++;
	*last_chunk(queue) = (struct gr_chunk){ .file_offset = file_offset, .first = queue->nr_iovecs };
	return last_chunk(queue);
}

/* The plain chunk that can take bytes from file_offset on: the last one, if it has room and ends there, or a new one. */
static struct gr_chunk *open_chunk(struct gr_pump_queue *queue, uint64_t file_offset, struct gr_error *err)
{
	struct gr_chunk *last = last_chunk(queue);

	if (last && !last->full && !last->huge_bytes && last->bytes < queue->chunk_bytes && last->nr < GR_MAX_IOVECS &&
	    last->file_offset + last->bytes == file_offset)
		return last;
	return new_chunk(queue, file_offset, err);
}

/* Queue plain reads. Cuts fall on borders of huge pages, so that no two threads fault in the same one. */
static int add_plain(const struct builder *builder, uint64_t address, uint64_t bytes, uint64_t file_offset,
		     struct gr_error *err)
{
	struct gr_pump_queue *queue = builder->queue;

	while (bytes) {
		struct gr_chunk *chunk = open_chunk(queue, file_offset, err);
		uint64_t part, border;

		if (!chunk)
			return -err->code;
		part = queue->chunk_bytes - chunk->bytes;
		if (part < bytes) {
			border = (address + part) & ~(GR_HUGE_BYTES - 1);
			if (border > address) {
				part = border - address;
			} else if (chunk->bytes && address % GR_HUGE_BYTES == 0) {
				chunk->full = 1;
				continue;
			}
		} else {
			part = bytes;
		}
		if (add_vector(queue, chunk, address, part, err) < 0)
			return -err->code;
		chunk->full = part < bytes;
		chunk->unplaceable |= !builder->is_placeable;
		address += part;
		file_offset += part;
		bytes -= part;
	}
	return 0;
}

/* The huge chunk that can take the block at hand: the last one, if block and file go on there, or a new one. */
static struct gr_chunk *open_huge_chunk(const struct builder *builder, struct gr_error *err)
{
	struct gr_pump_queue *queue = builder->queue;
	struct gr_chunk *last = last_chunk(queue);
	uint64_t limit = queue->chunk_bytes < GR_PUMP_STAGING_BYTES ? queue->chunk_bytes : GR_PUMP_STAGING_BYTES;

	if (last && last->huge_bytes && last->huge_start + last->huge_bytes == builder->block &&
	    last->huge_bytes + GR_HUGE_BYTES <= limit && last->nr + builder->nr_pieces <= GR_MAX_IOVECS &&
	    last->file_offset + last->bytes == builder->block_offset)
		return last;
	last = new_chunk(queue, builder->block_offset, err);
	if (last)
		last->huge_start = builder->block;
	return last;
}

/* Queue what was held back. */
static int flush_block(struct builder *builder, struct gr_error *err)
{
	int is_huge = builder->is_candidate && builder->block_bytes / GR_PAGE_BYTES >= builder->huge->min_pages;
	struct gr_chunk *chunk = NULL;
	uint64_t offset = builder->block_offset;

	if (!builder->nr_pieces)
		return 0;
	if (is_huge) {
		chunk = open_huge_chunk(builder, err);
		if (!chunk)
			return -err->code;
		chunk->huge_bytes += GR_HUGE_BYTES;
		builder->queue->huge_bytes += builder->block_bytes;
		builder->made_huge = 1;
	}
	for (uint64_t i = 0; i < builder->nr_pieces; i++) {
		const struct piece *piece = &builder->pieces[i];
		int ret = is_huge ? add_vector(builder->queue, chunk, piece->address, piece->bytes, err) :
				    add_plain(builder, piece->address, piece->bytes, offset, err);

		if (ret < 0)
			return ret;
		offset += piece->bytes;
	}
	builder->nr_pieces = 0;
	builder->block_bytes = 0;
	return 0;
}

/* Whether the policy wants the block at `block`, which lies in a range that ends at `range_end`. */
static int is_candidate(struct builder *builder, uint64_t block, uint64_t range_start, uint64_t range_end)
{
	const struct gr_pump_huge *huge = builder->huge;

	if (block < range_start || block + GR_HUGE_BYTES > range_end)
		return 0;
	if (!huge->starts)
		return 1;
	while (builder->at_huge < huge->nr && huge->ends[builder->at_huge] <= block)
		builder->at_huge++;
	return builder->at_huge < huge->nr && huge->starts[builder->at_huge] <= block &&
	       block + GR_HUGE_BYTES <= huge->ends[builder->at_huge];
}

/* Queue pages of a range that may have huge pages: block by block. */
static int add_in_blocks(struct builder *builder, uint64_t address, uint64_t bytes, uint64_t file_offset,
			 uint64_t range_start, uint64_t range_end, struct gr_error *err)
{
	while (bytes) {
		uint64_t block = address & ~(GR_HUGE_BYTES - 1);
		uint64_t part = block + GR_HUGE_BYTES - address;

		if (part > bytes)
			part = bytes;
		if (builder->nr_pieces && builder->block != block && flush_block(builder, err) < 0)
			return -err->code;
		if (!builder->nr_pieces) {
			builder->block = block;
			builder->block_offset = file_offset;
			builder->is_candidate = is_candidate(builder, block, range_start, range_end);
		}
		builder->pieces[builder->nr_pieces++] = (struct piece){ address, part };
		builder->block_bytes += part;
		address += part;
		file_offset += part;
		bytes -= part;
	}
	return 0;
}

/* Queue the part [start, stop) of an entry, which lies in range i. */
static int add_part(struct builder *builder, const struct gr_pump_ranges *ranges, uint64_t i, uint64_t start,
		    uint64_t stop, uint64_t file_offset, struct gr_error *err)
{
	if (ranges->kinds[i] == GR_PUMP_SKIP)
		return 0;
	builder->queue->total_bytes += stop - start;
	ranges->touched[i] |= GR_PUMP_WRITTEN;
	builder->is_placeable = ranges->touched[i] & GR_PUMP_PLACED;
	if (ranges->kinds[i] != GR_PUMP_FILL_HUGE)
		return add_plain(builder, start, stop - start, file_offset, err);
	return add_in_blocks(builder, start, stop - start, file_offset, ranges->starts[i], ranges->ends[i], err);
}

/* No page of range i follows: its last block is known. */
static int leave_range(struct builder *builder, const struct gr_pump_ranges *ranges, uint64_t i, struct gr_error *err)
{
	int ret = flush_block(builder, err);

	if (builder->made_huge)
		ranges->touched[i] |= GR_PUMP_MOVED;
	builder->made_huge = 0;
	return ret;
}

/* Queue the entry [start, end), which may reach over several ranges that touch; `*at` is the range at hand. */
static int add_entry(struct builder *builder, const struct gr_pump_ranges *ranges, uint64_t *at, uint64_t start,
		     uint64_t end, uint64_t file_offset, struct gr_error *err)
{
	while (start < end) {
		uint64_t stop;
		int ret = 0;

		for (; *at < ranges->nr && ranges->ends[*at] <= start; ++*at)
			if (leave_range(builder, ranges, *at, err) < 0)
				return -err->code;
		if (*at >= ranges->nr || start < ranges->starts[*at])
			return gr_fail(err, EINVAL, "pages at %#lx-%#lx lie outside of every mapping", start, end);
		if (ranges->kinds[*at] == GR_PUMP_REFUSE)
			return gr_fail(err, EINVAL, "pages at %#lx-%#lx lie in a mapping that has none", start, end);
		stop = end < ranges->ends[*at] ? end : ranges->ends[*at];
		ret = add_part(builder, ranges, *at, start, stop, file_offset, err);
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
	if (vaddr % GR_PAGE_BYTES || vaddr >= ADDRESS_LIMIT)
		return gr_fail(err, EINVAL, "entry %lu: address %#lx cannot be a page's", index, vaddr);
	if (nr_pages == 0 || nr_pages > (ADDRESS_LIMIT - vaddr) / GR_PAGE_BYTES)
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

		if (start % GR_PAGE_BYTES || end % GR_PAGE_BYTES || start < previous_end || end <= start)
			return gr_fail(err, EINVAL, "mapping %#lx-%#lx is empty or out of order", start, end);
		previous_end = end;
		ranges->touched[i] = 0;
	}
	return 0;
}

static int check_entries(const struct gr_pump_pagemap *pagemap, uint64_t file_bytes, struct gr_error *err)
{
	uint64_t previous_end = 0, file_offset = 0;

	for (uint64_t i = 0; i < pagemap->nr; i++) {
		uint64_t start = pagemap->vaddrs[i], bytes;

		if (check_entry(start, pagemap->nr_pages[i], pagemap->flags[i], previous_end, i, err) < 0)
			return -err->code;
		bytes = pagemap->nr_pages[i] * GR_PAGE_BYTES;
		if (bytes > file_bytes - file_offset)
			return gr_fail(err, EINVAL, "the pages at %#lx-%#lx lie behind the end of a file of %lu bytes",
				       start, start + bytes, file_bytes);
		file_offset += bytes;
		previous_end = start + bytes;
	}
	return 0;
}

/* Find the ranges whose pages may be placed: empty ones, where there is so much that it pays. */
static void mark_placed(const struct gr_pump_pagemap *pagemap, const struct gr_pump_ranges *ranges)
{
	uint64_t i = 0, total = 0;

	for (uint64_t at = 0; at < ranges->nr; at++) {
		uint64_t bytes = 0;
		int is_empty = ranges->kinds[at] == GR_PUMP_FILL_EMPTY || ranges->kinds[at] == GR_PUMP_FILL_HUGE;

		/* What an entry has beyond the range belongs to those behind it. */
		for (; i < pagemap->nr && pagemap->vaddrs[i] < ranges->ends[at]; i++) {
			uint64_t start = pagemap->vaddrs[i], end = start + pagemap->nr_pages[i] * GR_PAGE_BYTES;

			bytes += MIN(end, ranges->ends[at]) - MAX(start, ranges->starts[at]);
			if (end > ranges->ends[at])
				break;
		}
		if (is_empty && bytes >= MIN_PLACED_RANGE_BYTES) {
			ranges->touched[at] = GR_PUMP_PLACED;
			total += bytes;
		}
	}
	if (total < MIN_PLACED_BYTES)
		memset(ranges->touched, 0, ranges->nr);
}

static int add_entries(struct builder *builder, const struct gr_pump_pagemap *pagemap,
		       const struct gr_pump_ranges *ranges, struct gr_error *err)
{
	uint64_t file_offset = 0, at = 0;

	for (uint64_t i = 0; i < pagemap->nr; i++) {
		uint64_t start = pagemap->vaddrs[i], bytes = pagemap->nr_pages[i] * GR_PAGE_BYTES;

		if (add_entry(builder, ranges, &at, start, start + bytes, file_offset, err) < 0)
			return -err->code;
		file_offset += bytes;
	}
	return at < ranges->nr ? leave_range(builder, ranges, at, err) : 0;
}

static int build(struct builder *builder, const struct gr_pump_pagemap *pagemap, const struct gr_pump_ranges *ranges,
		 uint64_t file_bytes, struct gr_error *err)
{
	if (check_ranges(ranges, err) < 0 || check_entries(pagemap, file_bytes, err) < 0)
		return -err->code;
	mark_placed(pagemap, ranges);
	return add_entries(builder, pagemap, ranges, err);
}

int gr_pump_queue_create(const struct gr_pump_pagemap *pagemap, const struct gr_pump_ranges *ranges,
			 const struct gr_pump_huge *huge, uint64_t file_bytes, uint64_t chunk_bytes,
			 struct gr_pump_queue **out, struct gr_error *err)
{
	struct builder builder = { .queue = calloc(1, sizeof(struct gr_pump_queue)), .huge = huge };
	int ret;

	if (!builder.queue)
		return gr_fail(err, ENOMEM, "queueing %lu reads", pagemap->nr);
	builder.queue->chunk_bytes = chunk_bytes < GR_PAGE_BYTES ? GR_PAGE_BYTES : chunk_bytes & ~(GR_PAGE_BYTES - 1);
	ret = build(&builder, pagemap, ranges, file_bytes, err);
	if (ret < 0)
		gr_pump_queue_destroy(builder.queue);
	else
		*out = builder.queue;
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

void gr_pump_queue_counts(const struct gr_pump_queue *queue, struct gr_pump_counts *out)
{
	*out = (struct gr_pump_counts){
		.total_bytes = queue->total_bytes,
		.huge_bytes = queue->huge_bytes,
		.nr_chunks = queue->nr_chunks,
		.done_bytes = __atomic_load_n(&queue->done_bytes, __ATOMIC_RELAXED),
		.moved_bytes = __atomic_load_n(&queue->moved_bytes, __ATOMIC_RELAXED),
		.direct_bytes = __atomic_load_n(&queue->direct_bytes, __ATOMIC_RELAXED),
		.placed_bytes = __atomic_load_n(&queue->placed_bytes, __ATOMIC_RELAXED),
	};
}
