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
	uint64_t address;     /* start; multiple of 4096 */
	uint64_t bytes;       /* whole mapping */
	uint64_t slots;       /* address of slot 0 */
	uint32_t nr_slots;
	uint32_t reserved;
};

int gr_region_create(uint64_t address, uint32_t nr_slots, struct gr_region *out, struct gr_error *err);
void gr_region_destroy(struct gr_region *region);
uint64_t gr_region_size(uint32_t nr_slots);

/*
 * Post the batch that already lies in the slot and wait until the agent has run it. Any thread may call this; one
 * thread per slot at a time. `cancel` (may be NULL) is polled every few milliseconds: non-zero returns -ECANCELED while
 * the batch still runs, after which the slot must not be used again. `pid` is watched: -ESRCH when it is gone.
 */
int gr_slot_run(struct gr_region *region, uint32_t slot, int pid, int *cancel, struct gr_error *err);

#endif
