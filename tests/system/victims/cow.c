/*
 * Pages that fork left shared between parent, child and grandchild, some written by one of them since: each must see its
 * own. After the restore a store of one must not be seen by another.
 */
#include "victim.h"

enum { NR_PAGES = 256 };
#define PAGE 4096ul

static char *memory;

/* Who last wrote page `i` before the dump, as task `depth` (0 the root) sees it. */
static int writer_of(size_t i, int depth)
{
	for (int who = depth; who > 0; who--)
		if (i % (who + 2) == 0)
			return who;
	return 0;
}

static void check_all(int depth, int written)
{
	for (size_t i = 0; i < NR_PAGES; i++) {
		uint64_t seed = written && i % 5 == (size_t)depth ? 9000ul + depth : writer_of(i, depth) * 1000ul + i;

		CHECK(victim_filled(memory + i * PAGE, PAGE, seed), "task %d: page %zu changed%s", depth, i,
		      written ? " by another task" : "");
	}
}

static int child_main(void *argument)
{
	int depth = (int)(intptr_t)argument;
	pid_t child = 0;

	if (depth)
		for (size_t i = 0; i < NR_PAGES; i += depth + 2)
			victim_fill(memory + i * PAGE, PAGE, depth * 1000 + i);
	if (depth < 2)
		child = victim_child(child_main, (void *)(intptr_t)(depth + 1));
	victim_ready();
	if (depth)
		victim_wait_quietly();
	else
		victim_wait();
	check_all(depth, 0);
	for (size_t i = depth; i < NR_PAGES; i += 5)
		victim_fill(memory + i * PAGE, PAGE, 9000 + depth);
	victim_nap(20); /* time for the others' stores, which must not be seen */
	check_all(depth, 1);
	if (child)
		victim_expect_exit(child, 0);
	return 0;
}

int main(int argc, char **argv)
{
	victim_init(argc, argv);
	memory = mmap(NULL, NR_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	for (size_t i = 0; i < NR_PAGES; i++)
		victim_fill(memory + i * PAGE, PAGE, i);
	child_main(0);
	return victim_done();
}
