/*
 * Four tasks that share memory which comes late: all of them read it at once, with many threads, from windows of their
 * own; one forks, one unmaps and maps again, one gives parts back. Whatever one of them writes or takes away the others
 * see, and nothing else ever changes. Argument: how many blocks of 256 KiB to share.
 */
#include "victim.h"
#include <pthread.h>
#include <sched.h>

#define PAGE 4096UL
#define BLOCK (64 * PAGE)
#define NR_THREADS 4
#define NR_GIVEN 64UL /* blocks of the object that is given back and moved */
#define NR_HIDDEN 16UL /* blocks of the object whose middle nobody has mapped */

static unsigned char *memory, *given, *hidden;
static size_t nr_blocks = 64;
/* Shared, too, and small: how far each task is. */
static volatile int *steps;

static unsigned char *block(size_t number)
{
	return memory + number * BLOCK;
}

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* ---- everybody */

struct window {
	size_t first, end;
	uint64_t seed;
};

static void *read_randomly(void *argument)
{
	const struct window *window = argument;
	uint64_t state = window->seed * 77 + 1;

	for (size_t i = window->first; i < window->end; i++) {
		size_t number = window->first + draw(&state) % (window->end - window->first);

		CHECK(victim_filled(block(number), BLOCK, number + 1), "block %zu is wrong", number);
	}
	return NULL;
}

static void read_all(size_t first, size_t end, uint64_t seed)
{
	struct window windows[NR_THREADS];
	pthread_t threads[NR_THREADS];

	for (uint64_t i = 0; i < NR_THREADS; i++) {
		windows[i] = (struct window){ first, end, seed * NR_THREADS + i };
		CHECK(!pthread_create(&threads[i], NULL, read_randomly, &windows[i]), "no thread");
	}
	for (int i = 0; i < NR_THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL), "a thread cannot be joined");
	for (size_t i = first; i < end; i++)
		CHECK(victim_filled(block(i), BLOCK, i + 1), "block %zu is wrong at the end", i);
}

static void wait_for(int who, int step)
{
	for (int i = 0; i < 20000 && steps[who] < step; i++)
		victim_nap(1);
	CHECK(steps[who] >= step, "task %d never came to step %d", who, step);
}

/* ---- one of them each */

static int forks(void *unused)
{
	pid_t children[4];

	(void)unused;
	victim_ready();
	victim_wait_quietly();
	for (int i = 0; i < 4; i++) {
		children[i] = fork();
		CHECK(children[i] >= 0, "fork: %s", strerror(errno));
		if (!children[i]) {
			uint64_t state = i + 5;

			for (int n = 0; n < 30; n++) {
				size_t number = draw(&state) % nr_blocks;

				CHECK(victim_filled(block(number), BLOCK, number + 1), "block %zu is wrong in a fork", number);
			}
			_exit(0);
		}
	}
	read_all(0, nr_blocks, 1);
	for (int i = 0; i < 4; i++)
		victim_expect_exit(children[i], 0);
	return 0;
}

/* Its window begins in the middle. Views of the same memory come and go. */
static int unmaps(void *unused)
{
	size_t half = nr_blocks / 2, last = nr_blocks - 1;
	unsigned char *again;

	(void)unused;
	MUST(!munmap(memory, half * BLOCK));
	victim_ready();
	victim_wait_quietly();
	/* An old size of 0 maps the same once more. */
	again = mremap(block(half), 0, 2 * BLOCK, MREMAP_MAYMOVE);
	CHECK(again != MAP_FAILED, "mapping once more: %s", strerror(errno));
	CHECK(again == MAP_FAILED || victim_filled(again + BLOCK, BLOCK, half + 2), "a new view is wrong");
	CHECK(!munmap(block(last), BLOCK), "munmap: %s", strerror(errno));
	again = mremap(block(last - 1), BLOCK, 2 * BLOCK, 0);
	CHECK(again == block(last - 1), "growing: %s", strerror(errno));
	CHECK(again == MAP_FAILED || victim_filled(block(last), BLOCK, last + 1), "a view that grew is wrong");
	read_all(half, nr_blocks, 2);
	return 0;
}

static int gives_back(void *unused)
{
	unsigned char *moved, *room;

	(void)unused;
	victim_ready();
	victim_wait_quietly();
	/* What others still show stays. */
	CHECK(!madvise(given, BLOCK, MADV_DONTNEED), "madvise: %s", strerror(errno));
	CHECK(victim_filled(given, BLOCK, 500), "shared memory was lost by MADV_DONTNEED");
	CHECK(!madvise(given + 2 * BLOCK, 20 * BLOCK, MADV_REMOVE), "madvise: %s", strerror(errno));
	CHECK(victim_zero(given + 2 * BLOCK, BLOCK), "memory that was taken away is not empty");
	given[3 * BLOCK] = 'x';
	steps[0] = 1;
	room = mmap(NULL, 2 * NR_GIVEN * BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(room != MAP_FAILED, "no room");
	moved = mremap(given, NR_GIVEN * BLOCK, NR_GIVEN * BLOCK, MREMAP_MAYMOVE | MREMAP_FIXED, room);
	CHECK(moved == room, "moving: %s", strerror(errno));
	CHECK(moved != room || victim_filled(moved + 40 * BLOCK, BLOCK, 540), "a moved view is wrong");
	CHECK(moved != room || victim_zero(moved + 10 * BLOCK, BLOCK), "a moved view shows what was taken away");
	read_all(0, nr_blocks, 3);
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[3];

	victim_init(argc, argv);
	if (argc > 2)
		nr_blocks = strtoul(argv[2], NULL, 10);
	memory = mmap(NULL, nr_blocks * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	given = mmap(NULL, NR_GIVEN * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	hidden = mmap(NULL, NR_HIDDEN * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	steps = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED && given != MAP_FAILED && hidden != MAP_FAILED && steps != MAP_FAILED);
	for (size_t i = 0; i < nr_blocks; i++)
		victim_fill(block(i), BLOCK, i + 1);
	for (size_t i = 0; i < NR_GIVEN; i++)
		victim_fill(given + i * BLOCK, BLOCK, 500 + i);
	for (size_t i = 0; i < NR_HIDDEN; i += 2) /* every second block was never touched */
		victim_fill(hidden + i * BLOCK, BLOCK, 900 + i);
	children[0] = victim_child(forks, NULL);
	children[1] = victim_child(unmaps, NULL);
	children[2] = victim_child(gives_back, NULL);
	victim_ready();
	victim_wait();
	CHECK(!mprotect(hidden, PAGE, PROT_READ), "mprotect: %s", strerror(errno));
	for (size_t i = 0; i < NR_HIDDEN; i++)
		CHECK(i % 2 ? victim_zero(hidden + i * BLOCK, BLOCK) : victim_filled(hidden + i * BLOCK, BLOCK, 900 + i),
		      "block %zu with holes around is wrong", i);
	read_all(0, nr_blocks, 4);
	wait_for(0, 1);
	CHECK(victim_zero(given + 10 * BLOCK, BLOCK), "what another task took away is still there");
	CHECK(given[3 * BLOCK] == 'x', "what another task wrote is not there");
	for (size_t i = 22; i < NR_GIVEN; i++)
		CHECK(victim_filled(given + i * BLOCK, BLOCK, 500 + i), "block %zu behind what was taken away is wrong", i);
	for (int i = 0; i < 3; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
