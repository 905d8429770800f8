#ifndef GR_AGENT_H
#define GR_AGENT_H

#include <stdint.h>

/*
 * What the agent and the main process share. The agent runs inside a task and knows one thing: to run a batch of
 * system calls. gpurestore/batch.py writes the same layout; cext/agent.c asserts it.
 *
 *   slot:  +0      struct gr_slot        futex words
 *          +64     struct gr_batch       header, calls, then their data
 *          +STACK  stack of the thread that serves this slot, growing down from the slot's end
 */
#define GR_SLOT_BYTES 131072
#define GR_SLOT_STACK_BYTES 8192
#define GR_SLOT_BATCH_OFFSET 64
#define GR_SLOT_BATCH_BYTES (GR_SLOT_BYTES - GR_SLOT_STACK_BYTES - GR_SLOT_BATCH_OFFSET)

#define GR_EXPECT_OK 0    /* result >= 0 */
#define GR_EXPECT_EXACT 1 /* result == want */
#define GR_EXPECT_ANY 2

/*
 * Numbers that are no system calls. USE_TILES: use an AMX tile once. The kernel makes room for a thread's tiles at that
 * moment, and only then takes their content from ptrace. Needs ARCH_REQ_XCOMP_PERM before.
 */
#define GR_OP_USE_TILES 0x10000
/*
 * CLONE: clone3(args[0], args[1]); the newborn serves the slot at args[2] at once, on that slot's stack. With args[3],
 * the pid that it must find as its parent's, it dies with its parent until it is told otherwise; threads have 0 there.
 */
#define GR_OP_CLONE 0x10001

struct gr_call {
	uint64_t nr;
	uint64_t args[6];
	uint32_t refs; /* bit i: args[i] is the index of an earlier call, whose result is passed */
	uint32_t expect;
	int64_t want;
	int64_t result;
};

struct gr_batch {
	uint32_t nr_calls;
	uint32_t next;  /* the call that runs now or, when status is 1, the one that failed */
	int32_t status; /* 0: all went as expected; 1: stopped at `next` */
	uint32_t reserved;
	struct gr_call calls[];
};

/* state words of a slot: the main process posts, the agent answers */
#define GR_SLOT_IDLE 0
#define GR_SLOT_POSTED 1

struct gr_slot {
	uint32_t state; /* futex: POSTED by the main process, IDLE again when the batch is done */
	uint32_t served; /* counts batches; lets a waiter tell a finished batch from a new slot */
};

#endif
