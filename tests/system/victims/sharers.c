/*
 * Memory that fork left shared, one half in huge pages where the machine has them. Every worker wrote one page in 16 of
 * the other half. Arguments: MiB of memory, workers, and "apart" if each of these shall be a tree of its own: the leader
 * of a session. The file "workers" has their pids then.
 */
#include "victim.h"

#define PAGE 4096ul
#define BLOCK (2ul << 20)
#define STRIDE 16ul

static char *memory;
static size_t size;
static int apart;

static int is_own(size_t page, int worker)
{
	return page * PAGE >= size / 2 && page % STRIDE == (size_t)worker % STRIDE;
}

static uint64_t seed_of(size_t page, int worker)
{
	return is_own(page, worker) ? (uint64_t)(worker + 1) << 32 | page : page + 1;
}

static void check(int worker)
{
	for (size_t page = 0; page < size / PAGE; page++)
		CHECK(victim_filled(memory + page * PAGE, PAGE, seed_of(page, worker)), "task %d: page %zu changed", worker,
		      page);
}

static int worker_main(void *number)
{
	int worker = (int)(intptr_t)number;

	if (apart)
		MUST(setsid() == getpid());
	for (size_t page = 0; page < size / PAGE; page++)
		if (is_own(page, worker))
			victim_fill(memory + page * PAGE, PAGE, seed_of(page, worker));
	victim_ready();
	victim_wait_quietly();
	check(worker);
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[16];
	char pids[256] = "";
	int nr;

	victim_init(argc, argv);
	MUST(argc > 3);
	size = strtoul(argv[2], NULL, 10) << 20;
	nr = atoi(argv[3]);
	apart = argc > 4 && !strcmp(argv[4], "apart");
	MUST(nr > 0 && nr <= 16 && size && size % (2 * BLOCK) == 0);
	memory = mmap(NULL, size + BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	memory = (char *)(((uintptr_t)memory + BLOCK - 1) & -BLOCK);
	/* Fails where the kernel has no huge pages, and the memory is as good a victim without. */
	madvise(memory, size / 2, MADV_HUGEPAGE);
	for (size_t page = 0; page < size / PAGE; page++)
		victim_fill(memory + page * PAGE, PAGE, page + 1);
	for (intptr_t i = 0; i < nr; i++) {
		children[i] = victim_child(worker_main, (void *)i);
		snprintf(pids + strlen(pids), sizeof(pids) - strlen(pids), "%d\n", children[i]);
	}
	victim_put("workers", pids, strlen(pids));
	victim_ready();
	victim_wait();
	for (size_t page = 0; page < size / PAGE; page++)
		CHECK(victim_filled(memory + page * PAGE, PAGE, page + 1), "page %zu changed for the parent", page);
	for (int i = 0; i < nr; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
