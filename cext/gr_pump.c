#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "gr_agent.h"
#include "gr_internal.h"
#include "gr_pump_internal.h"

/* A thread is woken once for this much, unless a single chunk is larger. */
#define WAKE_BYTES (4UL << 20)
#define MAX_CHUNKS 32
/*
 * A page of the staging that something else holds for a moment makes a move fail with EAGAIN or EBUSY: the kernel may let
 * go of what it read directly only some time after the read has returned.
 */
#define MAX_MOVES 64
#define MOVE_PAUSE_US 200
/* Shorter runs come in faster by one vectored read than by a call for each. */
#define MIN_PLACED_RUN_BYTES (32UL << 10)

/* linux/userfaultfd.h of Linux 6.8, which the build machine's headers may lack. */
struct move {
	uint64_t dst, src, len, mode;
	int64_t moved; /* out: bytes, or a negative errno */
};
#define MOVE_IOCTL _IOWR(0xAA, 0x05, struct move)
/* Where no huge page was to be had, pages that nobody wrote to are not there. */
#define MOVE_ALLOWS_HOLES 2

struct pump {
	struct gr_region *region;
	const struct gr_pump_worker *worker;
	const struct gr_pump_source *source;
	struct gr_pump_queue *queue;
	int *cancel;
	struct gr_batch *batch;
	char *slot_end;
	/* A batch under construction: calls grow up from its start, their data down from its end. */
	char *data;
	uint64_t bytes;
	const struct gr_chunk *chunks[MAX_CHUNKS];
	uint32_t last_calls[MAX_CHUNKS]; /* the chunk is in place once this call of the batch is done */
	uint8_t direct[MAX_CHUNKS];
	uint32_t nr_chunks;
};

static void begin_batch(struct pump *pump)
{
	memset(pump->batch, 0, sizeof(*pump->batch));
	pump->data = pump->slot_end;
	pump->bytes = 0;
	pump->nr_chunks = 0;
}

static struct gr_call *add_call(struct pump *pump, uint64_t nr, int64_t want)
{
	struct gr_call *call = &pump->batch->calls[pump->batch->nr_calls++];

	*call = (struct gr_call){ .nr = nr, .expect = GR_EXPECT_EXACT, .want = want };
	return call;
}

static void *add_data(struct pump *pump, size_t size)
{
	pump->data -= (size + 15) & ~15UL;
	return pump->data;
}

static int moves(const struct pump *pump, const struct gr_chunk *chunk)
{
	return chunk->huge_bytes && pump->worker->uffd >= 0;
}

static void add_read(struct pump *pump, const struct gr_chunk *chunk, int fd, uint64_t shift)
{
	struct iovec *vectors = add_data(pump, chunk->nr * sizeof(*vectors));
	struct gr_call *call = add_call(pump, __NR_preadv, (int64_t)chunk->bytes);
	const struct iovec *from = &pump->queue->iovecs[chunk->first];

	for (uint32_t i = 0; i < chunk->nr; i++)
		vectors[i] = (struct iovec){ (char *)from[i].iov_base + shift, from[i].iov_len };
	call->args[0] = (uint64_t)fd;
	call->args[1] = (uint64_t)vectors;
	call->args[2] = chunk->nr;
	call->args[3] = chunk->file_offset;
}

static void add_staging_advice(struct pump *pump, uint64_t bytes, int advice)
{
	struct gr_call *call = add_call(pump, __NR_madvise, 0);

	call->args[0] = pump->worker->staging;
	call->args[1] = bytes;
	call->args[2] = (uint64_t)advice;
}

static void add_move(struct pump *pump, const struct gr_chunk *chunk)
{
	struct move *move = add_data(pump, sizeof(*move));
	struct gr_call *call = add_call(pump, __NR_ioctl, 0);

	*move = (struct move){ .dst = chunk->huge_start, .src = pump->worker->staging, .len = chunk->huge_bytes,
			       .mode = MOVE_ALLOWS_HOLES };
	call->args[0] = (uint64_t)pump->worker->uffd;
	call->args[1] = MOVE_IOCTL;
	call->args[2] = (uint64_t)move;
}

/* What a single chunk may need always fits: 1024 vectors are 16 KiB of 120. */
static int add_chunk(struct pump *pump, const struct gr_chunk *chunk)
{
	size_t size = chunk->nr * sizeof(struct iovec) + sizeof(struct move) + 32 + 2 * sizeof(struct gr_call);
	const char *calls_end = (const char *)&pump->batch->calls[pump->batch->nr_calls];
	int direct;

	if (pump->nr_chunks == MAX_CHUNKS || (pump->nr_chunks && pump->bytes + chunk->bytes > WAKE_BYTES) ||
	    (size_t)(pump->data - calls_end) < size)
		return 0;
	direct = gr_pump_is_cold(pump->source, chunk);
	add_read(pump, chunk, direct ? pump->source->direct_fd : pump->source->fd,
		 moves(pump, chunk) ? pump->worker->staging - chunk->huge_start : 0);
	if (moves(pump, chunk))
		add_move(pump, chunk);
	pump->bytes += chunk->bytes;
	pump->direct[pump->nr_chunks] = (uint8_t)direct;
	pump->last_calls[pump->nr_chunks] = pump->batch->nr_calls - 1;
	pump->chunks[pump->nr_chunks++] = chunk;
	return 1;
}

/* Run the calls from `batch->next` on. 0: all done; 1: the call at `batch->next` went wrong. */
static int run_rest(struct pump *pump, struct gr_error *err)
{
	struct gr_batch *batch = pump->batch;
	uint32_t done = batch->next, nr_calls = batch->nr_calls;
	int ret;

	/* The agent begins at the first call: what is done makes room. */
	memmove(batch->calls, &batch->calls[done], (nr_calls - done) * sizeof(struct gr_call));
	batch->nr_calls -= done;
	for (uint32_t i = 0; i < pump->nr_chunks; i++)
		pump->last_calls[i] -= done;
	if (gr_is_cancelled(pump->cancel))
		return gr_fail(err, ECANCELED, "filling the memory of task %d", pump->worker->pid);
	ret = gr_slot_run(pump->region, pump->worker->slot, pump->worker->pid, pump->cancel, err);
	return ret < 0 ? ret : batch->status;
}

/* Whether the call that went wrong was a move that is worth another try; then it stands ready for the rest of it. */
static int mend_move(const struct gr_call *call)
{
	struct move *move = (struct move *)call->args[2];

	if (call->nr != __NR_ioctl || (call->result != -EAGAIN && call->result != -EBUSY))
		return 0;
	if (move->moved > 0) {
		move->dst += (uint64_t)move->moved;
		move->src += (uint64_t)move->moved;
		move->len -= (uint64_t)move->moved;
	}
	move->moved = 0;
	return move->len > 0;
}

static int check_read(const struct pump *pump, struct gr_error *err)
{
	const struct gr_call *call = &pump->batch->calls[pump->batch->next];
	const struct iovec *first = (const struct iovec *)call->args[1];

	if (call->result < 0)
		return gr_fail(err, (int)-call->result, "reading %ld bytes of pages into %p of task %d", call->want,
			       first->iov_base, pump->worker->pid);
	return gr_fail(err, EIO, "reading pages into %p of task %d: only %ld of %ld bytes came from the pages file",
		       first->iov_base, pump->worker->pid, call->result, call->want);
}

/* Read a chunk through the page cache to where it belongs, whatever became of it before. */
static int run_plainly(struct pump *pump, const struct gr_chunk *chunk, struct gr_error *err)
{
	int ret;

	begin_batch(pump);
	/* What is left there must not show up in the next block. */
	if (moves(pump, chunk))
		add_staging_advice(pump, GR_PUMP_STAGING_BYTES, MADV_DONTNEED);
	add_read(pump, chunk, pump->source->fd, 0);
	ret = run_rest(pump, err);
	if (ret == 1)
		ret = check_read(pump, err);
	if (ret == 0)
		gr_pump_done(pump->queue, chunk, 0, 0);
	return ret;
}

/* Run the batch, with moves tried again where that helps; as run_rest. */
static int run_moving(struct pump *pump, struct gr_error *err)
{
	int ret = run_rest(pump, err);

	for (int i = 0; ret == 1 && i < MAX_MOVES && mend_move(&pump->batch->calls[pump->batch->next]); i++) {
		if (i)
			usleep(MOVE_PAUSE_US);
		ret = run_rest(pump, err);
	}
	return ret;
}

/* Run the batch; `*nr_done` chunks are in place afterwards, and the one behind them, if any, went wrong for good. */
static int run_batch(struct pump *pump, uint32_t *nr_done, struct gr_error *err)
{
	int ret = run_moving(pump, err);

	if (ret < 0)
		return ret;
	for (*nr_done = 0; *nr_done < pump->nr_chunks; ++*nr_done) {
		const struct gr_chunk *chunk = pump->chunks[*nr_done];

		if (ret && (int32_t)pump->last_calls[*nr_done] >= (int32_t)pump->batch->next)
			break;
		gr_pump_done(pump->queue, chunk, moves(pump, chunk), pump->direct[*nr_done]);
	}
	return 0;
}

static int is_for_placing(const struct pump *pump, const struct gr_chunk *chunk)
{
	return pump->worker->placing && !chunk->unplaceable && !moves(pump, chunk) &&
	       chunk->bytes >= chunk->nr * MIN_PLACED_RUN_BYTES && !gr_pump_is_cold(pump->source, chunk);
}

/* One wake's worth: `first` and what follows it in the queue. `*next` is to be placed instead, or found no room. */
static int run_once(struct pump *pump, const struct gr_chunk *first, const struct gr_chunk **next, struct gr_error *err)
{
	const struct gr_chunk *chunks[MAX_CHUNKS];
	uint32_t nr, done = 0;
	int ret;

	*next = first;
	begin_batch(pump);
	while (*next && (*next == first || !is_for_placing(pump, *next)) && add_chunk(pump, *next))
		*next = gr_pump_take(pump->queue);
	nr = pump->nr_chunks;
	memcpy(chunks, pump->chunks, nr * sizeof(*chunks));
	ret = run_batch(pump, &done, err);
	/* A chunk that went wrong took the rest of the batch with it. */
	for (; ret == 0 && done < nr; done++)
		ret = run_plainly(pump, chunks[done], err);
	return ret;
}

static struct pump pump_of(struct gr_region *region, const struct gr_pump_worker *worker,
			   const struct gr_pump_source *source, struct gr_pump_queue *queue, int *cancel)
{
	char *base = (char *)region->slots + (uint64_t)worker->slot * GR_SLOT_BYTES + GR_SLOT_BATCH_OFFSET;

	return (struct pump){ .region = region, .worker = worker, .source = source, .queue = queue, .cancel = cancel,
			      .batch = (struct gr_batch *)base, .slot_end = base + GR_SLOT_BATCH_BYTES };
}

int gr_pump_run(struct gr_region *region, const struct gr_pump_worker *worker, const struct gr_pump_source *source,
		struct gr_pump_queue *queue, int *cancel, struct gr_error *err)
{
	struct pump pump = pump_of(region, worker, source, queue, cancel);
	const struct gr_chunk *chunk = gr_pump_take(queue);
	int ret = 0;

	while (ret == 0 && chunk) {
		if (gr_is_cancelled(cancel))
			return gr_fail(err, ECANCELED, "filling the memory of task %d", worker->pid);
		if (is_for_placing(&pump, chunk) && gr_pump_place(queue, worker->placing, source, chunk))
			chunk = gr_pump_take(queue);
		else
			ret = run_once(&pump, chunk, &chunk, err);
	}
	return ret;
}

int gr_pump_populate(struct gr_region *region, const struct gr_pump_worker *worker, struct gr_pump_queue *queue,
		     int *cancel, struct gr_error *err)
{
	struct pump pump = pump_of(region, worker, NULL, queue, cancel);
	const struct gr_chunk *chunk;
	int ret = 0;

	while (ret >= 0 && (chunk = gr_pump_take(queue))) {
		if (!moves(&pump, chunk))
			continue;
		begin_batch(&pump);
		add_staging_advice(&pump, chunk->huge_bytes, MADV_POPULATE_WRITE);
		add_move(&pump, chunk);
		ret = run_moving(&pump, err);
		if (ret == 0)
			__atomic_fetch_add(&queue->moved_bytes, chunk->bytes, __ATOMIC_RELAXED);
		/* Otherwise there is nothing yet, or what was moved before it failed: zeros, to be overwritten. */
	}
	return ret < 0 ? ret : 0;
}
