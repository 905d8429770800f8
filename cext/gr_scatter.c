#include <stdlib.h>
#include <sys/uio.h>

#include "gr_internal.h"
#include "gr_placing.h"
#include "gr_scatter.h"

#define MAX_VECTORS 512U /* of the 1024 that the kernel takes: both sides have as many, on the stack */

/* A run of pages to be written: `bytes` at `offset` of the stream belong at `address`. */
struct piece {
	uint64_t address, offset, bytes;
};

struct gr_scatter {
	struct piece *pieces;
	uint64_t nr, max;
	uint64_t done_bytes, placed_bytes; /* atomic */
	struct gr_placing placing;
	int has_placing;
};

/* Vectors for one call: what lies where in the buffer, and where it belongs. */
struct vectors {
	struct iovec local[MAX_VECTORS], remote[MAX_VECTORS];
	unsigned int nr;
	uint64_t bytes;
};

static int add_piece(struct gr_scatter *scatter, uint64_t address, uint64_t offset, uint64_t bytes,
		     struct gr_error *err)
{
	if (!bytes)
		return 0;
	if (scatter->nr == scatter->max) {
		uint64_t max = scatter->max ? scatter->max * 2 : 256;
		struct piece *grown = realloc(scatter->pieces, max * sizeof(*grown));

		if (!grown)
			return gr_fail(err, ENOMEM, "placing %lu runs of pages", scatter->nr);
		scatter->pieces = grown;
		scatter->max = max;
	}
	scatter->pieces[scatter->nr++] = (struct piece){ address, offset, bytes };
	return 0;
}

int gr_scatter_create(const uint64_t *vaddrs, const uint64_t *nr_pages, uint64_t nr_runs, const uint64_t *skip_starts,
		      const uint64_t *skip_ends, uint64_t nr_skips, struct gr_scatter **out, struct gr_error *err)
{
	struct gr_scatter *scatter = calloc(1, sizeof(*scatter));
	uint64_t offset = 0, skip = 0;
	int ret = 0;

	if (!scatter)
		return gr_fail(err, ENOMEM, "placing %lu runs of pages", nr_runs);
	for (uint64_t i = 0; i < nr_runs && ret == 0; i++) {
		uint64_t at = vaddrs[i], end = at + nr_pages[i] * GR_PAGE_BYTES, base = offset - at;

		while (skip < nr_skips && skip_ends[skip] <= at)
			skip++;
		for (uint64_t j = skip; ret == 0 && j < nr_skips && skip_starts[j] < end; j++) {
			if (skip_starts[j] > at)
				ret = add_piece(scatter, at, base + at, skip_starts[j] - at, err);
			at = skip_ends[j];
		}
		if (ret == 0 && at < end)
			ret = add_piece(scatter, at, base + at, end - at, err);
		offset += nr_pages[i] * GR_PAGE_BYTES;
	}
	if (ret < 0)
		gr_scatter_destroy(scatter);
	else
		*out = scatter;
	return ret;
}

void gr_scatter_destroy(struct gr_scatter *scatter)
{
	if (!scatter)
		return;
	gr_scatter_end_object(scatter);
	free(scatter->pieces);
	free(scatter);
}

uint64_t gr_scatter_done_bytes(const struct gr_scatter *scatter)
{
	return __atomic_load_n(&scatter->done_bytes, __ATOMIC_RELAXED);
}

uint64_t gr_scatter_placed_bytes(const struct gr_scatter *scatter)
{
	return __atomic_load_n(&scatter->placed_bytes, __ATOMIC_RELAXED);
}

void gr_scatter_begin_object(struct gr_scatter *scatter, uint64_t base, uint64_t bytes)
{
	const struct piece *last = scatter->nr ? &scatter->pieces[scatter->nr - 1] : NULL;

	scatter->has_placing = last && last->offset + last->bytes >= GR_PLACING_MIN_BYTES &&
			       gr_placing_of_object(base, bytes, -1, &scatter->placing) == 0;
}

void gr_scatter_end_object(struct gr_scatter *scatter)
{
	if (scatter->has_placing)
		gr_placing_destroy(&scatter->placing);
	scatter->has_placing = 0;
}

/* The first piece that ends behind `offset`. */
static uint64_t find(const struct gr_scatter *scatter, uint64_t offset)
{
	uint64_t low = 0, high = scatter->nr;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (scatter->pieces[middle].offset + scatter->pieces[middle].bytes <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int write_task(int pid, struct vectors *vectors, struct gr_error *err)
{
	unsigned int done = 0;

	while (done < vectors->nr) {
		struct iovec *local = &vectors->local[done], *remote = &vectors->remote[done];
		ssize_t n = process_vm_writev(pid, local, vectors->nr - done, remote, vectors->nr - done, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return gr_fail(err, n < 0 ? errno : EFAULT, "writing pages to %p of task %d", remote->iov_base,
				       pid);
		for (; done < vectors->nr && (size_t)n >= vectors->local[done].iov_len; done++)
			n -= (ssize_t)vectors->local[done].iov_len;
		if (!n)
			continue;
		vectors->local[done].iov_base = (char *)vectors->local[done].iov_base + n;
		vectors->local[done].iov_len -= (size_t)n;
		vectors->remote[done].iov_base = (char *)vectors->remote[done].iov_base + n;
		vectors->remote[done].iov_len -= (size_t)n;
	}
	return 0;
}

/* Put all of it into the object that is mapped at `base`. */
static int place(struct gr_scatter *scatter, uint64_t base, const struct vectors *vectors)
{
	const struct iovec *last = &vectors->remote[vectors->nr - 1];
	uint64_t start = (uint64_t)vectors->remote[0].iov_base - base;
	int ret = 0;

	for (unsigned int i = 0; ret == 0 && i < vectors->nr; i++)
		ret = gr_placing_put(&scatter->placing, (uint64_t)vectors->remote[i].iov_base - base,
				     vectors->local[i].iov_base, vectors->local[i].iov_len);
	gr_placing_forget(&scatter->placing, start, (uint64_t)last->iov_base + last->iov_len - base - start);
	if (ret == 0)
		__atomic_fetch_add(&scatter->placed_bytes, vectors->bytes, __ATOMIC_RELAXED);
	return ret;
}

/* Into our own memory it goes the same way as into a task's: what cannot be had is an error then, and not a SIGBUS. */
static int write_out(struct gr_scatter *scatter, int pid, uint64_t base, struct vectors *vectors, struct gr_error *err)
{
	int ret = !pid && scatter->has_placing ? place(scatter, base, vectors) : -1;

	if (ret < 0)
		ret = write_task(pid ? pid : getpid(), vectors, err);
	if (ret == 0)
		__atomic_fetch_add(&scatter->done_bytes, vectors->bytes, __ATOMIC_RELAXED);
	vectors->nr = 0;
	vectors->bytes = 0;
	return ret;
}

int gr_scatter_put(struct gr_scatter *scatter, int pid, uint64_t base, uint64_t offset, const void *buffer,
		   uint64_t bytes, struct gr_error *err)
{
	struct vectors vectors = { .nr = 0 };
	int ret = 0;

	for (uint64_t i = find(scatter, offset); ret == 0 && i < scatter->nr; i++) {
		const struct piece *piece = &scatter->pieces[i];
		uint64_t begin = piece->offset > offset ? piece->offset : offset;
		uint64_t end = piece->offset + piece->bytes;

		if (begin >= offset + bytes)
			break;
		if (end > offset + bytes)
			end = offset + bytes;
		vectors.local[vectors.nr] = (struct iovec){ (char *)buffer + (begin - offset), end - begin };
		vectors.remote[vectors.nr++] =
			(struct iovec){ (void *)(base + piece->address + (begin - piece->offset)), end - begin };
		vectors.bytes += end - begin;
		if (vectors.nr == MAX_VECTORS)
			ret = write_out(scatter, pid, base, &vectors, err);
	}
	return ret == 0 && vectors.nr ? write_out(scatter, pid, base, &vectors, err) : ret;
}
