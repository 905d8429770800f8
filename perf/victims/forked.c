/*
 * A parent with argument 3 MiB, and argument 2 workers that were forked when those were there and share them
 * copy-on-write. Every worker wrote to one page in 1024, so that it has copies of its own among them.
 */
#include "victim.h"

#define PAGE 4096ul
#define BLOCK (1024 * PAGE)

static char *memory;
static size_t size;

static char *own_page(size_t block, int worker)
{
	return memory + block * BLOCK + (worker + 1) * PAGE;
}

static void fill_own(size_t block, int worker)
{
	victim_fill(own_page(block, worker), PAGE, block * 64 + worker + 1000000);
}

static void verify_own(size_t block, int worker)
{
	CHECK(victim_filled(own_page(block, worker), PAGE, block * 64 + worker + 1000000),
	      "a page of worker %d in block %zu changed", worker, block);
}

/* The content of a block as the parent made it, with the pages left out that `worker` (-1: the parent) changed. */
static void verify_shared(size_t block, int worker)
{
	static char expected[BLOCK];
	char *at = memory + block * BLOCK;
	size_t left_out = (worker + 1) * PAGE;

	victim_fill(expected, BLOCK, block + 1);
	if (worker >= 0) {
		CHECK(!memcmp(at, expected, left_out), "block %zu changed for worker %d", block, worker);
		at += left_out + PAGE;
		CHECK(!memcmp(at, expected + left_out + PAGE, BLOCK - left_out - PAGE), "block %zu changed for worker %d",
		      block, worker);
		return;
	}
	CHECK(!memcmp(at, expected, BLOCK), "block %zu changed for the parent", block);
}

static int worker_main(void *number)
{
	int worker = (int)(intptr_t)number;

	for (size_t block = 0; block < size / BLOCK; block++)
		fill_own(block, worker);
	victim_ready();
	victim_wait_quietly();
	for (size_t block = 0; block < size / BLOCK; block++) {
		verify_own(block, worker);
		verify_shared(block, worker);
	}
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[64];
	int nr;

	victim_init(argc, argv);
	MUST(argc > 3);
	nr = atoi(argv[2]);
	size = strtoul(argv[3], NULL, 10) << 20;
	MUST(nr >= 0 && nr < 64 && size && size % BLOCK == 0);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	/* Small pages: a worker's write would copy a whole huge one. */
	for (size_t block = 0; block < size / BLOCK; block++)
		victim_fill(memory + block * BLOCK, BLOCK, block + 1);
	for (intptr_t i = 0; i < nr; i++)
		children[i] = victim_child(worker_main, (void *)i);
	victim_ready();
	victim_wait();
	for (size_t block = 0; block < size / BLOCK; block++)
		verify_shared(block, -1);
	for (int i = 0; i < nr; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
