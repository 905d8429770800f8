/* Several tasks that hold memory: argument 2 tasks, the root among them, argument 3 MiB in each. */
#include "victim.h"

static size_t size;

static char *hold(uint64_t seed)
{
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	MUST(memory != MAP_FAILED);
	victim_fill(memory, size, seed);
	return memory;
}

static int child_main(void *number)
{
	uint64_t seed = (uint64_t)(intptr_t)number + 1;
	char *memory = hold(seed);

	victim_ready();
	victim_wait_quietly();
	CHECK(victim_filled(memory, size, seed), "memory of child %d changed", (int)seed - 1);
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[64];
	char *memory;
	int nr;

	victim_init(argc, argv);
	MUST(argc > 3);
	nr = atoi(argv[2]) - 1;
	size = strtoul(argv[3], NULL, 10) << 20;
	MUST(nr >= 0 && nr <= 64 && size);
	for (intptr_t i = 0; i < nr; i++)
		children[i] = victim_child(child_main, (void *)(i + 1));
	memory = hold(1);
	victim_ready();
	victim_wait();
	CHECK(victim_filled(memory, size, 1), "memory of the root changed");
	for (int i = 0; i < nr; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
