/*
 * Notes when it goes on after a restore, and when it has read one word of every page: argument 2 MiB, argument 3 random
 * (pages in an order without a pattern) or forward. `go` is made before the restore, so that it is seen at once; times
 * go to `resumed` and `passed`, nanoseconds of the real-time clock: the monotonic one is shifted by CRIU. Everything is
 * verified afterwards.
 */
#include "victim.h"

#define PAGE 4096ul

static void note(const char *name)
{
	struct timespec now;
	char text[64];

	clock_gettime(CLOCK_REALTIME, &now);
	victim_put(name, text, snprintf(text, sizeof(text), "%lld", now.tv_sec * 1000000000ll + now.tv_nsec));
}

int main(int argc, char **argv)
{
	size_t size = (argc > 2 ? strtoul(argv[2], NULL, 10) : 1) << 20, nr = size / PAGE, place = 0;
	int is_random = argc > 3 && !strcmp(argv[3], "random");
	volatile uint64_t sum = 0;
	char *memory;

	victim_init(argc, argv);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED && size);
	victim_fill(memory, size, 1);
	victim_ready();
	victim_wait_quietly();
	note("resumed");
	for (size_t i = 0; i < nr; i++) {
		/* A step that has no divisor in common with any number of pages that is used here. */
		place = is_random ? (place + 1000003) % nr : i;
		sum += *(uint64_t *)(memory + place * PAGE);
	}
	note("passed");
	CHECK(victim_filled(memory, size, 1), "memory changed");
	return victim_done();
}
