/*
 * A child that wrote nearly all of the memory that it has from its parent: dense enough for huge pages, and yet some pages
 * of each such block are still the parent's.
 */
#include "victim.h"

#define PAGE 4096ul
#define NR_PAGES 16384ul /* so many that what is left to share is worth it */
#define HUGE_BYTES (2ul << 20)

static char *memory;

static int is_shared(size_t i)
{
	return i % 40 == 7;
}

static void check(int who)
{
	for (size_t i = 0; i < NR_PAGES; i++)
		CHECK(victim_filled(memory + i * PAGE, PAGE, i + (who && !is_shared(i) ? 10000 : 0)),
		      "task %d: page %zu is wrong", who, i);
}

static int child_main(void *argument)
{
	(void)argument;
	for (size_t i = 0; i < NR_PAGES; i++)
		if (!is_shared(i))
			victim_fill(memory + i * PAGE, PAGE, i + 10000);
	victim_ready();
	victim_wait_quietly();
	check(1);
	return 0;
}

int main(int argc, char **argv)
{
	pid_t child;

	victim_init(argc, argv);
	memory = mmap(NULL, NR_PAGES * PAGE + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	memory = (char *)(((uintptr_t)memory + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1));
	for (size_t i = 0; i < NR_PAGES; i++)
		victim_fill(memory + i * PAGE, PAGE, i);
	child = victim_child(child_main, NULL);
	victim_ready();
	victim_wait();
	check(0);
	victim_expect_exit(child, 0);
	return victim_done();
}
