/* One address space that misses pages: what lies where in it, what is in place, and how a page gets there. */
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "gr_lazy_internal.h"

void gr_lazy_lock_init(pthread_rwlock_t *lock)
{
	pthread_rwlockattr_t attributes;

	/* Events are rare and somebody waits for them; pages come all the time. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(lock, &attributes);
}

static uint64_t bitmap_words(const struct gr_lazy_source *source)
{
	return source->nr_pages / 64 + 1;
}

static int init(struct gr_lazy_mm *mm, const struct gr_lazy_source *source, int uffd, uint64_t nr_segments)
{
	mm->segments = calloc(nr_segments + 1, sizeof(*mm->segments));
	mm->done = calloc(bitmap_words(source), sizeof(*mm->done));
	if (!mm->segments || !mm->done) {
		gr_lazy_mm_let_go(mm);
		return -ENOMEM;
	}
	mm->max_segments = nr_segments + 1;
	mm->nr_segments = nr_segments;
	mm->source = source;
	mm->next_span = mm->next_page = 0;
	mm->window_end = mm->window_pages = 0;
	mm->generation++;
	mm->uffd = uffd;
	return 0;
}

int gr_lazy_mm_init(struct gr_lazy_mm *mm, const struct gr_lazy_source *source, int uffd)
{
	int ret = init(mm, source, uffd, source->nr_segments);

	if (ret < 0)
		return ret;
	memcpy(mm->segments, source->segments, source->nr_segments * sizeof(*mm->segments));
	mm->remaining = source->nr_pages;
	mm->moved = false;
	return 0;
}

int gr_lazy_mm_init_fork(struct gr_lazy_mm *mm, const struct gr_lazy_mm *parent, int uffd)
{
	int ret = init(mm, parent->source, uffd, parent->nr_segments);

	if (ret < 0)
		return ret;
	memcpy(mm->segments, parent->segments, parent->nr_segments * sizeof(*mm->segments));
	memcpy(mm->done, parent->done, bitmap_words(parent->source) * sizeof(*mm->done));
	mm->remaining = parent->remaining;
	mm->moved = parent->moved;
	return 0;
}

void gr_lazy_mm_let_go(struct gr_lazy_mm *mm)
{
	free(mm->segments);
	free(mm->done);
	mm->segments = NULL;
	mm->done = NULL;
	mm->nr_segments = mm->max_segments = 0;
	mm->uffd = -1;
}

/* ---- what lies where */

/* The first segment that ends behind `address`. */
static uint64_t find_segment(const struct gr_lazy_mm *mm, uint64_t address)
{
	uint64_t low = 0, high = mm->nr_segments;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (mm->segments[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

const struct gr_lazy_segment *gr_lazy_mm_at(const struct gr_lazy_mm *mm, uint64_t address)
{
	uint64_t at = find_segment(mm, address);

	return at < mm->nr_segments && mm->segments[at].start <= address ? &mm->segments[at] : NULL;
}

bool gr_lazy_mm_where(const struct gr_lazy_mm *mm, uint64_t origin, uint64_t *address, uint64_t *bytes)
{
	uint64_t first = 0, end = mm->nr_segments;

	if (!mm->moved) {
		first = find_segment(mm, origin);
		end = first < end ? first + 1 : end;
	}
	for (uint64_t i = first; i < end; i++) {
		const struct gr_lazy_segment *segment = &mm->segments[i];
		uint64_t size = segment->end - segment->start;

		if (!segment->object && origin >= segment->origin && origin - segment->origin < size) {
			*address = segment->start + (origin - segment->origin);
			*bytes = segment->end - *address;
			return true;
		}
	}
	return false;
}

static int insert(struct gr_lazy_mm *mm, uint64_t at, struct gr_lazy_segment segment)
{
	if (mm->nr_segments == mm->max_segments) {
		uint64_t more = mm->max_segments * 2 + 8;
		struct gr_lazy_segment *grown = realloc(mm->segments, more * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		mm->segments = grown;
		mm->max_segments = more;
	}
	memmove(&mm->segments[at + 1], &mm->segments[at], (mm->nr_segments - at) * sizeof(segment));
	mm->segments[at] = segment;
	mm->nr_segments++;
	return 0;
}

/* Make `address` a border between segments. */
static int split(struct gr_lazy_mm *mm, uint64_t address)
{
	uint64_t at = find_segment(mm, address);
	struct gr_lazy_segment tail;

	if (at >= mm->nr_segments || mm->segments[at].start >= address)
		return 0;
	tail = mm->segments[at];
	tail.origin += address - tail.start;
	tail.start = address;
	mm->segments[at].end = address;
	return insert(mm, at + 1, tail);
}

/* The stored pages of [start, end) of the dumped address space: indexes [*first, *last). */
static void indexes(const struct gr_lazy_source *source, uint64_t start, uint64_t end, uint64_t *first, uint64_t *last)
{
	uint64_t edges[2] = { start, end };

	for (int e = 0; e < 2; e++) {
		uint64_t run = gr_lazy_find_run(source, edges[e]);
		uint64_t index = source->runs[run].first;

		if (run < source->nr_runs && edges[e] > source->runs[run].vaddr)
			index += (edges[e] - source->runs[run].vaddr) >> GR_PAGE_SHIFT;
		*(e ? last : first) = index;
	}
}

void gr_lazy_mm_removed(struct gr_lazy_mm *mm, uint64_t start, uint64_t end)
{
	for (uint64_t at = find_segment(mm, start); at < mm->nr_segments && mm->segments[at].start < end; at++) {
		const struct gr_lazy_segment *segment = &mm->segments[at];
		uint64_t from = start > segment->start ? start : segment->start;
		uint64_t to = end < segment->end ? end : segment->end;
		uint64_t first, last;

		if (segment->object) /* gr_lazy_views_removed */
			continue;
		indexes(mm->source, segment->origin + (from - segment->start), segment->origin + (to - segment->start),
			&first, &last);
		gr_lazy_mm_set_done(mm, first, last - first);
	}
	mm->generation++;
}

int gr_lazy_mm_unmapped(struct gr_lazy_mm *mm, uint64_t start, uint64_t end)
{
	uint64_t first, last;

	gr_lazy_mm_removed(mm, start, end);
	if (split(mm, start) < 0 || split(mm, end) < 0)
		return -ENOMEM;
	first = find_segment(mm, start);
	for (last = first; last < mm->nr_segments && mm->segments[last].start < end; last++)
		;
	memmove(&mm->segments[first], &mm->segments[last], (mm->nr_segments - last) * sizeof(*mm->segments));
	mm->nr_segments -= last - first;
	return 0;
}

int gr_lazy_mm_moved(struct gr_lazy_mm *mm, uint64_t from, uint64_t to, uint64_t bytes)
{
	mm->generation++;
	mm->moved = true;
	/* Old and new place never overlap; what was at the new one is unmapped, whether or not an event told of it. */
	if (gr_lazy_mm_unmapped(mm, to, to + bytes) < 0 || split(mm, from) < 0 || split(mm, from + bytes) < 0)
		return -ENOMEM;
	for (;;) {
		uint64_t at = find_segment(mm, from);
		struct gr_lazy_segment segment;

		if (at >= mm->nr_segments || mm->segments[at].start >= from + bytes)
			return 0;
		segment = mm->segments[at];
		memmove(&mm->segments[at], &mm->segments[at + 1], (mm->nr_segments - at - 1) * sizeof(segment));
		mm->nr_segments--;
		segment.start = segment.start - from + to;
		segment.end = segment.end - from + to;
		if (insert(mm, find_segment(mm, segment.start), segment) < 0)
			return -ENOMEM;
	}
}

/* ---- what is in place */

bool gr_lazy_mm_is_done(const struct gr_lazy_mm *mm, uint64_t index)
{
	return __atomic_load_n(&mm->done[index / 64], __ATOMIC_RELAXED) >> (index % 64) & 1;
}

void gr_lazy_mm_set_done(struct gr_lazy_mm *mm, uint64_t index, uint64_t nr)
{
	uint64_t newly = 0;

	while (nr) {
		uint64_t bit = index % 64, room = 64 - bit, take = nr < room ? nr : room;
		uint64_t mask = (take == 64 ? ~0UL : (1UL << take) - 1) << bit;
		uint64_t before = __atomic_fetch_or(&mm->done[index / 64], mask, __ATOMIC_RELAXED);

		newly += (uint64_t)__builtin_popcountl(mask & ~before);
		index += take;
		nr -= take;
	}
	__atomic_fetch_sub(&mm->remaining, newly, __ATOMIC_RELEASE);
	__atomic_fetch_add(mm->done_bytes, newly << GR_PAGE_SHIFT, __ATOMIC_RELAXED);
}

void gr_lazy_mm_wake(const struct gr_lazy_mm *mm, uint64_t address, uint64_t nr_pages)
{
	struct uffdio_range range = { address, nr_pages << GR_PAGE_SHIFT };

	ioctl(mm->uffd, UFFDIO_WAKE, &range);
}

/*
 * What a failed UFFDIO_COPY or UFFDIO_ZEROPAGE of `nr` pages at `address` means. *settled: pages that need nothing more;
 * *at_once: how many may be tried together next.
 */
static enum gr_lazy_outcome judge(const struct gr_lazy_mm *mm, int code, uint64_t address, uint64_t nr,
				  uint64_t *settled, uint64_t *at_once)
{
	*settled = 0;
	switch (code) {
	case EAGAIN: /* events wait to be read, or are about to come */
		return GR_LAZY_CHANGING;
	case ESRCH:
		return GR_LAZY_GONE;
	case ENOENT: /* over the border of a mapping, or no mapping of ours (any more) */
		if (nr > 1) {
			*at_once = 1;
			return GR_LAZY_PLACED;
		}
		/* fallthrough */
	case EEXIST:
		gr_lazy_mm_wake(mm, address, 1);
		*settled = 1;
		return GR_LAZY_PLACED;
	default:
		return GR_LAZY_BROKEN;
	}
}

enum gr_lazy_outcome gr_lazy_mm_copy(struct gr_lazy_mm *mm, uint64_t address, uint64_t index, uint64_t nr_pages,
				     const char *bytes, int *code)
{
	uint64_t at = 0, at_once = nr_pages, settled;

	while (at < nr_pages) {
		uint64_t here = address + (at << GR_PAGE_SHIFT), nr;
		enum gr_lazy_outcome outcome = GR_LAZY_PLACED;
		struct uffdio_copy copy;

		if (gr_lazy_mm_is_done(mm, index + at)) {
			at++;
			continue;
		}
		/* One at least: if another thread has placed it by now that is EEXIST, but to copy nothing is refused. */
		nr = 1;
		while (nr < at_once && at + nr < nr_pages && !gr_lazy_mm_is_done(mm, index + at + nr))
			nr++;
		copy = (struct uffdio_copy){ .dst = here, .src = (uint64_t)(bytes + (at << GR_PAGE_SHIFT)),
					     .len = nr << GR_PAGE_SHIFT };
		if (ioctl(mm->uffd, UFFDIO_COPY, &copy) == 0 || copy.copy > 0) {
			settled = (uint64_t)copy.copy >> GR_PAGE_SHIFT;
		} else {
			*code = errno;
			outcome = judge(mm, errno, here, nr, &settled, &at_once);
		}
		gr_lazy_mm_set_done(mm, index + at, settled);
		at += settled;
		if (outcome != GR_LAZY_PLACED)
			return outcome;
	}
	return GR_LAZY_PLACED;
}

enum gr_lazy_outcome gr_lazy_mm_zero(struct gr_lazy_mm *mm, uint64_t address, uint64_t nr_pages, int *code)
{
	uint64_t at_once = nr_pages, settled;

	while (nr_pages) {
		uint64_t nr = nr_pages < at_once ? nr_pages : at_once;
		struct uffdio_zeropage zero = { .range = { address, nr << GR_PAGE_SHIFT } };
		enum gr_lazy_outcome outcome = GR_LAZY_PLACED;

		if (ioctl(mm->uffd, UFFDIO_ZEROPAGE, &zero) == 0 || zero.zeropage > 0) {
			settled = (uint64_t)zero.zeropage >> GR_PAGE_SHIFT;
		} else {
			*code = errno;
			outcome = judge(mm, errno, address, nr, &settled, &at_once);
		}
		if (outcome != GR_LAZY_PLACED)
			return outcome;
		address += settled << GR_PAGE_SHIFT;
		nr_pages -= settled;
	}
	return GR_LAZY_PLACED;
}

int gr_lazy_probe(int uffd)
{
	static void *nothing; /* a page that cannot be read, so that nothing is ever placed */
	struct uffdio_copy copy = { .dst = 1UL << 30, .len = GR_PAGE_BYTES };

	if (!nothing) {
		void *page = mmap(NULL, GR_PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (page == MAP_FAILED)
			return ENOMEM;
		nothing = page;
	}
	copy.src = (uint64_t)nothing;
	return ioctl(uffd, UFFDIO_COPY, &copy) < 0 ? errno : 0;
}

bool gr_lazy_is_gone(int uffd)
{
	return gr_lazy_probe(uffd) == ESRCH;
}
