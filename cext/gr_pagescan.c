#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "gr_internal.h"
#include "gr_pagemap_entry.h"
#include "gr_pagescan.h"

/*
 * As many as the kernel gathers before it copies them out. Given room for more, it may say (Linux 6.18) that it stopped
 * where it did so first, although it went on to the end: pages behind that would be found twice.
 */
#define REGIONS 512
#define ENTRIES 65536

/* linux/fs.h of Linux 6.7 (guards: 6.15), which the build machine's headers may lack. */
struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define IS_FILE (1UL << 2)
#define IS_PRESENT (1UL << 3)
#define IS_SWAPPED (1UL << 4)
#define IS_PFNZERO (1UL << 5)
#define IS_HUGE (1UL << 6)
#define IS_GUARD (1UL << 8)

struct scan {
	int fd;
	int pid;
	int what;
	int *cancel;
	void *buffer; /* REGIONS regions, or ENTRIES entries */
	struct gr_page_runs *out;
	uint64_t range_start; /* runs are joined only from here on */
	uint64_t zero_pfn;
};

static int add_run(struct scan *scan, uint64_t start, uint64_t end, struct gr_error *err)
{
	return gr_page_runs_add(scan->out, scan->range_start, start, end, err);
}

static void set_categories(struct pm_scan_arg *arg, int what, int with_guards)
{
	uint64_t unwanted = IS_FILE | IS_PFNZERO | (with_guards ? IS_GUARD : 0);

	if (what == GR_SCAN_GUARD) {
		arg->category_mask = IS_GUARD;
	} else if (what == GR_SCAN_HUGE) {
		arg->category_inverted = IS_PFNZERO;
		arg->category_mask = IS_HUGE | IS_PFNZERO;
	} else {
		arg->category_inverted = unwanted;
		arg->category_mask = unwanted;
		arg->category_anyof_mask = IS_PRESENT | IS_SWAPPED;
	}
	/* One category that is alike in all pages found: neighbours come back as one region. */
	arg->return_mask = IS_FILE;
}

/* Whether the kernel knows the ioctl, and guards in it. An empty range answers that. */
static int probe_ioctl(int fd, int what, int with_guards)
{
	struct page_region region;
	struct pm_scan_arg arg = { .size = sizeof(arg), .vec = (uint64_t)&region, .vec_len = 1,
				   .start = GR_PAGE_BYTES, .end = GR_PAGE_BYTES };

	set_categories(&arg, what, with_guards);
	return ioctl(fd, IOCTL_PAGEMAP_SCAN, &arg) >= 0;
}

static int scan_by_ioctl(struct scan *scan, uint64_t start, uint64_t end, int with_guards, struct gr_error *err)
{
	struct page_region *regions = scan->buffer;
	struct pm_scan_arg arg = { .size = sizeof(arg), .vec = (uint64_t)regions, .vec_len = REGIONS, .end = end };

	set_categories(&arg, scan->what, with_guards);
	for (arg.start = start; arg.start < end; arg.start = arg.walk_end) {
		int nr;

		if (gr_is_cancelled(scan->cancel))
			return gr_fail(err, ECANCELED, "scanning the pages of task %d", scan->pid);
		do {
			nr = ioctl(scan->fd, IOCTL_PAGEMAP_SCAN, &arg);
		} while (nr < 0 && errno == EINTR);
		if (nr < 0 || arg.walk_end <= arg.start)
			return gr_fail(err, nr < 0 ? errno : EIO, "scanning pages %#lx-%#lx of task %d", arg.start, end,
				       scan->pid);
		for (int i = 0; i < nr; i++) {
			int ret = add_run(scan, regions[i].start, regions[i].end, err);

			if (ret < 0)
				return ret;
		}
	}
	return 0;
}

static int is_wanted(const struct scan *scan, uint64_t entry)
{
	if (scan->what == GR_SCAN_GUARD)
		return (entry & PM_GUARD) != 0;
	if (scan->what == GR_SCAN_HUGE)
		return 0;
	if (!(entry & (PM_PRESENT | PM_SWAP)) || (entry & (PM_FILE | PM_GUARD)))
		return 0;
	return !(entry & PM_PRESENT) || !scan->zero_pfn || (entry & PM_FRAME) != scan->zero_pfn;
}

static int scan_by_reading(struct scan *scan, uint64_t start, uint64_t end, struct gr_error *err)
{
	uint64_t *entries = scan->buffer;

	while (start < end) {
		uint64_t nr = (end - start) / GR_PAGE_BYTES;
		ssize_t got;

		if (gr_is_cancelled(scan->cancel))
			return gr_fail(err, ECANCELED, "scanning the pages of task %d", scan->pid);
		if (nr > ENTRIES)
			nr = ENTRIES;
		got = pread(scan->fd, entries, nr * 8, (off_t)(start / GR_PAGE_BYTES * 8));
		if (got < 8)
			return gr_fail(err, got < 0 ? errno : EIO, "reading /proc/%d/pagemap at %#lx", scan->pid,
				       start);
		nr = (uint64_t)got / 8;
		for (uint64_t i = 0; i < nr; i++) {
			int ret = 0;

			if (is_wanted(scan, entries[i]))
				ret = add_run(scan, start + i * GR_PAGE_BYTES, start + (i + 1) * GR_PAGE_BYTES, err);
			if (ret < 0)
				return ret;
		}
		start += nr * GR_PAGE_BYTES;
	}
	return 0;
}

/* The frame of the zero page, or 0 where the kernel hides frame numbers (zero pages are then stored as data). */
static uint64_t find_zero_pfn(void)
{
	uint64_t entry = 0;
	GR_CLOSE int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	volatile char *page = mmap(NULL, GR_PAGE_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return 0;
	(void)*page;
	if (fd < 0 || pread(fd, &entry, 8, (off_t)((uint64_t)page / GR_PAGE_BYTES * 8)) != 8)
		entry = 0;
	munmap((void *)page, GR_PAGE_BYTES);
	return entry & PM_FRAME;
}

static int scan_ranges(struct scan *scan, const uint64_t *starts, const uint64_t *ends, uint32_t nr_ranges, int how,
		       struct gr_error *err)
{
	int with_guards = how != GR_SCAN_READ && probe_ioctl(scan->fd, scan->what, 1);
	int use_ioctl = with_guards || (how != GR_SCAN_READ && probe_ioctl(scan->fd, scan->what, 0));

	if (how == GR_SCAN_IOCTL && !use_ioctl)
		return gr_fail(err, EOPNOTSUPP, "asking for PAGEMAP_SCAN");
	if (!use_ioctl)
		scan->zero_pfn = find_zero_pfn();
	for (uint32_t i = 0; i < nr_ranges; i++) {
		int ret;

		scan->range_start = starts[i];
		ret = use_ioctl ? scan_by_ioctl(scan, starts[i], ends[i], with_guards, err) :
				  scan_by_reading(scan, starts[i], ends[i], err);
		if (ret < 0)
			return ret;
	}
	return 0;
}

int gr_pagescan(int pid, const uint64_t *starts, const uint64_t *ends, uint32_t nr_ranges, int what, int how,
		int *cancel, struct gr_page_runs *out, struct gr_error *err)
{
	GR_CLOSE int fd = -1;
	struct scan scan = { .pid = pid, .what = what, .cancel = cancel, .out = out };
	int ret;

	memset(out, 0, sizeof(*out));
	fd = gr_open_of_task(pid, "pagemap", O_RDONLY, err);
	if (fd < 0)
		return fd;
	scan.fd = fd;
	scan.buffer = malloc(ENTRIES * 8);
	if (!scan.buffer)
		return gr_fail(err, ENOMEM, "scanning the pages of task %d", pid);
	ret = scan_ranges(&scan, starts, ends, nr_ranges, how, err);
	free(scan.buffer);
	if (ret < 0)
		gr_page_runs_destroy(out);
	return ret;
}
