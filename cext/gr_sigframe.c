/*
 * The frame that the kernel would push for a signal handler (struct rt_sigframe, arch/x86/include/asm/sigframe.h):
 * rt_sigreturn(2) takes a thread's whole state from it, which lets a task return to itself without a tracer.
 */
#include <cpuid.h>
#include <string.h>

#include "gr_tracer_internal.h"

#define UC_FP_XSTATE 0x1
#define UC_SIGCONTEXT_SS 0x2
#define UC_STRICT_RESTORE_SS 0x4
#define FP_XSTATE_MAGIC1 0x46505853U
#define FP_XSTATE_MAGIC2 0x46505845U
#define FXSAVE_BYTES 512
#define XSTATE_HEADER_BYTES 64
#define SW_RESERVED_OFFSET 464
/* AMX tiles are part of a thread's frame only once it has asked for them (arch/x86/kernel/fpu/xstate.c). */
#define XFEATURE_XTILEDATA 18

/* struct sigcontext_64 */
struct context {
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
};

/* struct rt_sigframe up to its siginfo, which rt_sigreturn does not read */
struct frame {
	uint64_t restorer;
	uint64_t uc_flags, uc_link;
	uint64_t ss_sp;
	uint32_t ss_flags, ss_pad;
	uint64_t ss_size;
	struct context mcontext;
	uint64_t sigmask;
};

/* struct _fpx_sw_bytes */
struct sw_bytes {
	uint32_t magic1, extended_size;
	uint64_t xfeatures;
	uint32_t xstate_size, padding[7];
};

/* Bytes of the standard format that hold every feature of `features`; what lies behind is left out. */
static uint32_t standard_bytes(uint64_t features)
{
	uint32_t bytes = FXSAVE_BYTES + XSTATE_HEADER_BYTES;

	for (unsigned int i = 2; i < 63; i++) {
		uint32_t size, offset, c, d;

		if (!(features >> i & 1))
			continue;
		if (__get_cpuid_count(0xd, i, &size, &offset, &c, &d) && offset + size > bytes)
			bytes = offset + size;
	}
	return bytes;
}

static uint64_t enabled_features(void)
{
	uint32_t low, high;

	__asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return (uint64_t)high << 32 | low;
}

static size_t build_fpstate(uint8_t *out, const uint8_t *xstate, size_t xstate_bytes)
{
	uint64_t used, features = enabled_features();
	struct sw_bytes sw = { .magic1 = FP_XSTATE_MAGIC1 };
	uint32_t magic2 = FP_XSTATE_MAGIC2;

	memcpy(&used, xstate + FXSAVE_BYTES, sizeof(used));
	if (!(used >> XFEATURE_XTILEDATA & 1))
		features &= ~(1ULL << XFEATURE_XTILEDATA);
	sw.xstate_size = standard_bytes(features);
	if (sw.xstate_size > xstate_bytes)
		sw.xstate_size = xstate_bytes;
	sw.xfeatures = features;
	sw.extended_size = sw.xstate_size + sizeof(magic2);
	memcpy(out, xstate, sw.xstate_size);
	memcpy(out + SW_RESERVED_OFFSET, &sw, sizeof(sw));
	memcpy(out + sw.xstate_size, &magic2, sizeof(magic2));
	return sw.extended_size;
}

static void fill_context(struct context *c, const struct gr_regs *r)
{
	*c = (struct context){
		.r8 = r->r8, .r9 = r->r9, .r10 = r->r10, .r11 = r->r11, .r12 = r->r12, .r13 = r->r13, .r14 = r->r14,
		.r15 = r->r15, .di = r->rdi, .si = r->rsi, .bp = r->rbp, .bx = r->rbx, .dx = r->rdx, .ax = r->rax,
		.cx = r->rcx, .sp = r->rsp, .ip = r->rip, .flags = r->eflags, .cs = r->cs, .gs = r->gs, .fs = r->fs,
		.ss = r->ss,
	};
}

size_t gr_sigframe_build(uint8_t *out, uint64_t at, uint64_t restorer, const struct gr_regs *regs, uint64_t mask,
			 const uint8_t *xstate, size_t xstate_bytes)
{
	struct frame frame = {
		.restorer = restorer,
		.uc_flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		/* Flags that sigaltstack refuses: the kernel then leaves the alternate stack as it is. */
		.ss_flags = 0x7fff,
		.sigmask = mask,
	};
	/* XRSTOR wants 64-byte alignment. */
	uint64_t fpstate = (at + sizeof(frame) + 63) & ~63ULL;
	size_t offset = fpstate - at;

	_Static_assert(sizeof(struct context) == 256, "struct sigcontext_64 has 256 bytes");
	fill_context(&frame.mcontext, regs);
	frame.mcontext.fpstate = fpstate;
	memset(out, 0, offset);
	memcpy(out, &frame, sizeof(frame));
	return offset + build_fpstate(out + offset, xstate, xstate_bytes);
}
