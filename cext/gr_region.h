#ifndef GR_REGION_H
#define GR_REGION_H

#include <stdint.h>
#include "gr_error.h"

/*
 * The region: one MAP_SHARED|MAP_ANONYMOUS mapping, made by the main process before it forks the first restored task
 * and therefore at the same address in every task of the tree. It holds the agent's code (read, execute) and slots.
 * A thread that serves a slot waits on the slot's futex for a batch; the main process writes batches there and waits.
 */
struct gr_region {
	uint64_t address; /* start; multiple of the page size */
	uint64_t bytes;   /* whole mapping */
	uint64_t slots;   /* address of slot 0 */
	uint32_t nr_slots;
	uint32_t reserved;
};

uint64_t gr_region_size(uint32_t nr_slots);
int gr_region_create(uint64_t address, uint32_t nr_slots, struct gr_region *out, struct gr_error *err);
void gr_region_destroy(struct gr_region *region);

/*
 * Post the batch that already lies in the slot. Any thread may call this; one thread per slot at a time, and only
 * while the slot is idle.
 */
void gr_slot_post(struct gr_region *region, uint32_t slot);
/*
 * Wait until the agent has run the posted batch. `cancel` (may be NULL) is polled every few milliseconds: non-zero
 * returns -ECANCELED while the batch still runs, after which the slot must not be used again. `tid` is the thread that
 * serves the slot: -ESRCH when it is gone, -EFAULT when a signal (in context) stopped it.
 */
int gr_slot_wait(struct gr_region *region, uint32_t slot, int tid, int *cancel, struct gr_error *err);
/* gr_slot_post and gr_slot_wait. */
int gr_slot_run(struct gr_region *region, uint32_t slot, int tid, int *cancel, struct gr_error *err);

#endif
