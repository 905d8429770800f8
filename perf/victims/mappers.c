/*
 * Shared anonymous memory that several tasks map: argument 2 tasks, the root among them, argument 3 MiB. Every task
 * verifies it; then each child changes one page of its own in it, and the root sees all of that: it is still one object.
 */
#include "victim.h"

#define PAGE 4096ul

static char *memory;
static size_t size;

static int child_main(void *number)
{
	victim_ready();
	victim_wait_quietly();
	CHECK(victim_filled(memory + PAGE * 64, size - PAGE * 64, 1), "shared memory is not what it was");
	memory[PAGE * (intptr_t)number] = 'c';
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[64];
	int nr;

	victim_init(argc, argv);
	MUST(argc > 3);
	nr = atoi(argv[2]) - 1;
	size = strtoul(argv[3], NULL, 10) << 20;
	MUST(nr >= 0 && nr < 64 && size > 64 * PAGE);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	victim_fill(memory + PAGE * 64, size - PAGE * 64, 1);
	for (intptr_t i = 0; i < nr; i++)
		children[i] = victim_child(child_main, (void *)i);
	victim_ready();
	victim_wait();
	CHECK(victim_filled(memory + PAGE * 64, size - PAGE * 64, 1), "shared memory is not what it was");
	for (int i = 0; i < nr; i++) {
		victim_expect_exit(children[i], 0);
		CHECK(memory[PAGE * i] == 'c', "what child %d wrote is not seen", i);
	}
	return victim_done();
}
