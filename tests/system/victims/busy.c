/* Two areas of memory, of which one is read all the time and the other never. Their addresses are in `addresses`. */
#include "victim.h"
#include <pthread.h>

#define SIZE (1ul << 20)

static unsigned char *areas[2];

static void *read_busily(void *unused)
{
	unsigned long sum = 0;

	(void)unused;
	for (;;) {
		for (size_t i = 0; i < SIZE; i += 4096)
			sum += *(volatile unsigned char *)(areas[0] + i);
		victim_nap(1);
	}
	return (void *)sum;
}

int main(int argc, char **argv)
{
	char *memory;
	pthread_t reader;

	victim_init(argc, argv);
	/* Apart, so that they stay two mappings. */
	memory = mmap(NULL, 4 * SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	for (int i = 0; i < 2; i++) {
		areas[i] = (unsigned char *)memory + 2 * (size_t)i * SIZE;
		MUST(!mprotect(areas[i], SIZE, PROT_READ | PROT_WRITE));
		victim_fill(areas[i], SIZE, (uint64_t)i + 1);
	}
	victim_put("addresses", areas, sizeof(areas));
	MUST(!pthread_create(&reader, NULL, read_busily, NULL));
	victim_ready();
	victim_wait();
	for (int i = 0; i < 2; i++)
		CHECK(victim_filled(areas[i], SIZE, (uint64_t)i + 1), "area %d changed", i);
	return victim_done();
}
