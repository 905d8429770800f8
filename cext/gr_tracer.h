#ifndef GR_TRACER_H
#define GR_TRACER_H

#include <stdint.h>
#include "gr_error.h"
#include "gr_region.h"

/*
 * One thread owns every ptrace relation, because the kernel binds them to the thread that seized. All functions post
 * a request to that thread and wait for the answer; any thread may call them.
 */
struct gr_tracer;

struct gr_regs {
	uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax;
	uint64_t rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};

#define GR_XSTATE_MAX 16384

struct gr_thread_state {
	int tid;
	int stop_signal;         /* group-stopped by this signal, else 0 */
	struct gr_regs regs;     /* as the kernel holds them: a pending syscall restart is still in rax/orig_rax */
	uint64_t sigmask;
	uint64_t rseq_address;   /* 0: none registered */
	uint32_t rseq_bytes, rseq_signature, rseq_flags;
	uint32_t xstate_bytes;   /* of xstate, in the standard (not compacted) format */
	uint8_t xstate[16384];
};

int gr_tracer_create(struct gr_tracer **out, struct gr_error *err);
/* Detaches whatever is still attached (a dump) or kills it (tasks spawned for a restore), then joins the thread. */
void gr_tracer_destroy(struct gr_tracer *tracer);

/* Dump side. */
int gr_seize(struct gr_tracer *tracer, int pid, int *tids, int max_tids, struct gr_error *err);
int gr_thread_read(struct gr_tracer *tracer, int tid, struct gr_thread_state *out, struct gr_error *err);
int gr_agent_enter(struct gr_tracer *tracer, int pid, uint64_t address, uint32_t nr_slots, struct gr_error *err);
int gr_agent_run(struct gr_tracer *tracer, int tid, uint32_t slot, uint8_t *batch, uint64_t batch_bytes,
		 struct gr_error *err);
int gr_agent_leave(struct gr_tracer *tracer, int pid, struct gr_error *err);
int gr_release(struct gr_tracer *tracer, int pid, int stop_signal, struct gr_error *err);
int gr_kill(struct gr_tracer *tracer, int *pids, int nr_pids, struct gr_error *err);

/* Restore side. */
int gr_spawn_root(struct gr_tracer *tracer, struct gr_region *region, int pid, uint32_t slot, struct gr_error *err);
int gr_clone(struct gr_tracer *tracer, struct gr_region *region, int parent_tid, uint32_t parent_slot, uint64_t flags,
	     int exit_signal, int tid, uint32_t slot, struct gr_error *err);
int gr_thread_write(struct gr_tracer *tracer, const struct gr_thread_state *state, struct gr_error *err);
int gr_park(struct gr_tracer *tracer, int pid, uint64_t unmap_address, uint64_t unmap_bytes, struct gr_error *err);
int gr_resume(struct gr_tracer *tracer, int pid, int stop_signal, struct gr_error *err);
int gr_reap_exited(struct gr_tracer *tracer, int pid, int *status, struct gr_error *err);

#endif
