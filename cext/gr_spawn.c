/* Restore side: making tasks and threads with given ids, giving them their final registers, letting them go. */
#include <elf.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "gr_agent.h"
#include "gr_agent_entry.h"
#include "gr_tracer_internal.h"

/* A spawned task dies with us. */
#define SPAWN_OPTIONS (PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD)
/* clone_args of 5.5, the first with set_tid */
#define CLONE_ARGS_BYTES 80

static uint64_t slot_address(const struct gr_region *region, uint32_t slot)
{
	return region->slots + (uint64_t)slot * GR_SLOT_BYTES;
}

/*
 * clone3 whose child never comes back here: it asks to die with its parent, makes sure that the parent still lives,
 * and jumps into the agent. Its stack is the slot's, so nothing of ours is touched.
 */
static long clone_into_agent(struct clone_args *args, uint64_t slot, uint64_t entry)
{
	register uint64_t r12 __asm__("r12") = slot;
	register uint64_t r13 __asm__("r13") = entry;
	register uint64_t r14 __asm__("r14") = (uint64_t)getpid();
	long result;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "mov $157, %%eax\n\t" /* prctl(PR_SET_PDEATHSIG, SIGKILL) */
			 "mov $1, %%edi\n\t"
			 "mov $9, %%esi\n\t"
			 "syscall\n\t"
			 "mov $110, %%eax\n\t" /* getppid */
			 "syscall\n\t"
			 "cmp %%r14, %%rax\n\t"
			 "je 2f\n\t"
			 "mov $231, %%eax\n\t" /* exit_group */
			 "syscall\n\t"
			 "2: mov %%r12, %%rdi\n\t"
			 "jmp *%%r13\n\t"
			 "1:"
			 : "=a"(result)
			 : "a"(__NR_clone3), "D"(args), "S"((uint64_t)CLONE_ARGS_BYTES), "r"(r12), "r"(r13), "r"(r14)
			 : "rcx", "r11", "memory");
	return result;
}

struct spawn_request {
	struct gr_region *region;
	int pid;
	uint32_t slot;
};

static int do_spawn_root(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct spawn_request *request = arg;
	uint64_t slot = slot_address(request->region, request->slot);
	pid_t set_tid = request->pid;
	struct clone_args args = {
		.exit_signal = SIGCHLD,
		.stack = slot,
		.stack_size = GR_SLOT_BYTES - 64,
		.set_tid = (uint64_t)&set_tid,
		.set_tid_size = 1,
	};
	struct gr_tracee *tracee = gr_tracee_add(state, request->pid, request->pid, true);
	long pid;

	if (!tracee)
		return gr_fail(err, ENOMEM, "forking task %d", request->pid);
	pid = clone_into_agent(&args, slot, request->region->address + GR_ENTRY_SERVE);
	if (pid < 0) {
		gr_tracee_remove(state, request->pid);
		return gr_fail(err, (int)-pid, "forking task %d", request->pid);
	}
	if (ptrace(PTRACE_SEIZE, request->pid, NULL, (void *)(long)SPAWN_OPTIONS) < 0) {
		int code = errno;

		kill(request->pid, SIGKILL);
		waitpid(request->pid, NULL, __WALL);
		gr_tracee_remove(state, request->pid);
		return gr_fail(err, code, "seizing the forked task %d", request->pid);
	}
	return 0;
}

int gr_spawn_root(struct gr_tracer *tracer, struct gr_region *region, int pid, uint32_t slot, struct gr_error *err)
{
	struct spawn_request request = { region, pid, slot };

	return gr_tracer_call(tracer, do_spawn_root, &request, err);
}

struct adopt_request {
	int pid;
	const int *tids;
	int nr_tids;
};

static int adopt(struct gr_tracer_state *state, int tid, int pid, struct gr_error *err)
{
	if (!gr_tracee_add(state, tid, pid, true))
		return gr_fail(err, ENOMEM, "seizing the cloned task %d", tid);
	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)(long)SPAWN_OPTIONS) < 0) {
		int code = errno;

		gr_tracee_remove(state, tid);
		return gr_fail(err, code, "seizing the cloned task %d", tid);
	}
	return 0;
}

static int do_adopt(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct adopt_request *request = arg;

	for (int i = 0; i < request->nr_tids; i++) {
		int tid = request->tids[i];
		int ret = adopt(state, tid, request->pid ? request->pid : tid, err);

		if (ret < 0)
			return ret;
	}
	return 0;
}

int gr_adopt(struct gr_tracer *tracer, int pid, const int *tids, int nr_tids, struct gr_error *err)
{
	struct adopt_request request = { pid, tids, nr_tids };

	return gr_tracer_call(tracer, do_adopt, &request, err);
}

struct park_request {
	int pid;
	uint64_t address, bytes;
};

static int do_park(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct park_request *request = arg;
	struct gr_tracee *leader = gr_tracee_find(state, request->pid);
	const uint64_t args[6] = { request->address, request->bytes, 0, 0, 0, 0 };
	struct gr_regs regs;
	int64_t result;
	int ret;

	if (!leader)
		return gr_fail(err, ESRCH, "parking task %d, which is not ours", request->pid);
	for (int i = 0; i < state->tracees.nr; i++) {
		if (state->tracees.items[i]->pid != request->pid)
			continue;
		ret = gr_tracee_interrupt(state, state->tracees.items[i], err);
		if (ret < 0)
			return ret;
	}
	/* The instruction goes, too, but the thread stops at the exit of its call, and gets other registers there. */
	ret = gr_tracee_get_regs(leader, &regs, err);
	if (ret == 0)
		ret = gr_remote_syscall(state, leader, request->address + GR_ENTRY_SYSCALL, __NR_munmap, args, regs.rsp,
					&result, err);
	if (ret == 0 && result < 0)
		ret = gr_fail(err, (int)-result, "unmapping the agent from task %d", request->pid);
	return ret;
}

int gr_park(struct gr_tracer *tracer, int pid, uint64_t address, uint64_t bytes, struct gr_error *err)
{
	struct park_request request = { pid, address, bytes };

	return gr_tracer_call(tracer, do_park, &request, err);
}

/* PTRACE_SETREGSET takes this CPU's full size only: what the image lacks is in its initial state. */
static int write_xstate(const struct gr_tracee *tracee, const struct gr_thread_state *state, struct gr_error *err)
{
	uint8_t xstate[sizeof(state->xstate)];
	struct iovec iov;
	size_t bytes;
	int ret = gr_read_xstate(tracee, xstate, sizeof(xstate), &bytes, err);

	if (ret < 0)
		return ret;
	memset(xstate, 0, bytes);
	memcpy(xstate, state->xstate, state->xstate_bytes < bytes ? state->xstate_bytes : bytes);
	iov = (struct iovec){ xstate, bytes };
	if (ptrace(PTRACE_SETREGSET, tracee->tid, (void *)NT_X86_XSTATE, &iov) < 0)
		return gr_fail(err, errno, "writing the extended state of task %d", tracee->tid);
	return 0;
}

static int do_write(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	const struct gr_thread_state *thread = arg;
	struct gr_tracee *tracee = gr_tracee_find(state, thread->tid);
	struct gr_regs regs = thread->regs;
	int ret;

	if (!tracee || !tracee->stopped)
		return gr_fail(err, EINVAL, "writing registers of task %d, which is not parked", thread->tid);
	/* No system call is pending in a restored thread. */
	regs.orig_rax = -1;
	ret = gr_tracee_set_regs(tracee, &regs, err);
	if (ret == 0)
		ret = write_xstate(tracee, thread, err);
	if (ret == 0)
		ret = gr_tracee_set_mask(tracee, thread->sigmask, err);
	return ret;
}

int gr_thread_write(struct gr_tracer *tracer, const struct gr_thread_state *state, struct gr_error *err)
{
	return gr_tracer_call(tracer, do_write, (void *)state, err);
}

struct resume_request {
	int pid, stop_signal;
};

static int do_resume(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct resume_request *request = arg;

	if (request->stop_signal && kill(request->pid, request->stop_signal) < 0)
		return gr_fail(err, errno, "stopping task %d", request->pid);
	for (int i = state->tracees.nr - 1; i >= 0; i--) {
		struct gr_tracee *tracee = state->tracees.items[i];
		int ret;

		if (tracee->pid != request->pid)
			continue;
		ret = gr_tracee_detach(state, tracee, err);
		if (ret < 0)
			return ret;
	}
	return 0;
}

int gr_resume(struct gr_tracer *tracer, int pid, int stop_signal, struct gr_error *err)
{
	struct resume_request request = { pid, stop_signal };

	return gr_tracer_call(tracer, do_resume, &request, err);
}

struct exit_request {
	int pid;
	int *status;
};

static int do_await_exit(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct exit_request *request = arg;

	for (;;) {
		int got = waitpid(request->pid, request->status, __WALL);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return gr_fail(err, errno, "waiting for the exit of task %d", request->pid);
		if (!WIFSTOPPED(*request->status))
			break;
		/* The signal that it is to die of stops it first. */
		int signal = *request->status >> 16 ? 0 : WSTOPSIG(*request->status);

		if (ptrace(PTRACE_CONT, request->pid, NULL, (void *)(long)signal) < 0)
			return gr_fail(err, errno, "letting task %d exit", request->pid);
	}
	gr_tracee_remove(state, request->pid);
	return 0;
}

int gr_await_exit(struct gr_tracer *tracer, int pid, int *status, struct gr_error *err)
{
	struct exit_request request = { pid, status };

	return gr_tracer_call(tracer, do_await_exit, &request, err);
}
