/* One traced thread: its stops, registers and signal mask. Runs on the tracer's thread only. */
#include <elf.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "gr_tracer_internal.h"

#define EVENT(status) ((status) >> 16)
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define WAIT_SPINS 200
#define WAIT_STEP_MAX_NS 1000000L
#define WAIT_DEADLINE_NS 10000000000L

struct gr_tracee *gr_tracee_find(struct gr_tracer_state *state, int tid)
{
	for (int i = 0; i < state->tracees.nr; i++)
		if (state->tracees.items[i]->tid == tid)
			return state->tracees.items[i];
	return NULL;
}

struct gr_tracee *gr_tracee_add(struct gr_tracer_state *state, int tid, int pid, bool spawned)
{
	struct gr_tracee_table *table = &state->tracees;
	struct gr_tracee *tracee = calloc(1, sizeof(*tracee));

	if (!tracee)
		return NULL;
	if (table->nr == table->room) {
		int room = table->room ? 2 * table->room : 64;
		void *grown = realloc(table->items, room * sizeof(*table->items));

		if (!grown) {
			free(tracee);
			return NULL;
		}
		table->items = grown;
		table->room = room;
	}
	*tracee = (struct gr_tracee){ .tid = tid, .pid = pid, .spawned = spawned };
	table->items[table->nr++] = tracee;
	return tracee;
}

void gr_tracee_remove(struct gr_tracer_state *state, int tid)
{
	struct gr_tracee_table *table = &state->tracees;

	for (int i = 0; i < table->nr; i++) {
		if (table->items[i]->tid == tid) {
			free(table->items[i]);
			table->items[i] = table->items[--table->nr];
			return;
		}
	}
}

/*
 * waitpid has no timeout, and a thread in vfork(2) or in an uninterruptible sleep stops only when that is over: look
 * at once, then in growing steps until the deadline.
 */
static int wait_status(int tid, int *status, struct gr_error *err)
{
	struct timespec pause = { .tv_nsec = 20000 };
	long waited_ns = 0;

	for (int rounds = 0;; rounds++) {
		int got = waitpid(tid, status, __WALL | WNOHANG);

		if (got == tid)
			return 0;
		if (got < 0 && errno != EINTR)
			return gr_fail(err, ESRCH, "waiting for task %d", tid);
		if (rounds < WAIT_SPINS) {
			sched_yield();
			continue;
		}
		if (waited_ns > WAIT_DEADLINE_NS)
			return gr_fail(err, ETIMEDOUT, "task %d did not stop (in vfork, or in an uninterruptible sleep?)",
				       tid);
		nanosleep(&pause, NULL);
		waited_ns += pause.tv_nsec;
		if (pause.tv_nsec < WAIT_STEP_MAX_NS)
			pause.tv_nsec *= 2;
	}
}

int gr_tracee_wait(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	int status, tid = tracee->tid;
	int ret = wait_status(tid, &status, err);

	if (ret == -ETIMEDOUT)
		return ret;
	if (ret < 0) {
		gr_tracee_remove(state, tid);
		return ret;
	}
	if (!WIFSTOPPED(status)) {
		gr_tracee_remove(state, tid);
		return gr_fail(err, ESRCH, "task %d died (wait status %#x)", tid, status);
	}
	tracee->stopped = true;
	return status;
}

static int resume(struct gr_tracee *tracee, int request, int signal, struct gr_error *err)
{
	if (ptrace(request, tracee->tid, NULL, (void *)(long)signal) < 0)
		return gr_fail(err, errno, "resuming task %d", tracee->tid);
	tracee->stopped = false;
	return 0;
}

/* After PTRACE_INTERRUPT: signals that were already being delivered come first and go their way. */
static int wait_for_interrupt(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	for (;;) {
		int status = gr_tracee_wait(state, tracee, err);
		int ret, signal = 0;

		if (status < 0)
			return status;
		if (EVENT(status) == PTRACE_EVENT_STOP) {
			tracee->stop_signal = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
			return 0;
		}
		if (!EVENT(status) && WSTOPSIG(status) != SYSCALL_STOP)
			signal = WSTOPSIG(status);
		ret = resume(tracee, PTRACE_CONT, signal, err);
		if (ret < 0)
			return ret;
	}
}

int gr_tracee_interrupt(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	if (ptrace(PTRACE_INTERRUPT, tracee->tid, NULL, NULL) < 0) {
		int code = errno;

		gr_tracee_remove(state, tracee->tid);
		return gr_fail(err, code, "interrupting a thread that is gone");
	}
	return wait_for_interrupt(state, tracee, err);
}

int gr_tracee_settle(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	int ret;

	if (ptrace(PTRACE_INTERRUPT, tracee->tid, NULL, NULL) < 0)
		return gr_fail(err, errno, "interrupting task %d", tracee->tid);
	ret = resume(tracee, PTRACE_CONT, 0, err);
	if (ret < 0)
		return ret;
	int found = tracee->stop_signal;

	ret = wait_for_interrupt(state, tracee, err);
	if (ret == 0)
		tracee->stop_signal = found;
	return ret;
}

int gr_tracee_get_regs(const struct gr_tracee *tracee, struct gr_regs *regs, struct gr_error *err)
{
	struct iovec iov = { regs, sizeof(*regs) };

	if (ptrace(PTRACE_GETREGSET, tracee->tid, (void *)NT_PRSTATUS, &iov) < 0)
		return gr_fail(err, errno, "reading registers of task %d", tracee->tid);
	if (iov.iov_len != sizeof(*regs))
		return gr_fail(err, ENOTSUP, "task %d runs 32-bit code", tracee->tid);
	return 0;
}

int gr_tracee_set_regs(const struct gr_tracee *tracee, const struct gr_regs *regs, struct gr_error *err)
{
	struct iovec iov = { (void *)regs, sizeof(*regs) };

	if (ptrace(PTRACE_SETREGSET, tracee->tid, (void *)NT_PRSTATUS, &iov) < 0)
		return gr_fail(err, errno, "writing registers of task %d", tracee->tid);
	return 0;
}

int gr_tracee_get_mask(const struct gr_tracee *tracee, uint64_t *mask, struct gr_error *err)
{
	if (ptrace(PTRACE_GETSIGMASK, tracee->tid, (void *)sizeof(*mask), mask) < 0)
		return gr_fail(err, errno, "reading the signal mask of task %d", tracee->tid);
	return 0;
}

int gr_tracee_set_mask(const struct gr_tracee *tracee, uint64_t mask, struct gr_error *err)
{
	if (ptrace(PTRACE_SETSIGMASK, tracee->tid, (void *)sizeof(mask), &mask) < 0)
		return gr_fail(err, errno, "writing the signal mask of task %d", tracee->tid);
	return 0;
}

/* One step of PTRACE_SYSCALL to the next entry or exit; stray stops are passed over, a signal is an error. */
static int step_syscall(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	for (;;) {
		int status, ret = resume(tracee, PTRACE_SYSCALL, 0, err);

		if (ret < 0)
			return ret;
		status = gr_tracee_wait(state, tracee, err);
		if (status < 0)
			return status;
		if (WSTOPSIG(status) == SYSCALL_STOP && !EVENT(status))
			return 0;
		if (!EVENT(status))
			return gr_fail(err, EFAULT, "task %d got signal %d inside the agent", tracee->tid,
				       WSTOPSIG(status));
	}
}

int gr_tracee_run_to_syscall_exit(struct gr_tracer_state *state, struct gr_tracee *tracee,
				  bool (*is_it)(const struct gr_regs *at_entry), struct gr_regs *regs,
				  struct gr_error *err)
{
	for (;;) {
		bool found;
		int ret = step_syscall(state, tracee, err);

		if (ret < 0)
			return ret;
		ret = gr_tracee_get_regs(tracee, regs, err);
		if (ret < 0)
			return ret;
		found = !is_it || is_it(regs);
		ret = step_syscall(state, tracee, err);
		if (ret < 0)
			return ret;
		if (found)
			return gr_tracee_get_regs(tracee, regs, err);
	}
}

int gr_tracee_detach(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	int tid = tracee->tid, code = 0;

	if (ptrace(PTRACE_DETACH, tid, NULL, NULL) < 0)
		code = errno;
	gr_tracee_remove(state, tid);
	return code ? gr_fail(err, code, "detaching from task %d", tid) : 0;
}
