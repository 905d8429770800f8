/* Freezing a process, reading its threads, and letting it go or killing it. */
#include <dirent.h>
#include <elf.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "gr_tracer_internal.h"

#define SIGINFO_BYTES 128
/* A thread that starts others while it is being stopped is caught within a few rounds. */
#define MAX_SEIZE_ROUNDS 64

struct seize_request {
	int pid;
	int *tids;
	int max_tids;
};

/* A live thread appears with its leader first; ids are ascending in creation order as procfs lists them. */
static int list_threads(int pid, int *tids, int max, struct gr_error *err)
{
	char path[64];
	int nr = 0;
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return gr_fail(err, ESRCH, "there is no process %d", pid);
	while ((entry = readdir(dir))) {
		int tid = atoi(entry->d_name);

		if (tid <= 0)
			continue;
		if (nr == max) {
			closedir(dir);
			return gr_fail(err, E2BIG, "process %d has more than %d threads", pid, max);
		}
		tids[nr++] = tid;
	}
	closedir(dir);
	return nr;
}

static int seize_thread(struct gr_tracer_state *state, int pid, int tid, struct gr_error *err)
{
	struct gr_tracee *tracee = gr_tracee_add(state, tid, pid, false);

	if (!tracee)
		return gr_fail(err, ENOMEM, "seizing task %d", tid);
	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)PTRACE_O_TRACESYSGOOD) < 0) {
		int code = errno;

		gr_tracee_remove(state, tid);
		return gr_fail(err, code, "seizing task %d", tid);
	}
	return gr_tracee_interrupt(state, tracee, err);
}

static void release_all(struct gr_tracer_state *state, int pid)
{
	struct gr_error ignored;

	for (int i = state->tracees.nr - 1; i >= 0; i--)
		if (state->tracees.items[i]->pid == pid)
			gr_tracee_detach(state, state->tracees.items[i], &ignored);
}

static int do_seize(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct seize_request *request = arg;

	for (int round = 0; round < MAX_SEIZE_ROUNDS; round++) {
		int fresh = 0, nr = list_threads(request->pid, request->tids, request->max_tids, err);

		if (nr < 0)
			return nr;
		for (int i = 0; i < nr; i++) {
			int ret;

			if (gr_tracee_find(state, request->tids[i]))
				continue;
			fresh++;
			ret = seize_thread(state, request->pid, request->tids[i], err);
			/* A thread that ended meanwhile is no obstacle; the next round no longer lists it. */
			if (ret < 0 && (ret != -ESRCH || request->tids[i] == request->pid)) {
				release_all(state, request->pid);
				return ret;
			}
		}
		if (!fresh)
			return nr;
	}
	release_all(state, request->pid);
	return gr_fail(err, EAGAIN, "process %d starts threads faster than they can be stopped", request->pid);
}

int gr_seize(struct gr_tracer *tracer, int pid, int *tids, int max_tids, struct gr_error *err)
{
	struct seize_request request = { pid, tids, max_tids };

	return gr_tracer_call(tracer, do_seize, &request, err);
}

struct read_request {
	int tid;
	struct gr_thread_state *out;
};

int gr_read_xstate(const struct gr_tracee *tracee, uint8_t *out, size_t room, size_t *bytes, struct gr_error *err)
{
	struct iovec iov = { out, room };

	if (ptrace(PTRACE_GETREGSET, tracee->tid, (void *)NT_X86_XSTATE, &iov) < 0)
		return gr_fail(err, errno, "reading the extended state of task %d", tracee->tid);
	*bytes = iov.iov_len;
	return 0;
}

/* struct rseq_cs of include/uapi/linux/rseq.h */
struct critical_section {
	uint32_t version, flags;
	uint64_t start_ip, post_commit_offset, abort_ip;
};

/*
 * A thread stopped inside a restartable sequence would be sent to its abort handler by the kernel before it runs on;
 * whoever takes the registers elsewhere must do the same.
 */
static void abort_critical_section(struct gr_thread_state *state)
{
	struct critical_section section;
	uint64_t pointer;
	struct iovec local = { &pointer, sizeof(pointer) }, remote = { (void *)(state->rseq_address + 8), 8 };

	if (!state->rseq_address || process_vm_readv(state->tid, &local, 1, &remote, 1, 0) != 8 || !pointer)
		return;
	local = (struct iovec){ &section, sizeof(section) };
	remote = (struct iovec){ (void *)pointer, sizeof(section) };
	if (process_vm_readv(state->tid, &local, 1, &remote, 1, 0) != sizeof(section))
		return;
	if (state->regs.rip - section.start_ip < section.post_commit_offset)
		state->regs.rip = section.abort_ip;
}

/* include/uapi/linux/ptrace.h, since 6.4; older kernels do not tell */
#ifndef PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#endif

static int dispatches_calls(int tid)
{
	struct {
		uint64_t mode, selector, offset, len;
	} config = { 0 };

	return ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, (void *)sizeof(config), &config) == 0 &&
	       config.mode != 0;
}

/* NT_386_IOPERM is there only for a thread that has a bitmap of ports. */
static int opens_ports(int tid)
{
	uint8_t bitmap[8192];
	struct iovec iov = { bitmap, sizeof(bitmap) };

	return ptrace(PTRACE_GETREGSET, tid, (void *)NT_386_IOPERM, &iov) == 0 && iov.iov_len != 0;
}

static int do_read(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct read_request *request = arg;
	struct gr_tracee *tracee = gr_tracee_find(state, request->tid);
	struct gr_thread_state *out = request->out;
	struct __ptrace_rseq_configuration rseq;
	size_t bytes;
	int ret;

	if (!tracee || !tracee->stopped || tracee->in_agent)
		return gr_fail(err, EINVAL, "reading task %d, which is not frozen", request->tid);
	memset(out, 0, sizeof(*out));
	out->tid = request->tid;
	out->stop_signal = tracee->stop_signal;
	ret = gr_tracee_get_regs(tracee, &out->regs, err);
	if (ret == 0)
		ret = gr_tracee_get_mask(tracee, &out->sigmask, err);
	if (ret == 0)
		ret = gr_read_xstate(tracee, out->xstate, sizeof(out->xstate), &bytes, err);
	if (ret < 0)
		return ret;
	out->xstate_bytes = bytes;
	out->dispatches_calls = dispatches_calls(tracee->tid);
	out->opens_ports = opens_ports(tracee->tid);
	/* Since 5.13; where it is unknown, so is rseq for a tracer, and libc's own is set up by libc again. */
	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tracee->tid, (void *)sizeof(rseq), &rseq) == sizeof(rseq)) {
		out->rseq_address = rseq.rseq_abi_pointer;
		out->rseq_bytes = rseq.rseq_abi_size;
		out->rseq_signature = rseq.signature;
		out->rseq_flags = rseq.flags;
		abort_critical_section(out);
	}
	return 0;
}

int gr_thread_read(struct gr_tracer *tracer, int tid, struct gr_thread_state *out, struct gr_error *err)
{
	struct read_request request = { tid, out };

	return gr_tracer_call(tracer, do_read, &request, err);
}

struct peek_request {
	int tid, shared, max;
	uint64_t offset;
	uint8_t *out;
};

static int do_peek(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct peek_request *request = arg;
	struct __ptrace_peeksiginfo_args args = {
		.off = request->offset,
		.flags = request->shared ? PTRACE_PEEKSIGINFO_SHARED : 0,
		.nr = request->max,
	};
	long nr;

	(void)state;
	nr = ptrace(PTRACE_PEEKSIGINFO, request->tid, &args, request->out);
	if (nr < 0)
		return gr_fail(err, errno, "reading the pending signals of task %d", request->tid);
	return (int)nr;
}

int gr_peek_signals(struct gr_tracer *tracer, int tid, int shared, uint64_t offset, uint8_t *out, int max,
		    struct gr_error *err)
{
	struct peek_request request = { tid, shared, max, offset, out };

	_Static_assert(sizeof(siginfo_t) == SIGINFO_BYTES, "the kernel's siginfo_t has 128 bytes");
	return gr_tracer_call(tracer, do_peek, &request, err);
}

static int do_let_run(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	int tid = *(int *)arg, ret;
	struct gr_tracee *tracee = gr_tracee_find(state, tid);

	if (!tracee || !tracee->stopped || tracee->in_agent)
		return gr_fail(err, EINVAL, "letting task %d run, which is not frozen", tid);
	ret = gr_tracee_get_mask(tracee, &tracee->home_mask, err);
	/* A signal would stop it where nobody waits for it. */
	if (ret == 0)
		ret = gr_tracee_set_mask(tracee, ~0ULL, err);
	if (ret < 0)
		return ret;
	if (ptrace(PTRACE_CONT, tid, NULL, NULL) < 0)
		return gr_fail(err, errno, "letting task %d run", tid);
	tracee->stopped = false;
	tracee->let_run = true;
	return 0;
}

int gr_thread_let_run(struct gr_tracer *tracer, int tid, struct gr_error *err)
{
	return gr_tracer_call(tracer, do_let_run, &tid, err);
}

/* Stops a thread that was let run; used for all of them before a task is let go, too. */
static int hold(struct gr_tracer_state *state, struct gr_tracee *tracee, struct gr_error *err)
{
	int found = tracee->stop_signal;
	int ret = gr_tracee_interrupt(state, tracee, err);

	if (ret < 0)
		return ret;
	tracee->stop_signal = found;
	tracee->let_run = false;
	return gr_tracee_set_mask(tracee, tracee->home_mask, err);
}

static int do_hold(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct gr_tracee *tracee = gr_tracee_find(state, *(int *)arg);

	if (!tracee || !tracee->let_run)
		return gr_fail(err, EINVAL, "holding task %d, which does not run", *(int *)arg);
	return hold(state, tracee, err);
}

int gr_thread_hold(struct gr_tracer *tracer, int tid, struct gr_error *err)
{
	return gr_tracer_call(tracer, do_hold, &tid, err);
}

struct release_request {
	int pid, stop;
};

static int do_release(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct release_request *request = arg;
	int result = 0;

	/* Queued while it is still frozen, so that no instruction runs before the stop. */
	if (request->stop && kill(request->pid, SIGSTOP) < 0)
		result = gr_fail(err, errno, "stopping task %d", request->pid);
	for (int i = state->tracees.nr - 1; i >= 0; i--) {
		if (state->tracees.items[i]->pid == request->pid) {
			struct gr_tracee *tracee = state->tracees.items[i];
			int ret = tracee->let_run ? hold(state, tracee, err) : 0;

			if (ret == 0)
				ret = gr_tracee_detach(state, tracee, err);

			/* Killed from outside meanwhile: there is nothing left to detach from. */
			if (ret < 0 && ret != -ESRCH)
				result = ret;
		}
	}
	return result;
}

int gr_release(struct gr_tracer *tracer, int pid, int stop, struct gr_error *err)
{
	struct release_request request = { pid, stop };

	return gr_tracer_call(tracer, do_release, &request, err);
}

struct kill_request {
	const int *pids;
	int nr_pids;
};

/* A leader's death is reported only after all its threads are gone: wait for the others first. */
static void reap(struct gr_tracer_state *state, int pid, bool spawned)
{
	for (int i = state->tracees.nr - 1; i >= 0; i--) {
		struct gr_tracee *tracee = state->tracees.items[i];

		if (tracee->pid == pid && tracee->tid != pid) {
			int status, tid = tracee->tid;

			while (waitpid(tid, &status, __WALL) == tid && WIFSTOPPED(status))
				;
			gr_tracee_remove(state, tid);
		}
	}
	for (;;) {
		siginfo_t info;
		/*
		 * A dumped task's death belongs to its parent, even if that is this very process: leave the zombie,
		 * the end of the tracer's thread hands it over. What we spawned is ours to reap.
		 */
		int got = waitid(P_PID, pid, &info, WEXITED | __WALL | (spawned ? 0 : WNOWAIT));

		if (got == 0 || errno != EINTR)
			break;
	}
	gr_tracee_remove(state, pid);
}

static int do_kill(struct gr_tracer_state *state, void *arg, struct gr_error *err)
{
	struct kill_request *request = arg;

	(void)err;
	for (int i = 0; i < request->nr_pids; i++)
		if (gr_tracee_find(state, request->pids[i]))
			kill(request->pids[i], SIGKILL);
	for (int i = 0; i < request->nr_pids; i++) {
		struct gr_tracee *leader = gr_tracee_find(state, request->pids[i]);

		if (leader)
			reap(state, request->pids[i], leader->spawned);
		for (int h = 0; h < state->nr_hosts; h++) {
			if (state->hosts[h].pid == request->pids[i]) {
				close(state->hosts[h].mem_fd);
				state->hosts[h] = state->hosts[--state->nr_hosts];
				break;
			}
		}
	}
	return 0;
}

int gr_kill(struct gr_tracer *tracer, const int *pids, int nr_pids, struct gr_error *err)
{
	struct kill_request request = { pids, nr_pids };

	return gr_tracer_call(tracer, do_kill, &request, err);
}
