#ifndef GR_TRACER_INTERNAL_H
#define GR_TRACER_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "gr_internal.h"
#include "gr_tracer.h"

/* One traced thread. Everything below belongs to the tracer's thread; nothing here is locked. */
struct gr_tracee {
	int tid;
	int pid;          /* thread group */
	bool spawned;     /* made by a restore: dies with us */
	bool stopped;
	bool in_agent;    /* its registers are the agent's; `home` holds its own */
	bool let_run;     /* runs on purpose; `home_mask` holds its own mask */
	int stop_signal;  /* group stop it was found in */
	struct gr_regs home;
	uint64_t home_mask;
};

/* The agent inside a seized task. */
struct gr_host {
	int pid;
	int mem_fd; /* /proc/PID/mem */
	uint64_t address, bytes;
	uint32_t nr_slots;
	uint64_t syscall_ret, sigreturn; /* gadgets in the task's own code; sigreturn may be 0 */
};

struct gr_tracee_table {
	struct gr_tracee **items; /* sorted by nothing: trees have tens of threads */
	int nr, room;
};

struct gr_tracer_state {
	struct gr_tracee_table tracees;
	struct gr_host *hosts;
	int nr_hosts;
};

typedef int gr_request_fn(struct gr_tracer_state *state, void *arg, struct gr_error *err);

/* Runs fn(arg) on the tracer's thread and returns its result. */
int gr_tracer_call(struct gr_tracer *tracer, gr_request_fn *fn, void *arg, struct gr_error *err);

/* tracees (gr_tracee.c) */
struct gr_tracee *gr_tracee_find(struct gr_tracer_state *state, int tid);
struct gr_tracee *gr_tracee_add(struct gr_tracer_state *state, int tid, int pid, bool spawned);
void gr_tracee_remove(struct gr_tracer_state *state, int tid);
/* Waits for the next stop of one thread. -ESRCH when it died (and is forgotten); else the raw wait status. */
int gr_tracee_wait(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err);
/* PTRACE_INTERRUPT and wait; signals that were on their way are delivered first. */
int gr_tracee_interrupt(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err);
int gr_tracee_get_regs(const struct gr_tracee *tracee, struct gr_regs *regs, struct gr_error *err);
int gr_tracee_set_regs(const struct gr_tracee *tracee, const struct gr_regs *regs, struct gr_error *err);
int gr_tracee_get_mask(const struct gr_tracee *tracee, uint64_t *mask, struct gr_error *err);
int gr_tracee_set_mask(const struct gr_tracee *tracee, uint64_t mask, struct gr_error *err);
/* Runs until the exit of the system call for which `is_it` says yes at its entry (NULL: the next one). */
int gr_tracee_run_to_syscall_exit(struct gr_tracer_state *state, struct gr_tracee *tracee,
				  bool (*is_it)(const struct gr_regs *at_entry), struct gr_regs *regs,
				  struct gr_error *err);
/* From a system call's exit to a plain stop, where restored registers restart an interrupted call by themselves. */
int gr_tracee_settle(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err);
int gr_tracee_detach(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err);

/* a task's own code (gr_gadget.c) */
int gr_find_gadgets(int pid, uint64_t *syscall_ret, uint64_t *sigreturn, uint64_t *plain_syscall, struct gr_error *err);

/* signal frames (gr_sigframe.c) */
#define GR_SIGFRAME_MAX 20480
/*
 * Builds, for address `at`, the frame from which rt_sigreturn restores `regs`, `mask` and the extended state; its
 * first 8 bytes, the return address, are `restorer`. Returns the frame's size. `at` is congruent 8 modulo 16, and
 * at + size is below the end the caller has room for.
 */
size_t gr_sigframe_build(uint8_t *out, uint64_t at, uint64_t restorer, const struct gr_regs *regs, uint64_t mask,
			 const uint8_t *xstate, size_t xstate_bytes);
int gr_read_xstate(const struct gr_tracee *tracee, uint8_t *out, size_t room, size_t *bytes, struct gr_error *err);

/* injection (gr_inject.c), also used when the tracer goes away */
int gr_host_leave(struct gr_tracer_state *state, int pid, struct gr_error *err);
/* One system call with all arguments in a thread that stands at a plain stop, through an instruction at `gadget`. */
int gr_remote_syscall(struct gr_tracer_state *state, struct gr_tracee *tracee, uint64_t gadget, uint64_t nr,
		      const uint64_t *args, uint64_t rsp, int64_t *result, struct gr_error *err);

#endif
