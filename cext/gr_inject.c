/*
 * The agent in a seized task.
 *
 * At no moment may the tracer's death leave a task lost. Before a thread's registers are changed, a signal frame with
 * its own registers lies where the changed ones lead: for the mapping of the agent on the task's stack, where a signal
 * would put it, behind `syscall; ret` and the signal restorer of the task's own libc; for batches at the thread's place
 * in the agent's memory. Without a tracer the thread runs into rt_sigreturn and is back where it was.
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

#include "gr_agent.h"
#include "gr_agent_blob.h"
#include "gr_agent_entry.h"
#include "gr_tracer_internal.h"

#define CODE_BYTES GR_PAGE_BYTES
#define RED_ZONE_BYTES 128
#define ERESTART_RESTARTBLOCK 516
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define CODE_SEARCHED_BYTES 24
#define MOV_EAX 0xb8

/* Layout in the task: code, then for each slot the slot itself and the frame of the thread that serves it. */
static uint64_t slot_stride(void)
{
	return GR_SLOT_BYTES + GR_SIGFRAME_MAX;
}

static uint64_t slot_address(uint64_t address, uint32_t slot)
{
	return address + CODE_BYTES + slot * slot_stride();
}

static uint64_t frame_address(uint64_t address, uint32_t slot)
{
	return slot_address(address, slot) + GR_SLOT_BYTES + 8;
}

uint64_t gr_agent_bytes(uint32_t nr_slots)
{
	return CODE_BYTES + nr_slots * slot_stride();
}

uint64_t gr_agent_batch_address(uint64_t address, uint32_t slot)
{
	return slot_address(address, slot) + GR_SLOT_BATCH_OFFSET;
}

static struct gr_host *find_host(struct gr_tracer_state *state, int pid)
{
	for (int i = 0; i < state->nr_hosts; i++)
		if (state->hosts[i].pid == pid)
			return &state->hosts[i];
	return NULL;
}

static void remove_host(struct gr_tracer_state *state, struct gr_host *host)
{
	close(host->mem_fd);
	*host = state->hosts[--state->nr_hosts];
}

static int write_memory(const struct gr_host *host, uint64_t address, const void *data, size_t bytes,
			struct gr_error *err)
{
	if (pwrite(host->mem_fd, data, bytes, address) != (ssize_t)bytes)
		return gr_fail(err, errno ? errno : EFAULT, "writing %zu bytes at %#lx of task %d", bytes, address,
			       host->pid);
	return 0;
}

/* Calls that the kernel continues through restart_syscall, and that can begin again from their arguments. */
static int has_restart_block(uint64_t number)
{
	return number == SYS_poll || number == SYS_nanosleep || number == SYS_clock_nanosleep || number == SYS_futex;
}

/*
 * Which call a restart_syscall that was interrupted in turn stands for. The kernel forgot its number, but the code in
 * front of the instruction loads it, or the arguments are those of a private futex wait with a time-out, which runtimes
 * make through syscall(3). Else it stays restart_syscall, which answers EINTR after a signal frame.
 */
static uint64_t restarted_call(const struct gr_host *host, const struct gr_regs *regs)
{
	uint8_t code[CODE_SEARCHED_BYTES];
	uint64_t operation = regs->rsi & ~(uint64_t)FUTEX_CLOCK_REALTIME;
	uint32_t number;

	if (pread(host->mem_fd, code, sizeof(code), regs->rip - 2 - sizeof(code)) == sizeof(code))
		for (int at = sizeof(code) - 5; at >= 0; at--) {
			memcpy(&number, code + at + 1, sizeof(number));
			if (code[at] == MOV_EAX && has_restart_block(number))
				return number;
		}
	if ((operation == FUTEX_WAIT_PRIVATE || operation == FUTEX_WAIT_BITSET_PRIVATE) && regs->rdi % 4 == 0 && regs->r10)
		return SYS_futex;
	return SYS_restart_syscall;
}

/*
 * The registers with which a thread returns to itself through a frame. rt_sigreturn forgets an interrupted system
 * call, so the call is begun again here; one with a restart block begins again with its own arguments.
 */
static struct gr_regs self_return_regs(const struct gr_host *host, const struct gr_regs *home)
{
	struct gr_regs regs = *home;

	if ((int64_t)home->orig_rax < 0)
		return regs;
	switch (-(int64_t)home->rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
	case ERESTART_RESTARTBLOCK:
		regs.rax = home->orig_rax == SYS_restart_syscall ? restarted_call(host, home) : home->orig_rax;
		regs.rip -= 2;
	}
	return regs;
}

static int write_frame(const struct gr_host *host, const struct gr_tracee *tracee, uint64_t at, uint64_t restorer,
		       struct gr_error *err)
{
	struct gr_regs regs = self_return_regs(host, &tracee->home);
	uint8_t xstate[GR_SIGFRAME_MAX], frame[GR_SIGFRAME_MAX + 1024];
	size_t bytes;
	int ret = gr_read_xstate(tracee, xstate, 16384, &bytes, err);

	if (ret < 0)
		return ret;
	bytes = gr_sigframe_build(frame, at, restorer, &regs, tracee->home_mask, xstate, bytes);
	return write_memory(host, at, frame, bytes, err);
}

/* Keeps the thread's own registers and lets no signal in while it is elsewhere. */
static int leave_home(struct gr_tracee *tracee, struct gr_error *err)
{
	int ret = 0;

	if (tracee->in_agent)
		return 0;
	ret = gr_tracee_get_regs(tracee, &tracee->home, err);
	if (ret == 0)
		ret = gr_tracee_get_mask(tracee, &tracee->home_mask, err);
	return ret;
}

/* Back to the thread's own registers and mask, as it was found; it stays stopped. */
static int go_home(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	int ret = gr_tracee_settle(state, tracee, err);

	if (ret == 0)
		ret = gr_tracee_set_mask(tracee, tracee->home_mask, err);
	if (ret == 0)
		ret = gr_tracee_set_regs(tracee, &tracee->home, err);
	if (ret == 0)
		tracee->in_agent = false;
	return ret;
}

int gr_remote_syscall(struct gr_tracer_state *state, struct gr_tracee *tracee, uint64_t gadget, uint64_t nr,
		      const uint64_t *args, uint64_t rsp, int64_t *result, struct gr_error *err)
{
	struct gr_regs regs;
	int ret = gr_tracee_get_regs(tracee, &regs, err);

	if (ret < 0)
		return ret;
	regs.rip = gadget;
	regs.rax = nr;
	regs.orig_rax = -1;
	regs.rdi = args[0];
	regs.rsi = args[1];
	regs.rdx = args[2];
	regs.r10 = args[3];
	regs.r8 = args[4];
	regs.r9 = args[5];
	regs.rsp = rsp;
	ret = gr_tracee_set_regs(tracee, &regs, err);
	if (ret == 0)
		ret = gr_tracee_run_to_syscall_exit(state, tracee, NULL, &regs, err);
	*result = (int64_t)regs.rax;
	return ret;
}

/*
 * One system call in the leader, by the task's own code, with the way back on its stack. Where the code has no signal
 * restorer (a static program without libc's) or the stack no room, there is no way back without a tracer.
 */
static int call_from_home(struct gr_tracer_state *state, struct gr_host *host, struct gr_tracee *leader, uint64_t nr,
			  const uint64_t *args, int64_t *result, struct gr_error *err)
{
	uint64_t at = ((leader->home.rsp - RED_ZONE_BYTES - GR_SIGFRAME_MAX) & ~63ULL) + 8;
	struct gr_error no_room;
	int ret, settled;

	if (!host->sigreturn || write_frame(host, leader, at, host->sigreturn, &no_room) < 0)
		at = leader->home.rsp;
	ret = gr_tracee_set_mask(leader, ~0ULL, err);
	if (ret < 0)
		return ret;
	leader->in_agent = true;
	ret = gr_remote_syscall(state, leader, host->syscall_ret, nr, args, at, result, err);
	if (ret == -ESRCH)
		return ret;
	settled = go_home(state, leader, err);
	return ret < 0 ? ret : settled;
}

struct enter_request {
	int pid;
	uint64_t address;
	uint32_t nr_slots;
};

static int open_host(struct gr_tracer_state *state, const struct enter_request *request, struct gr_host *host,
		     struct gr_error *err)
{
	uint64_t plain;
	int ret;
	void *grown = realloc(state->hosts, (state->nr_hosts + 1) * sizeof(*state->hosts));

	if (!grown)
		return gr_fail(err, ENOMEM, "entering task %d", request->pid);
	state->hosts = grown;
	*host = (struct gr_host){ .pid = request->pid, .address = request->address, .nr_slots = request->nr_slots,
				  .bytes = gr_agent_bytes(request->nr_slots) };
	ret = gr_find_gadgets(request->pid, &host->syscall_ret, &host->sigreturn, &plain, err);
	if (ret < 0)
		return ret;
	if (!host->syscall_ret) {
		host->syscall_ret = plain;
		host->sigreturn = 0;
	}
	host->mem_fd = gr_open_of_task(request->pid, "mem", O_RDWR, err);
	return host->mem_fd < 0 ? host->mem_fd : 0;
}

static int map_at(struct gr_tracer_state *state, struct gr_host *host, struct gr_tracee *leader, uint64_t address,
		  uint64_t bytes, uint64_t prot, struct gr_error *err)
{
	const uint64_t args[6] = { address, bytes, prot,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, (uint64_t)-1, 0 };
	int64_t result;
	int ret = call_from_home(state, host, leader, __NR_mmap, args, &result, err);

	if (ret == 0 && result != (int64_t)address)
		ret = gr_fail(err, result < 0 ? (int)-result : EEXIST, "mapping the agent at %#lx of task %d", address,
			      host->pid);
	return ret;
}

/*
 * Code that the task itself cannot write, and slots that it cannot execute: a task that denies itself memory that is
 * both (PR_SET_MDWE) takes the agent, too. The code is written from outside.
 */
static int map_agent(struct gr_tracer_state *state, struct gr_host *host, struct gr_tracee *leader,
		     struct gr_error *err)
{
	const uint64_t unmap[6] = { host->address, CODE_BYTES, 0, 0, 0, 0 };
	struct gr_error ignored; /* the first failure is the one to report */
	int64_t result;
	int ret = map_at(state, host, leader, host->address, CODE_BYTES, PROT_READ | PROT_EXEC, err);

	if (ret < 0)
		return ret;
	ret = map_at(state, host, leader, host->address + CODE_BYTES, host->bytes - CODE_BYTES, PROT_READ | PROT_WRITE,
		     err);
	if (ret < 0)
		call_from_home(state, host, leader, __NR_munmap, unmap, &result, &ignored);
	return ret;
}

static int do_enter(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct enter_request *request = arg;
	struct gr_tracee *leader = gr_tracee_find(state, request->pid);
	struct gr_host host;
	int ret;

	if (!leader || !leader->stopped || find_host(state, request->pid))
		return gr_fail(err, EINVAL, "entering task %d, which is not frozen", request->pid);
	ret = leave_home(leader, err);
	if (ret == 0)
		ret = open_host(state, request, &host, err);
	if (ret < 0)
		return ret;
	ret = map_agent(state, &host, leader, err);
	if (ret < 0) {
		close(host.mem_fd);
		return ret;
	}
	state->hosts[state->nr_hosts++] = host;
	ret = write_memory(&host, host.address, gr_agent_blob, gr_agent_blob_end - gr_agent_blob, err);
	if (ret < 0) {
		struct gr_error ignored; /* the first failure is the one to report */

		gr_host_leave(state, request->pid, &ignored);
	}
	return ret;
}

int gr_agent_enter(struct gr_tracer *tracer, int pid, uint64_t address, uint32_t nr_slots, struct gr_error *err)
{
	struct enter_request request = { pid, address, nr_slots };

	_Static_assert(CODE_BYTES >= 1024, "the agent's code fits into its page");
	return gr_tracer_call(tracer, do_enter, &request, err);
}

static bool is_done_call(const struct gr_regs *regs)
{
	return regs->orig_rax == GR_DONE_NR && regs->rdi == GR_DONE_MARK;
}

struct run_request {
	int tid;
	uint32_t slot;
	uint8_t *batch;
	uint64_t batch_bytes;
};

static int enter_thread(struct gr_host *host, struct gr_tracee *tracee, uint32_t slot, struct gr_error *err)
{
	int ret;

	if (tracee->in_agent)
		return 0;
	ret = leave_home(tracee, err);
	if (ret == 0)
		ret = write_frame(host, tracee, frame_address(host->address, slot), 0, err);
	return ret;
}

static int do_run(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct run_request *request = arg;
	struct gr_tracee *tracee = gr_tracee_find(state, request->tid);
	struct gr_host *host = tracee ? find_host(state, tracee->pid) : NULL;
	struct gr_regs regs;
	uint64_t slot, batch;
	int ret;

	if (!host || request->slot >= host->nr_slots || request->batch_bytes > GR_SLOT_BATCH_BYTES)
		return gr_fail(err, EINVAL, "running a batch in task %d", request->tid);
	slot = slot_address(host->address, request->slot);
	batch = gr_agent_batch_address(host->address, request->slot);
	ret = write_memory(host, batch, request->batch, request->batch_bytes, err);
	if (ret == 0)
		ret = enter_thread(host, tracee, request->slot, err);
	if (ret < 0)
		return ret;
	regs = tracee->home;
	regs.rip = host->address + GR_ENTRY_ONCE;
	regs.rdi = slot;
	regs.rsi = frame_address(host->address, request->slot);
	regs.rsp = slot + GR_SLOT_BYTES - 64;
	regs.orig_rax = -1;
	ret = gr_tracee_set_regs(tracee, &regs, err);
	if (ret < 0)
		return ret;
	tracee->in_agent = true;
	ret = gr_tracee_set_mask(tracee, ~0ULL, err);
	if (ret == 0)
		ret = gr_tracee_run_to_syscall_exit(state, tracee, is_done_call, &regs, err);
	if (ret < 0)
		return ret;
	if (pread(host->mem_fd, request->batch, request->batch_bytes, batch) != (ssize_t)request->batch_bytes)
		return gr_fail(err, EFAULT, "reading results from task %d", request->tid);
	return 0;
}

int gr_agent_run(struct gr_tracer *tracer, int tid, uint32_t slot, uint8_t *batch, uint64_t batch_bytes,
		 struct gr_error *err)
{
	struct run_request request = { tid, slot, batch, batch_bytes };

	return gr_tracer_call(tracer, do_run, &request, err);
}

int gr_host_leave(struct gr_tracer_state *state, int pid, struct gr_error *err)
{
	struct gr_host *host = find_host(state, pid);
	struct gr_tracee *leader = gr_tracee_find(state, pid);
	int64_t result = 0;
	int ret = 0;

	if (!host)
		return 0;
	for (int i = 0; i < state->tracees.nr && ret == 0; i++) {
		struct gr_tracee *tracee = state->tracees.items[i];

		if (tracee->pid == pid && tracee->in_agent)
			ret = go_home(state, tracee, err);
	}
	if (ret == 0 && leader) {
		const uint64_t args[6] = { host->address, host->bytes, 0, 0, 0, 0 };

		ret = leave_home(leader, err);
		if (ret == 0)
			ret = call_from_home(state, host, leader, __NR_munmap, args, &result, err);
		if (ret == 0 && result < 0)
			ret = gr_fail(err, (int)-result, "unmapping the agent from task %d", pid);
	}
	remove_host(state, host);
	return ret;
}

static int do_leave(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	return gr_host_leave(state, *(int *)arg, err);
}

int gr_agent_leave(struct gr_tracer *tracer, int pid, struct gr_error *err)
{
	return gr_tracer_call(tracer, do_leave, &pid, err);
}
