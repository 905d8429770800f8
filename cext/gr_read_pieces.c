#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "gr_internal.h"
#include "gr_pagemap_entry.h"
#include "gr_read_pieces.h"

#define WINDOW_PAGES 512UL

int gr_source_open(const struct gr_pages_source *source, struct gr_opened_source *out, struct gr_error *err)
{
	*out = (struct gr_opened_source){ source->pid, source->source_fd, -1, -1 };
	if (source->source_fd >= 0)
		return 0;
	out->mem_fd = gr_open_of_task(source->pid, "mem", O_RDONLY, err);
	if (out->mem_fd < 0)
		return out->mem_fd;
	out->map_fd = gr_open_of_task(source->pid, "pagemap", O_RDONLY, err);
	return out->map_fd < 0 ? out->map_fd : 0;
}

void gr_source_close(struct gr_opened_source *source)
{
	gr_close_fd(&source->mem_fd);
	gr_close_fd(&source->map_fd);
}

static uint64_t first_page(const struct iovec *piece)
{
	return (uint64_t)piece->iov_base / GR_PAGE_BYTES;
}

static uint64_t end_page(const struct iovec *piece)
{
	return first_page(piece) + piece->iov_len / GR_PAGE_BYTES;
}

/* How many entries to read from `page` of the first piece on: with the pieces behind it that fit into a window. */
static uint64_t window_pages(const struct iovec *pieces, unsigned int nr, uint64_t page)
{
	uint64_t end = end_page(pieces);

	for (unsigned int i = 1; i < nr && end_page(&pieces[i]) <= page + WINDOW_PAGES; i++)
		end = end_page(&pieces[i]);
	return end - page < WINDOW_PAGES ? end - page : WINDOW_PAGES;
}

/*
 * Whether no page of the pieces is one that several tasks share since a fork, or may be: swapped out, unknown.
 * process_vm_readv(2) pins pages (FOLL_PIN), and the kernel gives the task a copy of such a page of its own first
 * (gup_must_unshare() in mm/internal.h), out of a huge page that is split for that. The memory file only takes
 * references to pages (FOLL_GET), but it copies them twice.
 */
static int are_exclusive(int map_fd, const struct iovec *pieces, unsigned int nr)
{
	uint64_t entries[WINDOW_PAGES], base = 0, count = 0;

	for (unsigned int i = 0; i < nr; i++) {
		for (uint64_t page = first_page(&pieces[i]); page < end_page(&pieces[i]); page++) {
			if (page >= base + count) {
				base = page;
				count = window_pages(&pieces[i], nr - i, page);
				if (pread(map_fd, entries, count * 8, (off_t)(base * 8)) != (ssize_t)(count * 8))
					return 0;
			}
			if (!(entries[page - base] & (PM_EXCLUSIVE | PM_FILE)))
				return 0;
		}
	}
	return 1;
}

static int read_task(const struct gr_opened_source *source, char *buffer, uint64_t bytes, uint64_t address,
		     struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pread(source->mem_fd, buffer, bytes, (off_t)address);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at %#lx of task %d", bytes,
				       address, source->pid);
		buffer += n;
		bytes -= (uint64_t)n;
		address += (uint64_t)n;
	}
	return 0;
}

static int read_object(int fd, char *buffer, uint64_t bytes, uint64_t offset, struct gr_error *err)
{
	while (bytes) {
		ssize_t n = pread(fd, buffer, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 && bytes < GR_PAGE_BYTES) {
			memset(buffer, 0, bytes); /* the last page of an object whose size is no multiple of pages */
			return 0;
		}
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EIO, "reading %lu bytes at offset %#lx of an object",
				       bytes, offset);
		buffer += n;
		bytes -= (uint64_t)n;
		offset += (uint64_t)n;
	}
	return 0;
}

int gr_read_pieces(const struct gr_opened_source *source, char *buffer, struct iovec *pieces, unsigned int nr,
		   uint64_t bytes, struct gr_error *err)
{
	int may_pin = source->source_fd < 0 && are_exclusive(source->map_fd, pieces, nr);

	while (nr) {
		struct iovec local = { .iov_base = buffer, .iov_len = bytes };
		ssize_t n = -1;
		uint64_t left, address;
		int ret;

		if (may_pin)
			n = process_vm_readv(source->pid, &local, 1, pieces, nr, 0);
		if (n < 0)
			n = 0; /* unreadable for its owner, or not ours to read this way: the file below decides */
		buffer += n;
		bytes -= (uint64_t)n;
		for (; nr && (size_t)n >= pieces->iov_len; pieces++, nr--)
			n -= (ssize_t)pieces->iov_len;
		if (!nr)
			break;
		left = pieces->iov_len - (size_t)n;
		address = (uint64_t)pieces->iov_base + (uint64_t)n;
		ret = source->source_fd < 0 ? read_task(source, buffer, left, address, err) :
					      read_object(source->source_fd, buffer, left, address, err);
		if (ret < 0)
			return ret;
		buffer += left;
		bytes -= left;
		pieces++;
		nr--;
	}
	return 0;
}
