/*
 * The agent: runs inside a task and executes batches of system calls. It knows nothing of checkpointing.
 *
 * Freestanding, position-independent, without writable globals; only general registers are used, so the task's FPU
 * state is never touched. The layout of the first bytes is fixed by gr_agent_entry.h.
 */
#include <linux/futex.h>
#include <linux/prctl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>

#include "gr_agent.h"
#include "gr_agent_entry.h"

_Static_assert(sizeof(struct gr_call) == 80, "gpurestore/batch.py writes 80 bytes a call");
_Static_assert(sizeof(struct gr_batch) == 16, "gpurestore/batch.py writes a header of 16 bytes");
_Static_assert(sizeof(struct gr_slot) <= GR_SLOT_BATCH_OFFSET, "slot words and batch overlap");

#define STR_(x) #x
#define STR(x) STR_(x)

/*
 * Entries. SERVE: rdi = slot; never returns. ONCE: rdi = slot, rsi = signal frame; runs the slot's batch, tells the
 * tracer by a getpid with a marker, and, when there is no tracer (any more), leaves through the signal frame, which
 * holds the task's registers from before.
 */
__asm__(".pushsection .text.start, \"ax\", @progbits\n"
	".globl gr_agent_start\n"
	"gr_agent_start:\n"
	"	call gr_agent_serve\n"
	"	ud2\n"
	"	.org gr_agent_start + " STR(GR_ENTRY_ONCE) ", 0xcc\n"
	"	mov %rsi, %r12\n"
	"	call gr_agent_run_batch\n"
	"	mov $" STR(GR_DONE_NR) ", %eax\n"
	"	mov $" STR(GR_DONE_MARK) ", %edi\n"
	"	syscall\n"
	"	lea 8(%r12), %rsp\n" /* the frame without its return address, as the kernel expects it */
	"	mov $15, %eax\n"     /* rt_sigreturn */
	"	syscall\n"
	"	ud2\n"
	"	.org gr_agent_start + " STR(GR_ENTRY_SYSCALL) ", 0xcc\n"
	"	syscall\n"
	"	ud2\n"
	".popsection\n");

static inline int64_t syscall6(uint64_t nr, const uint64_t *args)
{
	register uint64_t r10 __asm__("r10") = args[3];
	register uint64_t r8 __asm__("r8") = args[4];
	register uint64_t r9 __asm__("r9") = args[5];
	int64_t result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(nr), "D"(args[0]), "S"(args[1]), "d"(args[2]), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static int64_t use_tiles(void)
{
	/* palette 1; tile 0 has one row of 64 bytes */
	unsigned char config[64] __attribute__((aligned(64))) = { [0] = 1, [16] = 64, [48] = 1 };

	/* Spelt out for assemblers that do not know AMX: ldtilecfg (%rdi); tilezero %tmm0; tilerelease. */
	__asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x07\n\t"
			 ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0\n\t"
			 ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"
			 :
			 : "D"(config)
			 : "memory");
	return 0;
}

/*
 * The newborn shares this thread's memory or has a copy of it, but its slot, where its stack is, is everybody's: until it
 * stands there it must not touch any memory.
 */
static int64_t clone_into_slot(const uint64_t *args)
{
	register uint64_t stack __asm__("r12") = args[2] + GR_SLOT_BYTES - 64;
	register uint64_t slot __asm__("r13") = args[2];
	register uint64_t parent __asm__("r14") = args[3];
	int64_t result;

	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "mov %%r12, %%rsp\n\t"
			 "mov %%r13, %%rdi\n\t"
			 "mov %%r14, %%rsi\n\t"
			 "call gr_agent_born\n\t"
			 "ud2\n\t"
			 "1:"
			 : "=a"(result)
			 : "a"(__NR_clone3), "D"(args[0]), "S"(args[1]), "r"(stack), "r"(slot), "r"(parent)
			 : "rcx", "r11", "memory");
	return result;
}

static int64_t run_call(uint64_t nr, const uint64_t *args)
{
	switch (nr) {
	case GR_OP_USE_TILES:
		return use_tiles();
	case GR_OP_CLONE:
		return clone_into_slot(args);
	default:
		return syscall6(nr, args);
	}
}

static int as_expected(const struct gr_call *call)
{
	switch (call->expect) {
	case GR_EXPECT_OK:
		return call->result >= 0;
	case GR_EXPECT_EXACT:
		return call->result == call->want;
	default:
		return 1;
	}
}

__attribute__((used)) void gr_agent_run_batch(struct gr_slot *slot)
{
	struct gr_batch *batch = (struct gr_batch *)((char *)slot + GR_SLOT_BATCH_OFFSET);
	uint64_t args[6];

	batch->status = 0;
	for (uint32_t i = 0; i < batch->nr_calls; i++) {
		struct gr_call *call = &batch->calls[i];

		for (int a = 0; a < 6; a++) {
			int is_ref = (call->refs >> a) & 1;

			args[a] = is_ref ? (uint64_t)batch->calls[call->args[a]].result : call->args[a];
		}
		*(volatile uint32_t *)&batch->next = i;
		call->result = run_call(call->nr, args);
		if (!as_expected(call)) {
			batch->status = 1;
			return;
		}
	}
	batch->next = batch->nr_calls;
}

static void futex(uint32_t *word, uint64_t op, uint64_t value)
{
	uint64_t args[6] = { (uint64_t)word, op, value, 0, 0, 0 };

	syscall6(__NR_futex, args);
}

__attribute__((used, noreturn)) void gr_agent_serve(struct gr_slot *slot)
{
	for (;;) {
		while (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) != GR_SLOT_POSTED)
			futex(&slot->state, FUTEX_WAIT, GR_SLOT_IDLE);
		gr_agent_run_batch(slot);
		slot->served++;
		__atomic_store_n(&slot->state, GR_SLOT_IDLE, __ATOMIC_RELEASE);
		futex(&slot->state, FUTEX_WAKE, 1);
	}
}

/* The first of a newborn. A parent that died before it could be asked to take its child along has left it to others. */
__attribute__((used, noreturn)) void gr_agent_born(struct gr_slot *slot, uint64_t parent)
{
	const uint64_t ask[6] = { PR_SET_PDEATHSIG, SIGKILL }, none[6] = { 0 };

	if (parent) {
		syscall6(__NR_prctl, ask);
		if ((uint64_t)syscall6(__NR_getppid, none) != parent)
			syscall6(__NR_exit_group, none);
	}
	gr_agent_serve(slot);
}
