#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "gr_chunk_read.h"
#include "gr_internal.h"
#include "gr_read_pieces.h"
#include "gr_zeros.h"

#define MAX_CHUNK_PAGES 1024U /* UIO_MAXIOV: one vector for each page at worst */

/* Where a chunk begins: page `page` of run `run`. */
struct start {
	uint64_t run, page;
};

struct gr_chunk_reader {
	struct gr_pages_source source;
	struct gr_opened_source opened;
	struct gr_runs_view runs;
	uint64_t nr_chunks;
	uint32_t chunk_pages;
	struct start *starts;
};

/* Keep pages of `from` (a place in the buffer) up to `end`; `*to` is where they belong. */
static int keep(uint64_t start, uint64_t end, const char *from, char **to, struct gr_page_runs *left,
		struct gr_error *err)
{
	if (start == end)
		return 0;
	if (*to != from)
		memmove(*to, from, end - start);
	*to += end - start;
	return gr_page_runs_add(left, UINT64_MAX, start, end, err);
}

/* Close up the buffer over pages of zeros of one piece, [start, end) at `at`, and list what is left. */
static int drop_zeros(uint64_t start, uint64_t end, const char *at, char **to, struct gr_page_runs *left,
		      struct gr_error *err)
{
	const char *from = at;
	int ret = 0;

	for (uint64_t page = start; page < end && ret == 0; page += GR_PAGE_BYTES, at += GR_PAGE_BYTES) {
		if (!gr_is_zero_page(at))
			continue;
		ret = keep(start, page, from, to, left, err);
		start = page + GR_PAGE_BYTES;
		from = at + GR_PAGE_BYTES;
	}
	return ret < 0 ? ret : keep(start, end, from, to, left, err);
}

static unsigned int list_pieces(const struct gr_chunk_reader *reader, uint64_t index, struct iovec *pieces,
				uint64_t *bytes)
{
	struct start at = reader->starts[index];
	uint64_t left = reader->chunk_pages;
	unsigned int nr = 0;

	for (; left && at.run < reader->runs.nr_runs; at.run++, at.page = 0) {
		uint64_t pages = reader->runs.nr_pages[at.run] - at.page;

		if (pages > left)
			pages = left;
		if (!pages)
			continue;
		pieces[nr].iov_base = (void *)(reader->runs.vaddrs[at.run] + at.page * GR_PAGE_BYTES);
		pieces[nr++].iov_len = pages * GR_PAGE_BYTES;
		left -= pages;
	}
	*bytes = (reader->chunk_pages - left) * GR_PAGE_BYTES;
	return nr;
}

/* Whether pages of zeros are to be kept at `address`. */
static int is_kept(const struct gr_pages_source *source, uint64_t address)
{
	uint64_t low = 0, high = source->nr_kept;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (source->kept_ends[middle] <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < source->nr_kept && source->kept_starts[low] <= address;
}

int gr_chunk_read(const struct gr_chunk_reader *reader, uint64_t index, void *buffer, struct gr_page_runs *left,
		  struct gr_error *err)
{
	const struct gr_pages_source *source = &reader->source;
	struct iovec pieces[MAX_CHUNK_PAGES], rest[MAX_CHUNK_PAGES];
	char *at = buffer, *to = buffer;
	unsigned int nr;
	uint64_t bytes;
	int ret;

	if (index >= reader->nr_chunks)
		return gr_fail(err, EINVAL, "reading chunk %lu of %lu", index, reader->nr_chunks);
	left->nr_runs = left->total_pages = 0;
	nr = list_pieces(reader, index, pieces, &bytes);
	memcpy(rest, pieces, nr * sizeof(*pieces));
	ret = gr_read_pieces(&reader->opened, buffer, rest, nr, bytes, err);
	for (unsigned int i = 0; i < nr && ret == 0; at += pieces[i++].iov_len) {
		uint64_t start = (uint64_t)pieces[i].iov_base, end = start + pieces[i].iov_len;

		if (is_kept(source, start))
			ret = keep(start, end, at, &to, left, err);
		else
			ret = drop_zeros(start, end, at, &to, left, err);
	}
	return ret < 0 ? ret : (int)(to - (char *)buffer);
}

int gr_chunk_append(const struct gr_chunk_reader *reader, uint64_t index, const struct gr_page_runs *left,
		    struct gr_page_runs *stored, struct gr_error *err)
{
	/* Only a run that goes on from the chunk before is joined: two that touch may lie in two mappings. */
	uint64_t floor = reader->starts[index].page ? reader->runs.vaddrs[reader->starts[index].run] : UINT64_MAX;
	int ret = 0;

	for (uint64_t i = 0; i < left->nr_runs && ret == 0; i++, floor = UINT64_MAX)
		ret = gr_page_runs_add(stored, floor, left->vaddrs[i],
				       left->vaddrs[i] + left->nr_pages[i] * GR_PAGE_BYTES, err);
	return ret;
}

/* Note where every chunk begins, so that threads can take them in any order. */
static int cut(struct gr_chunk_reader *reader, struct gr_error *err)
{
	uint64_t total = 0, page = 0, index = 0;

	for (uint64_t i = 0; i < reader->runs.nr_runs; i++)
		if (__builtin_add_overflow(total, reader->runs.nr_pages[i], &total) || total > (1UL << 50))
			return gr_fail(err, EINVAL, "adding up %lu runs of pages", reader->runs.nr_runs);
	reader->nr_chunks = (total + reader->chunk_pages - 1) / reader->chunk_pages;
	reader->starts = calloc(reader->nr_chunks + 1, sizeof(*reader->starts));
	if (!reader->starts)
		return gr_fail(err, ENOMEM, "cutting %lu pages into chunks", total);
	for (uint64_t run = 0; run < reader->runs.nr_runs; page += reader->runs.nr_pages[run++])
		for (; index * reader->chunk_pages < page + reader->runs.nr_pages[run]; index++)
			reader->starts[index] = (struct start){ run, index * reader->chunk_pages - page };
	return 0;
}

int gr_chunk_reader_create(const struct gr_pages_source *source, const struct gr_runs_view *runs, uint32_t chunk_pages,
			   struct gr_chunk_reader **out, struct gr_error *err)
{
	struct gr_chunk_reader *reader;
	int ret;

	if (!chunk_pages || chunk_pages > MAX_CHUNK_PAGES)
		return gr_fail(err, EINVAL, "cutting into chunks of %u pages", chunk_pages);
	reader = calloc(1, sizeof(*reader));
	if (!reader)
		return gr_fail(err, ENOMEM, "reading %lu runs of pages", runs->nr_runs);
	*reader = (struct gr_chunk_reader){ .source = *source, .runs = *runs, .chunk_pages = chunk_pages };
	ret = gr_source_open(source, &reader->opened, err);
	if (ret == 0)
		ret = cut(reader, err);
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
	gr_source_close(&reader->opened);
	free(reader->starts);
	free(reader);
}

uint64_t gr_chunk_reader_nr_chunks(const struct gr_chunk_reader *reader)
{
	return reader->nr_chunks;
}
