#ifndef GR_TRACER_H
#define GR_TRACER_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_region.h"

/*
 * One thread owns every ptrace relation, because the kernel binds them to the thread that seized. All functions post
 * a request to that thread and wait for the answer; any thread may call them. Requests run one after another.
 */
struct gr_tracer;

/* struct user_regs_struct (arch/x86/include/asm/user_64.h) */
struct gr_regs {
	uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax;
	uint64_t rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};

struct gr_thread_state {
	int tid;
	int stop_signal;       /* group-stopped by this signal, else 0 */
	struct gr_regs regs;   /* as the kernel holds them: a pending syscall restart is still in rax/orig_rax */
	uint64_t sigmask;
	uint64_t rseq_address; /* 0: none registered */
	uint32_t rseq_bytes, rseq_signature, rseq_flags;
	int dispatches_calls;  /* prctl(PR_SET_SYSCALL_USER_DISPATCH) is on: its system calls may become signals */
	int opens_ports;       /* ioperm(2) gave it I/O ports */
	uint32_t xstate_bytes; /* of xstate, in the standard (not compacted) format */
	uint8_t xstate[16384];
};

int gr_tracer_create(struct gr_tracer **out, struct gr_error *err);
/*
 * Lets go of what is still attached: a seized task leaves the agent and goes on as it was, a spawned one is killed.
 * Then joins the thread.
 */
void gr_tracer_destroy(struct gr_tracer *tracer);

/*
 * Dump side.
 *
 * gr_seize stops every thread of `pid` and returns how many there are; their ids go to `tids`, the leader's first.
 * Calling it again picks up threads that have appeared since. On failure the task goes on.
 */
int gr_seize(struct gr_tracer *tracer, int pid, int *tids, int max_tids, struct gr_error *err);
int gr_thread_read(struct gr_tracer *tracer, int tid, struct gr_thread_state *out, struct gr_error *err);
/* Pending signals of a thread, or with `shared` of its process: up to `max` siginfo_t of 128 bytes; returns how many. */
int gr_peek_signals(struct gr_tracer *tracer, int tid, int shared, uint64_t offset, uint8_t *out, int max,
		    struct gr_error *err);
/*
 * Maps the agent with `nr_slots` slots at `address` in the task. From then on every thread that runs in it can find
 * its way back to its own registers alone, should the tracer die.
 */
int gr_agent_enter(struct gr_tracer *tracer, int pid, uint64_t address, uint32_t nr_slots, struct gr_error *err);
uint64_t gr_agent_bytes(uint32_t nr_slots);
/* Runs a batch in thread `tid` on slot `slot` (a slot belongs to one thread); `batch` is read back in place. */
int gr_agent_run(struct gr_tracer *tracer, int tid, uint32_t slot, uint8_t *batch, uint64_t batch_bytes,
		 struct gr_error *err);
/* Address of a slot's batch in the task, for which batches must be encoded. */
uint64_t gr_agent_batch_address(uint64_t address, uint32_t slot);
/*
 * Lets one thread of a frozen task run, all its signals blocked, until gr_thread_hold stops it again: a device driver
 * may need a helper thread of the task. Not while the thread is in the agent.
 */
int gr_thread_let_run(struct gr_tracer *tracer, int tid, struct gr_error *err);
int gr_thread_hold(struct gr_tracer *tracer, int tid, struct gr_error *err);
/* Puts every thread back to where it was and unmaps the agent; the task stays frozen. */
int gr_agent_leave(struct gr_tracer *tracer, int pid, struct gr_error *err);
/* Detaches; with `stop` the task stays stopped (SIGSTOP), else it goes on as it was found. */
int gr_release(struct gr_tracer *tracer, int pid, int stop, struct gr_error *err);
/* Kills and waits until all are dead. Pids that are not traced are skipped. */
int gr_kill(struct gr_tracer *tracer, const int *pids, int nr_pids, struct gr_error *err);

/*
 * Restore side. Spawned tasks die with the tracer's thread until gr_resume lets them go.
 *
 * gr_spawn_root forks `pid` out of this process, serving `slot` of `region`, with all signals blocked.
 */
int gr_spawn_root(struct gr_tracer *tracer, struct gr_region *region, int pid, uint32_t slot, struct gr_error *err);
/*
 * Takes what an agent cloned (GR_OP_CLONE): `tids` are threads of `pid` or, where that is 0, tasks. Until then a task
 * dies with its parent only.
 */
int gr_adopt(struct gr_tracer *tracer, int pid, const int *tids, int nr_tids, struct gr_error *err);
/* Stops all threads of `pid` for good and unmaps [address, address + bytes), the agent's region, from the task. */
int gr_park(struct gr_tracer *tracer, int pid, uint64_t address, uint64_t bytes, struct gr_error *err);
/* Final registers, extended state and signal mask of a parked thread. */
int gr_thread_write(struct gr_tracer *tracer, const struct gr_thread_state *state, struct gr_error *err);
/* Lets a parked task go; with `stop_signal` it stops at once, as it was stopped when dumped. */
int gr_resume(struct gr_tracer *tracer, int pid, int stop_signal, struct gr_error *err);
/* Waits for a task that was told to exit, leaving its zombie to its parent; *status as waitpid(2) has it. */
int gr_await_exit(struct gr_tracer *tracer, int pid, int *status, struct gr_error *err);

#endif
