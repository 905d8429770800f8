/*
 * Threads that hold known values in every register they have and spin in user space across the dump: general registers,
 * flags, x87, MXCSR, XMM/YMM/ZMM, mask and tile registers as far as this CPU has them, and GS base. Nothing else may touch
 * them in between, so loading, spinning and storing is one block of assembly.
 */
#include "victim.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <pthread.h>
#include <stddef.h>

enum { NR_THREADS = 5, ARCH_REQUEST_XSTATE = 0x1023, XSTATE_TILE_DATA = 18 };

struct registers {
	uint64_t general[13];          /* rax rbx rcx rdx rsi rdi r8 .. r14 in the order of the asm */
	uint64_t flags;
	uint8_t x87[512] __attribute__((aligned(64))); /* fxsave image */
	uint8_t vector[32][64] __attribute__((aligned(64)));
	uint64_t mask[8];
	uint8_t tiles[3][1024] __attribute__((aligned(64)));
};

volatile uint32_t released; /* named in assembly */
uint32_t spinning;
static int has_avx, has_avx512, has_tiles;
static __thread uint64_t thread_local_word;

/* r15 points to the block `in`; r14 is not loaded with a pattern, it points to `out` (checked by storing there). */
#define SPIN                                     \
	"lock incl %[spinning]\n\t"              \
	"1: pause\n\t"                           \
	"cmpl $0, %[released]\n\t"               \
	"je 1b\n\t"

static void spin_sse(struct registers *in, struct registers *out)
{
	__asm__ volatile(
		"fxrstor64 %c[x87](%[in])\n\t"
		SPIN
		"fxsave64 %c[x87](%[out])\n\t"
		: [spinning] "+m"(spinning)
		: [in] "r"(in), [out] "r"(out), [released] "m"(released),
		  [x87] "i"(offsetof(struct registers, x87))
		: "memory", "cc");
}

#define EACH16(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) do(14) do(15)
#define EACH32(do) EACH16(do) do(16) do(17) do(18) do(19) do(20) do(21) do(22) do(23) do(24) do(25) do(26) do(27) \
	do(28) do(29) do(30) do(31)
#define EACH8(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7)
#define LOAD_YMM(n) "vmovdqa %c[vector]+64*" #n "(%[in]), %%ymm" #n "\n\t"
#define STORE_YMM(n) "vmovdqa %%ymm" #n ", %c[vector]+64*" #n "(%[out])\n\t"
#define LOAD_ZMM(n) "vmovdqa64 %c[vector]+64*" #n "(%[in]), %%zmm" #n "\n\t"
#define STORE_ZMM(n) "vmovdqa64 %%zmm" #n ", %c[vector]+64*" #n "(%[out])\n\t"
#define LOAD_MASK(n) "kmovq %c[mask]+8*" #n "(%[in]), %%k" #n "\n\t"
#define STORE_MASK(n) "kmovq %%k" #n ", %c[mask]+8*" #n "(%[out])\n\t"

static void spin_avx(struct registers *in, struct registers *out)
{
	__asm__ volatile(
		"fxrstor64 %c[x87](%[in])\n\t"
		EACH16(LOAD_YMM)
		SPIN
		EACH16(STORE_YMM)
		"fxsave64 %c[x87](%[out])\n\t"
		: [spinning] "+m"(spinning)
		: [in] "r"(in), [out] "r"(out), [released] "m"(released),
		  [x87] "i"(offsetof(struct registers, x87)), [vector] "i"(offsetof(struct registers, vector))
		: "memory", "cc");
}

static void spin_avx512(struct registers *in, struct registers *out)
{
	__asm__ volatile(
		"fxrstor64 %c[x87](%[in])\n\t"
		EACH32(LOAD_ZMM)
		EACH8(LOAD_MASK)
		SPIN
		EACH32(STORE_ZMM)
		EACH8(STORE_MASK)
		"fxsave64 %c[x87](%[out])\n\t"
		: [spinning] "+m"(spinning)
		: [in] "r"(in), [out] "r"(out), [released] "m"(released),
		  [x87] "i"(offsetof(struct registers, x87)), [vector] "i"(offsetof(struct registers, vector)),
		  [mask] "i"(offsetof(struct registers, mask))
		: "memory", "cc");
}

/* Three tiles of 16 rows of 64 bytes; the kernel gives a process tile registers only when it asks for them. */
static void spin_tiles(struct registers *in, struct registers *out)
{
	static const struct {
		uint8_t palette, start_row, reserved[14];
		uint16_t column_bytes[16];
		uint8_t rows[16];
	} shape = { 1, 0, { 0 }, { 64, 64, 64 }, { 16, 16, 16 } };

	__asm__ volatile(
		"ldtilecfg %[shape]\n\t"
		"tileloadd %c[tiles](%[in],%[stride],1), %%tmm0\n\t"
		"tileloadd %c[tiles]+1024(%[in],%[stride],1), %%tmm1\n\t"
		"tileloadd %c[tiles]+2048(%[in],%[stride],1), %%tmm2\n\t"
		SPIN
		"tilestored %%tmm0, %c[tiles](%[out],%[stride],1)\n\t"
		"tilestored %%tmm1, %c[tiles]+1024(%[out],%[stride],1)\n\t"
		"tilestored %%tmm2, %c[tiles]+2048(%[out],%[stride],1)\n\t"
		"tilerelease\n\t"
		: [spinning] "+m"(spinning)
		: [in] "r"(in), [out] "r"(out), [released] "m"(released), [shape] "m"(shape), [stride] "r"(64l),
		  [tiles] "i"(offsetof(struct registers, tiles))
		: "memory", "cc");
}

/* General registers and flags: rsp and rbp are what the rest of the program runs on, r15 holds the two pointers. */
static void spin_general(struct registers *in, struct registers *out)
{
	struct registers *both[2] = { in, out };
	register void *pointers __asm__("r15") = both;

	__asm__ volatile(
		"movq (%%r15), %%r14\n\t"
		"pushq 104(%%r14)\n\t"
		"popfq\n\t"
		"movq 0(%%r14), %%rax\n\t" "movq 8(%%r14), %%rbx\n\t" "movq 16(%%r14), %%rcx\n\t"
		"movq 24(%%r14), %%rdx\n\t" "movq 32(%%r14), %%rsi\n\t" "movq 40(%%r14), %%rdi\n\t"
		"movq 48(%%r14), %%r8\n\t" "movq 56(%%r14), %%r9\n\t" "movq 64(%%r14), %%r10\n\t"
		"movq 72(%%r14), %%r11\n\t" "movq 80(%%r14), %%r12\n\t" "movq 88(%%r14), %%r13\n\t"
		"lock incl spinning(%%rip)\n\t"
		"1: pause\n\t"
		"cmpl $0, released(%%rip)\n\t"
		"je 1b\n\t"
		"movq 8(%%r15), %%r14\n\t"
		"movq %%rax, 0(%%r14)\n\t" "movq %%rbx, 8(%%r14)\n\t" "movq %%rcx, 16(%%r14)\n\t"
		"movq %%rdx, 24(%%r14)\n\t" "movq %%rsi, 32(%%r14)\n\t" "movq %%rdi, 40(%%r14)\n\t"
		"movq %%r8, 48(%%r14)\n\t" "movq %%r9, 56(%%r14)\n\t" "movq %%r10, 64(%%r14)\n\t"
		"movq %%r11, 72(%%r14)\n\t" "movq %%r12, 80(%%r14)\n\t" "movq %%r13, 88(%%r14)\n\t"
		"pushfq\n\t"
		"popq 104(%%r14)\n\t"
		"cld\n\t"
		:
		: "r"(pointers)
		: "memory", "cc", "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14");
}

/* An x87 stack with values on it, an unusual control word, an unusual MXCSR, patterned XMM registers. */
static void pattern_x87(uint8_t *image, unsigned seed)
{
	uint16_t control = 0x0f7f; /* round towards zero, extended precision, all masked */
	uint32_t mxcsr = 0x9fc0;   /* flush to zero, round towards zero is 0x6000; denormals are zero */

	memset(image, 0, 512);
	memcpy(image, &control, 2);
	image[3] = 0x28; /* status word high byte: top of stack 5 */
	image[4] = 0xe0; /* abridged tag: the three registers on the stack are in use */
	memcpy(image + 24, &mxcsr, 4);
	for (int i = 0; i < 3; i++) {
		uint64_t mantissa = 0x8000000000000000ull + seed * 1000 + i;
		uint16_t exponent = 0x3fff + i;

		memcpy(image + 32 + 16 * i, &mantissa, 8);
		memcpy(image + 40 + 16 * i, &exponent, 2);
	}
	for (int i = 0; i < 16; i++)
		victim_fill(image + 160 + 16 * i, 16, seed * 100 + i);
}

static void check_thread(unsigned number, struct registers *in, struct registers *out, int vectors)
{
	char what[64];

	CHECK(!memcmp(in->x87, out->x87, 5), "thread %u: x87 control, status or tag word changed", number);
	CHECK(!memcmp(in->x87 + 24, out->x87 + 24, 4), "thread %u: MXCSR changed", number);
	for (int i = 0; i < 8; i++)
		CHECK(!memcmp(in->x87 + 32 + 16 * i, out->x87 + 32 + 16 * i, 10), "thread %u: st%d changed", number, i);
	if (!vectors) {
		CHECK(!memcmp(in->x87 + 160, out->x87 + 160, 256), "thread %u: XMM registers changed", number);
		return;
	}
	for (int i = 0; i < (vectors == 512 ? 32 : 16); i++) {
		snprintf(what, sizeof(what), "thread %u: vector register %d (%d bits)", number, i, vectors);
		CHECK(!memcmp(in->vector[i], out->vector[i], vectors / 8), "%s changed", what);
	}
	for (int i = 0; vectors == 512 && i < 8; i++)
		CHECK(in->mask[i] == out->mask[i], "thread %u: k%d changed", number, i);
}

static void *thread_main(void *argument)
{
	unsigned number = (unsigned)(uintptr_t)argument;
	static struct registers in[NR_THREADS], out[NR_THREADS];
	uint64_t gs_wanted = 0x7000 + number * 0x1000, gs = 0;
	int vectors = 0;

	thread_local_word = 0xabcd0000 + number;
	MUST(!syscall(SYS_arch_prctl, ARCH_SET_GS, gs_wanted));
	pattern_x87(in[number].x87, number);
	for (int i = 0; i < 32; i++)
		victim_fill(in[number].vector[i], 64, number * 1000 + i);
	victim_fill(in[number].mask, sizeof(in[number].mask), number);
	victim_fill(in[number].tiles, sizeof(in[number].tiles), 500 + number);
	victim_fill(in[number].general, sizeof(in[number].general), 77 + number);
	in[number].flags = 0x202 | 0xcd1; /* every arithmetic flag and the direction flag */
	if (number == 0) {
		spin_general(&in[number], &out[number]);
		for (int i = 0; i < 12; i++)
			CHECK(in[number].general[i] == out[number].general[i], "general register %d changed", i);
		/* The comparison of the loop decides the arithmetic flags; the direction flag is ours. */
		CHECK(out[number].flags & 0x400, "direction flag lost: %#lx", (long)out[number].flags);
	} else if (number == 4 && has_tiles) {
		spin_tiles(&in[number], &out[number]);
		CHECK(!memcmp(in[number].tiles, out[number].tiles, sizeof(in[number].tiles)), "tile registers changed");
	} else {
		if (number == 1 || !has_avx) {
			spin_sse(&in[number], &out[number]);
		} else if (number == 2 || !has_avx512) {
			vectors = 256;
			spin_avx(&in[number], &out[number]);
		} else {
			vectors = 512;
			spin_avx512(&in[number], &out[number]);
		}
		check_thread(number, &in[number], &out[number], vectors);
	}
	__asm__ volatile("fninit");
	CHECK_EQUAL(thread_local_word, 0xabcd0000 + number, "thread-local word (FS base)");
	MUST(!syscall(SYS_arch_prctl, ARCH_GET_GS, &gs));
	CHECK_EQUAL(gs, gs_wanted, "GS base");
	return argument;
}

int main(int argc, char **argv)
{
	pthread_t threads[NR_THREADS];
	unsigned a, b, c, d;

	victim_init(argc, argv);
	has_avx = __builtin_cpu_supports("avx2");
	has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
	/* CRIU does not carry tile registers: then argument 2 says so. */
	has_tiles = argc < 3 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) &&
		    !syscall(SYS_arch_prctl, ARCH_REQUEST_XSTATE, XSTATE_TILE_DATA);
	for (uintptr_t i = 0; i < NR_THREADS; i++)
		MUST(!pthread_create(&threads[i], NULL, thread_main, (void *)i));
	while (__atomic_load_n(&spinning, __ATOMIC_SEQ_CST) < NR_THREADS)
		victim_nap(1);
	victim_ready();
	victim_wait();
	released = 1;
	for (uintptr_t i = 0; i < NR_THREADS; i++) {
		void *result = NULL;

		CHECK(!pthread_join(threads[i], &result), "thread %lu cannot be joined", (long)i);
		CHECK_EQUAL((uintptr_t)result, i, "result of a joined thread");
	}
	return victim_done();
}
