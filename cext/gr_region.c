#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "gr_agent.h"
#include "gr_agent_blob.h"
#include "gr_internal.h"
#include "gr_region.h"

/* How long a waiter sleeps between looks at `cancel` and at the thread's health. */
#define WAIT_SLICE_NS 2000000L
/* Most batches take a few microseconds: give the agent that long before sleeping on the futex. */
#define SPIN_ROUNDS 64

static uint64_t code_bytes(void)
{
	uint64_t bytes = (uint64_t)(gr_agent_blob_end - gr_agent_blob);

	return (bytes + GR_PAGE_BYTES - 1) & ~(GR_PAGE_BYTES - 1);
}

static struct gr_slot *slot_at(const struct gr_region *region, uint32_t slot)
{
	return (struct gr_slot *)(region->slots + (uint64_t)slot * GR_SLOT_BYTES);
}

uint64_t gr_region_size(uint32_t nr_slots)
{
	return code_bytes() + (uint64_t)nr_slots * GR_SLOT_BYTES;
}

int gr_region_create(uint64_t address, uint32_t nr_slots, struct gr_region *out, struct gr_error *err)
{
	uint64_t bytes = gr_region_size(nr_slots);
	void *want = (void *)address;
	/* Slots are touched one by one, so that thousands of them cost only what is used. */
	void *got = mmap(want, bytes, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0);

	if (got == MAP_FAILED)
		return gr_fail(err, errno, "mapping the agent's region of %lu bytes at %#lx", bytes, address);
	memcpy(got, gr_agent_blob, gr_agent_blob_end - gr_agent_blob);
	if (mprotect(got, code_bytes(), PROT_READ | PROT_EXEC) < 0) {
		int code = errno;

		munmap(got, bytes);
		return gr_fail(err, code, "making the agent executable at %#lx", address);
	}
	*out = (struct gr_region){ .address = address, .bytes = bytes, .slots = address + code_bytes(),
				   .nr_slots = nr_slots };
	return 0;
}

void gr_region_destroy(struct gr_region *region)
{
	if (region->bytes)
		munmap((void *)region->address, region->bytes);
	region->bytes = 0;
}

void gr_slot_post(struct gr_region *region, uint32_t slot)
{
	struct gr_slot *s = slot_at(region, slot);

	__atomic_store_n(&s->state, GR_SLOT_POSTED, __ATOMIC_RELEASE);
	syscall(__NR_futex, &s->state, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* A thread that was killed or stopped by a signal will never answer. WNOWAIT: the report stays for the tracer. */
static int check_alive(int tid, struct gr_error *err)
{
	siginfo_t info = { .si_pid = 0 };

	if (waitid(P_PID, tid, &info, WEXITED | WSTOPPED | WNOHANG | WNOWAIT | __WALL) < 0) {
		/* ECHILD: the tracer has not seen its birth yet, or it is gone for good. */
		if (errno == ECHILD && syscall(__NR_tkill, tid, 0) < 0)
			return gr_fail(err, ESRCH, "task %d is gone", tid);
		return 0;
	}
	if (info.si_pid == 0)
		return 0;
	if (info.si_code == CLD_TRAPPED)
		return gr_fail(err, EFAULT, "task %d was stopped by signal %d", tid, info.si_status & 0x7f);
	return gr_fail(err, ESRCH, "task %d died (%s %d)", tid, info.si_code == CLD_EXITED ? "status" : "signal",
		       info.si_status);
}

int gr_slot_wait(struct gr_region *region, uint32_t slot, int tid, int *cancel, struct gr_error *err)
{
	struct gr_slot *s = slot_at(region, slot);
	struct timespec slice = { .tv_nsec = WAIT_SLICE_NS };

	for (int i = 0; i < SPIN_ROUNDS; i++) {
		if (__atomic_load_n(&s->state, __ATOMIC_ACQUIRE) == GR_SLOT_IDLE)
			return 0;
		sched_yield();
	}
	for (int rounds = 0;; rounds++) {
		if (__atomic_load_n(&s->state, __ATOMIC_ACQUIRE) == GR_SLOT_IDLE)
			return 0;
		if (gr_is_cancelled(cancel))
			return gr_fail(err, ECANCELED, "waiting for task %d", tid);
		if (rounds > 0) {
			int ret = check_alive(tid, err);

			if (ret < 0)
				return ret;
		}
		syscall(__NR_futex, &s->state, FUTEX_WAIT, GR_SLOT_POSTED, &slice, NULL, 0);
	}
}

int gr_slot_run(struct gr_region *region, uint32_t slot, int tid, int *cancel, struct gr_error *err)
{
	gr_slot_post(region, slot);
	return gr_slot_wait(region, slot, tid, cancel, err);
}
