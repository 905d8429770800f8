#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "gr_frames.h"
#include "gr_internal.h"
#include "gr_pagemap_entry.h"

#define ENTRIES 65536UL
/* Runs that are closer than this are read with the hole between them: 4 KiB of entries cost less than a system call. */
#define JOIN_PAGES 512UL

struct task_map {
	int fd, pid;
	uint64_t *entries;
};

struct comparison {
	struct task_map maps[2];
	const struct gr_runs_view *runs;
	int *cancel;
	struct gr_page_runs *out;
};

static int open_map(struct task_map *map, struct gr_error *err)
{
	map->fd = gr_open_of_task(map->pid, "pagemap", O_RDONLY, err);
	return map->fd < 0 ? map->fd : 0;
}

static int read_map(const struct task_map *map, uint64_t start, uint64_t nr, struct gr_error *err)
{
	uint64_t done = 0;

	while (done < nr) {
		off_t offset = (off_t)((start / GR_PAGE_BYTES + done) * 8);
		ssize_t got = pread(map->fd, map->entries + done, (nr - done) * 8, offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 8)
			return gr_fail(err, got < 0 ? errno : EIO, "reading /proc/%d/pagemap at %#lx", map->pid, start);
		done += (uint64_t)got / 8;
	}
	return 0;
}

int gr_frames_visible(struct gr_error *err)
{
	uint64_t entry;
	struct task_map own = { .pid = getpid(), .entries = &entry };
	int ret = open_map(&own, err);

	/* The stack, on which we stand, is surely there. */
	if (ret == 0) {
		ret = read_map(&own, (uint64_t)&entry & ~(GR_PAGE_BYTES - 1), 1, err);
		close(own.fd);
	}
	return ret < 0 ? ret : (entry & PM_FRAME) != 0;
}

static int is_common(uint64_t a, uint64_t b)
{
	const uint64_t kind = PM_FILE | PM_SWAP | PM_PRESENT;

	return (a & (PM_SWAP | PM_PRESENT)) && !(a & PM_FILE) && (a & PM_FRAME) &&
	       (a & (kind | PM_FRAME)) == (b & (kind | PM_FRAME));
}

/* Compare the part of run [start, end) that lies in the window of `nr` entries from `base` on, which were read. */
static int compare(const struct comparison *job, uint64_t start, uint64_t end, uint64_t base, uint64_t nr,
		   struct gr_error *err)
{
	uint64_t low = start > base ? (start - base) / GR_PAGE_BYTES : 0;
	uint64_t high = (end - base) / GR_PAGE_BYTES < nr ? (end - base) / GR_PAGE_BYTES : nr;
	const uint64_t *a = job->maps[0].entries, *b = job->maps[1].entries;
	int ret = 0;

	for (uint64_t i = low; i < high && ret == 0; i++) {
		uint64_t first = i;

		while (i < high && is_common(a[i], b[i]))
			i++;
		if (i > first)
			ret = gr_page_runs_add(job->out, start, base + first * GR_PAGE_BYTES, base + i * GR_PAGE_BYTES,
					       err);
	}
	return ret;
}

/* From page `start` of run `i` on: as many entries as fit, and runs that follow closely. */
static uint64_t window_pages(const struct gr_runs_view *runs, uint64_t i, uint64_t start)
{
	uint64_t end = runs->vaddrs[i] + runs->nr_pages[i] * GR_PAGE_BYTES;

	while (++i < runs->nr_runs && runs->vaddrs[i] - end <= JOIN_PAGES * GR_PAGE_BYTES &&
	       end - start < ENTRIES * GR_PAGE_BYTES)
		end = runs->vaddrs[i] + runs->nr_pages[i] * GR_PAGE_BYTES;
	return (end - start) / GR_PAGE_BYTES < ENTRIES ? (end - start) / GR_PAGE_BYTES : ENTRIES;
}

static int compare_all(const struct comparison *job, struct gr_error *err)
{
	const struct gr_runs_view *runs = job->runs;
	uint64_t base = 0, nr = 0;
	int ret = 0;

	for (uint64_t i = 0; i < runs->nr_runs; i++) {
		uint64_t at = runs->vaddrs[i], end = at + runs->nr_pages[i] * GR_PAGE_BYTES;

		while (at < end) {
			if (at >= base + nr * GR_PAGE_BYTES) {
				if (gr_is_cancelled(job->cancel))
					return gr_fail(err, ECANCELED, "comparing the pages of task %d",
						       job->maps[0].pid);
				base = at;
				nr = window_pages(runs, i, at);
				ret = read_map(&job->maps[0], base, nr, err);
				if (ret == 0)
					ret = read_map(&job->maps[1], base, nr, err);
			}
			if (ret == 0)
				ret = compare(job, at, end, base, nr, err);
			if (ret < 0)
				return ret;
			at = base + nr * GR_PAGE_BYTES < end ? base + nr * GR_PAGE_BYTES : end;
		}
	}
	return 0;
}

int gr_frames_common(int pid, int other_pid, const struct gr_runs_view *runs, int *cancel, struct gr_page_runs *out,
		     struct gr_error *err)
{
	uint64_t *entries = malloc(2 * ENTRIES * sizeof(*entries));
	struct comparison job = { .maps = { { -1, pid, entries }, { -1, other_pid, entries + ENTRIES } },
				  .runs = runs, .cancel = cancel, .out = out };
	int ret;

	memset(out, 0, sizeof(*out));
	if (!entries)
		return gr_fail(err, ENOMEM, "comparing the pages of task %d", pid);
	ret = open_map(&job.maps[0], err);
	if (ret == 0)
		ret = open_map(&job.maps[1], err);
	if (ret == 0)
		ret = compare_all(&job, err);
	gr_close_fd(&job.maps[0].fd);
	gr_close_fd(&job.maps[1].fd);
	free(entries);
	if (ret < 0)
		gr_page_runs_destroy(out);
	return ret;
}
