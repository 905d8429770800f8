/*
 * The wire format that protobuf would write for pagemap.img, read and written without it: a message object per entry
 * costs a microsecond and 100 bytes, and a task of a few hundred GiB has millions of them.
 *
 * What protobuf accepts and we do not: groups, varints above 64 bits, and values above 32 bits in 32-bit fields. No
 * writer makes them. Unknown fields are skipped, and of a field that stands there twice the last one counts.
 */
#include "gr_pagemap_codec.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define PAGE_BITS 12
#define PAGE_MASK ((UINT64_C(1) << PAGE_BITS) - 1)
/* Two required fields of a tag and a byte each. */
#define MIN_ENTRY_BYTES 4
#define MIN_HEAD_BYTES 2

#define FLAG_PARENT 1u
#define FLAG_PRESENT 4u

enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };
enum { FIELD_PAGES_ID = 1 };
enum { FIELD_VADDR = 1, FIELD_COMPAT_NR_PAGES = 2, FIELD_IN_PARENT = 3, FIELD_FLAGS = 4, FIELD_NR_PAGES = 5 };

/* Bytes [at, end) of `data`. */
struct cursor {
	const uint8_t *data;
	uint64_t at;
	uint64_t end;
};

struct entry {
	uint64_t vaddr;
	uint64_t nr_pages;
	uint32_t flags;
};

__attribute__((format(printf, 3, 4))) static void describe(struct gr_error *err, uint64_t at, const char *format, ...)
{
	int length = snprintf(err->context, sizeof(err->context), "damaged at byte %llu: ", (unsigned long long)at);
	va_list args;

	err->code = EINVAL;
	va_start(args, format);
	vsnprintf(err->context + length, sizeof(err->context) - (size_t)length, format, args);
	va_end(args);
}

/* A macro, so that the compiler sees that it never yields 0. */
#define damaged(...) (describe(__VA_ARGS__), -EINVAL)

static int read_varint(struct cursor *in, uint64_t *out, struct gr_error *err)
{
	uint64_t value = 0;

	for (unsigned int shift = 0; shift < 70; shift += 7) {
		if (in->at == in->end)
			return damaged(err, in->at, "a number reaches beyond its record");
		uint8_t byte = in->data[in->at++];
		if (shift == 63 && byte > 1)
			break;
		value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80)) {
			*out = value;
			return 0;
		}
	}
	return damaged(err, in->at - 1, "a number of more than 64 bits");
}

static int read_varint32(struct cursor *in, uint32_t *out, struct gr_error *err)
{
	uint64_t at = in->at;
	uint64_t value;
	int ret = read_varint(in, &value, err);

	if (ret)
		return ret;
	if (value > UINT32_MAX)
		return damaged(err, at, "%llu in a field of 32 bits", (unsigned long long)value);
	*out = (uint32_t)value;
	return 0;
}

static int skip_field(struct cursor *in, unsigned int wire, struct gr_error *err)
{
	uint64_t length;
	uint64_t start = in->at;
	int ret;

	switch (wire) {
	case WIRE_VARINT:
		return read_varint(in, &length, err);
	case WIRE_FIXED64:
		length = 8;
		break;
	case WIRE_FIXED32:
		length = 4;
		break;
	case WIRE_BYTES:
		ret = read_varint(in, &length, err);
		if (ret)
			return ret;
		break;
	default:
		return damaged(err, start, "wire type %u", wire);
	}
	if (length > in->end - in->at)
		return damaged(err, start, "a field reaches beyond its record");
	in->at += length;
	return 0;
}

static int read_tag(struct cursor *in, uint32_t *field, unsigned int *wire, struct gr_error *err)
{
	uint64_t at = in->at;
	uint32_t tag;
	int ret = read_varint32(in, &tag, err);

	if (ret)
		return ret;
	*field = tag >> 3;
	*wire = tag & 7;
	if (*field == 0)
		return damaged(err, at, "field number 0");
	return 0;
}

static uint32_t load_u32(const uint8_t *from)
{
	return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

/* Set `record` to the bytes of the next record's message and move `in` behind it. */
static int next_record(struct cursor *in, uint32_t min_bytes, struct cursor *record, struct gr_error *err)
{
	uint32_t size;

	if (in->end - in->at < 4)
		return damaged(err, in->at, "the file ends where a record's size should stand");
	size = load_u32(in->data + in->at);
	if (size < min_bytes)
		return damaged(err, in->at, "a record of %u bytes, which is too few", size);
	if (size > in->end - in->at - 4)
		return damaged(err, in->at, "a record of %u bytes, but the file ends after %llu", size,
			       (unsigned long long)(in->end - in->at - 4));
	record->data = in->data;
	record->at = in->at + 4;
	record->end = record->at + size;
	in->at = record->end;
	return 0;
}

static int decode_head(struct cursor in, uint32_t *pages_id, struct gr_error *err)
{
	uint64_t start = in.at;
	bool found = false;

	while (in.at < in.end) {
		unsigned int wire;
		uint32_t field;
		int ret = read_tag(&in, &field, &wire, err);

		if (!ret && field == FIELD_PAGES_ID && wire == WIRE_VARINT) {
			ret = read_varint32(&in, pages_id, err);
			found = true;
		} else if (!ret) {
			ret = skip_field(&in, wire, err);
		}
		if (ret)
			return ret;
	}
	return found ? 0 : damaged(err, start, "pagemap_head lacks pages_id");
}

/* The fields of an entry as they stand there; which ones do is in `seen`, by bit. */
struct fields {
	uint64_t vaddr;
	uint64_t nr_pages;
	uint64_t in_parent;
	uint32_t compat_nr_pages;
	uint32_t flags;
	unsigned int seen;
};

static int read_field(struct cursor *in, struct fields *f, struct gr_error *err)
{
	unsigned int wire;
	uint32_t field;
	int ret = read_tag(in, &field, &wire, err);

	if (ret)
		return ret;
	if (wire != WIRE_VARINT || field > FIELD_NR_PAGES)
		return skip_field(in, wire, err);
	f->seen |= 1u << field;
	switch (field) {
	case FIELD_VADDR:
		return read_varint(in, &f->vaddr, err);
	case FIELD_COMPAT_NR_PAGES:
		return read_varint32(in, &f->compat_nr_pages, err);
	case FIELD_IN_PARENT:
		return read_varint(in, &f->in_parent, err);
	case FIELD_FLAGS:
		return read_varint32(in, &f->flags, err);
	default:
		return read_varint(in, &f->nr_pages, err);
	}
}

static const char *entry_fault(uint64_t vaddr, uint64_t nr_pages)
{
	if (vaddr & PAGE_MASK)
		return "the address is not that of a page";
	if (nr_pages == 0)
		return "no pages";
	if (nr_pages > (UINT64_MAX - vaddr) >> PAGE_BITS)
		return "pages beyond the address space";
	return NULL;
}

static int decode_entry(struct cursor in, struct entry *out, struct gr_error *err)
{
	struct fields f = { .seen = 0 };
	uint64_t start = in.at;
	const char *fault;

	while (in.at < in.end) {
		int ret = read_field(&in, &f, err);

		if (ret)
			return ret;
	}
	if (!(f.seen & 1u << FIELD_VADDR) || !(f.seen & 1u << FIELD_COMPAT_NR_PAGES))
		return damaged(err, start, "pagemap_entry lacks vaddr or compat_nr_pages");
	out->vaddr = f.vaddr;
	out->nr_pages = f.seen & 1u << FIELD_NR_PAGES ? f.nr_pages : f.compat_nr_pages;
	out->flags = f.flags;
	/* Before there were flags, in_parent alone told the two kinds apart. */
	if (f.in_parent)
		out->flags |= FLAG_PARENT;
	else if (!(f.seen & 1u << FIELD_FLAGS))
		out->flags = FLAG_PRESENT;
	fault = entry_fault(out->vaddr, out->nr_pages);
	if (fault)
		return damaged(err, start, "%llu pages at %#llx: %s", (unsigned long long)out->nr_pages,
			       (unsigned long long)out->vaddr, fault);
	return 0;
}

int gr_pagemap_count(const uint8_t *data, uint64_t start, uint64_t bytes, uint64_t *out_entries, struct gr_error *err)
{
	struct cursor in = { data, start, bytes };
	struct cursor record;
	uint64_t nr = 0;
	int ret = next_record(&in, MIN_HEAD_BYTES, &record, err);

	while (!ret && in.at < in.end) {
		ret = next_record(&in, MIN_ENTRY_BYTES, &record, err);
		nr++;
	}
	if (!ret)
		*out_entries = nr;
	return ret;
}

int gr_pagemap_decode(const uint8_t *data, uint64_t start, uint64_t bytes, uint64_t nr_entries, uint64_t *vaddrs,
		      uint64_t *nr_pages, uint32_t *flags, struct gr_pagemap_summary *out, struct gr_error *err)
{
	struct cursor in = { data, start, bytes };
	struct cursor record;
	uint64_t end_of_last = 0;
	int ret = next_record(&in, MIN_HEAD_BYTES, &record, err);

	memset(out, 0, sizeof(*out));
	out->ascending = 1;
	if (!ret)
		ret = decode_head(record, &out->pages_id, err);
	for (uint64_t i = 0; !ret && in.at < in.end; i++) {
		struct entry entry;

		if (i == nr_entries)
			return damaged(err, in.at, "more than %llu entries", (unsigned long long)nr_entries);
		ret = next_record(&in, MIN_ENTRY_BYTES, &record, err);
		if (!ret)
			ret = decode_entry(record, &entry, err);
		if (ret)
			break;
		vaddrs[i] = entry.vaddr;
		nr_pages[i] = entry.nr_pages;
		flags[i] = entry.flags;
		if (entry.vaddr < end_of_last)
			out->ascending = 0;
		end_of_last = entry.vaddr + (entry.nr_pages << PAGE_BITS);
		if (entry.flags & FLAG_PRESENT &&
		    __builtin_add_overflow(out->present_pages, entry.nr_pages, &out->present_pages))
			ret = damaged(err, record.at, "more pages altogether than 64 bits count");
	}
	return ret;
}

static unsigned int varint_bytes(uint64_t value)
{
	return (unsigned int)(63 - __builtin_clzll(value | 1)) / 7 + 1;
}

static uint8_t *put_varint(uint8_t *to, uint32_t field, uint64_t value)
{
	*to++ = (uint8_t)(field << 3 | WIRE_VARINT);
	while (value > 0x7f) {
		*to++ = (uint8_t)(value | 0x80);
		value >>= 7;
	}
	*to++ = (uint8_t)value;
	return to;
}

static uint8_t *put_u32(uint8_t *to, uint32_t value)
{
	*to++ = (uint8_t)value;
	*to++ = (uint8_t)(value >> 8);
	*to++ = (uint8_t)(value >> 16);
	*to++ = (uint8_t)(value >> 24);
	return to;
}

/* Readers that do not know nr_pages had better find nothing than a part of it. */
static uint32_t compat(uint64_t nr_pages)
{
	return nr_pages <= UINT32_MAX ? (uint32_t)nr_pages : 0;
}

static uint32_t entry_bytes(uint64_t vaddr, uint64_t nr_pages, uint32_t flags)
{
	return 4 + varint_bytes(vaddr) + varint_bytes(compat(nr_pages)) + varint_bytes(flags) + varint_bytes(nr_pages);
}

static uint8_t *put_entry(uint8_t *to, uint64_t vaddr, uint64_t nr_pages, uint32_t flags)
{
	to = put_u32(to, entry_bytes(vaddr, nr_pages, flags));
	to = put_varint(to, FIELD_VADDR, vaddr);
	to = put_varint(to, FIELD_COMPAT_NR_PAGES, compat(nr_pages));
	to = put_varint(to, FIELD_FLAGS, flags);
	return put_varint(to, FIELD_NR_PAGES, nr_pages);
}

static int encoded_bytes(uint32_t pages_id, const uint64_t *vaddrs, const uint64_t *nr_pages, const uint32_t *flags,
			 uint64_t nr_entries, uint64_t *out_bytes, struct gr_error *err)
{
	uint64_t total = 4 + 1 + varint_bytes(pages_id);

	for (uint64_t i = 0; i < nr_entries; i++) {
		const char *fault = entry_fault(vaddrs[i], nr_pages[i]);

		if (fault) {
			err->code = EINVAL;
			snprintf(err->context, sizeof(err->context), "pagemap entry %llu, %llu pages at %#llx: %s",
				 (unsigned long long)i, (unsigned long long)nr_pages[i],
				 (unsigned long long)vaddrs[i], fault);
			return -EINVAL;
		}
		total += 4 + entry_bytes(vaddrs[i], nr_pages[i], flags[i]);
	}
	*out_bytes = total;
	return 0;
}

int gr_pagemap_encode(uint32_t pages_id, const uint64_t *vaddrs, const uint64_t *nr_pages, const uint32_t *flags,
		      uint64_t nr_entries, uint8_t *out, uint64_t capacity, uint64_t *out_bytes, struct gr_error *err)
{
	uint8_t *to = out;
	int ret = encoded_bytes(pages_id, vaddrs, nr_pages, flags, nr_entries, out_bytes, err);

	if (ret || !out)
		return ret;
	if (*out_bytes > capacity) {
		err->code = ENOSPC;
		snprintf(err->context, sizeof(err->context), "pagemap of %llu bytes",
			 (unsigned long long)*out_bytes);
		return -ENOSPC;
	}
	to = put_u32(to, 1 + varint_bytes(pages_id));
	to = put_varint(to, FIELD_PAGES_ID, pages_id);
	for (uint64_t i = 0; i < nr_entries; i++)
		to = put_entry(to, vaddrs[i], nr_pages[i], flags[i]);
	return 0;
}
