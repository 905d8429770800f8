/*
 * Threads that hold data in AMX tiles and spin in user space across the dump: state that the kernel takes back only from
 * a thread that has used tiles before. One thread asks for nothing of the kind and must get by without.
 */
#include "victim.h"
#include <pthread.h>

enum { NR_THREADS = 3, TILE_BYTES = 1024, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILEDATA = 18 };

static struct {
	uint8_t palette, start_row, reserved[14];
	uint16_t row_bytes[16];
	uint8_t rows[16];
} __attribute__((packed, aligned(64))) config = { .palette = 1 };

static volatile int released;
static int spinning;

static void *thread_main(void *argument)
{
	uintptr_t number = (uintptr_t)argument;
	uint8_t in[TILE_BYTES], out[TILE_BYTES] = { 0 };

	victim_fill(in, sizeof(in), 500 + number);
	if (number)
		__asm__ volatile("ldtilecfg %0\n\t"
				 "tileloadd (%1,%2,1), %%tmm5"
				 :
				 : "m"(config), "r"(in), "r"(64L)
				 : "memory");
	__atomic_add_fetch(&spinning, 1, __ATOMIC_SEQ_CST);
	while (!released) /* no system call and no library in here: tiles stay in the registers */
		__asm__ volatile("pause");
	if (number) {
		__asm__ volatile("tilestored %%tmm5, (%0,%1,1)\n\t"
				 "tilerelease"
				 :
				 : "r"(out), "r"(64L)
				 : "memory");
		CHECK(!memcmp(in, out, sizeof(in)), "tile of thread %lu changed", (long)number);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[NR_THREADS];

	victim_init(argc, argv);
	if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA))
		_exit(77); /* no AMX here: the harness skips the test */
	for (int i = 0; i < 8; i++) {
		config.row_bytes[i] = 64;
		config.rows[i] = TILE_BYTES / 64;
	}
	for (uintptr_t i = 0; i < NR_THREADS; i++)
		MUST(!pthread_create(&threads[i], NULL, thread_main, (void *)i));
	while (__atomic_load_n(&spinning, __ATOMIC_SEQ_CST) < NR_THREADS)
		victim_nap(1);
	victim_ready();
	victim_wait();
	released = 1;
	for (int i = 0; i < NR_THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL), "thread %d cannot be joined", i);
	return victim_done();
}
