/*
 * A task with memory that comes late: it is touched while it comes, by many threads, by forks, through system calls, and
 * is moved, given back and unmapped on the way. No page may ever hold anything but what was there before, or zeros where
 * it was given back. Arguments: how many blocks of 256 KiB to hold; "slow" to touch them one by one all the time.
 */
#include "victim.h"
#include <pthread.h>
#include <spawn.h>

#define PAGE 4096UL
#define BLOCK (64 * PAGE)
#define NR_THREADS 8

static unsigned char *memory; /* NR_BLOCKS blocks, each with its own seed */
static size_t nr_blocks = 256;
static volatile int stop;

static unsigned char *block(size_t number)
{
	return memory + number * BLOCK;
}

static int block_is_right(size_t number)
{
	return victim_filled(block(number), BLOCK, number + 1);
}

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Never lets more than a moment pass without a fault, as long as pages are missing. */
static void *touch_slowly(void *unused)
{
	for (size_t number = 0; !stop; number = (number + 1) % nr_blocks) {
		CHECK(block_is_right(number), "block %zu is wrong", number);
		victim_nap(40);
	}
	return unused;
}

static void *touch_randomly(void *argument)
{
	uint64_t state = (uintptr_t)argument * 77 + 1;

	while (!victim_exists("go"))
		victim_nap(1);
	for (size_t i = 0; i < nr_blocks; i++) {
		size_t number = draw(&state) % nr_blocks;

		CHECK(block_is_right(number), "block %zu is wrong in thread %zu", number, (size_t)argument);
	}
	return NULL;
}

/* ---- what the test may ask for while pages are missing */

static void check_forks(void)
{
	pid_t children[6];

	for (int i = 0; i < 6; i++) {
		children[i] = fork();
		CHECK(children[i] >= 0, "fork: %s", strerror(errno));
		if (!children[i]) {
			uint64_t state = i + 5;
			int wrong = 0;
			pid_t grandchild = i == 3 ? fork() : 1;

			for (int n = 0; n < 40; n++) {
				size_t number = draw(&state) % nr_blocks;

				wrong |= !block_is_right(number);
				memset(block(number), 0xee, PAGE); /* its own copy */
				victim_fill(block(number), BLOCK, number + 1);
			}
			if (i == 3 && grandchild > 0) {
				int status = 0;

				waitpid(grandchild, &status, 0);
				wrong |= status;
			}
			_exit(wrong);
		}
	}
	for (int i = 0; i < 6; i++)
		victim_expect_exit(children[i], 0);
}

static void check_exec(void)
{
	char *words[] = { "true", NULL };
	pid_t child;

	for (int i = 0; i < 4; i++) {
		CHECK(!posix_spawnp(&child, "true", NULL, NULL, words, environ), "no spawn");
		victim_expect_exit(child, 0);
		child = fork();
		if (!child) {
			execvp("true", words);
			_exit(1);
		}
		victim_expect_exit(child, 0);
	}
}

static void check_given_back(unsigned char *area, size_t size)
{
	CHECK(!madvise(area, size / 2, MADV_DONTNEED), "madvise: %s", strerror(errno));
	CHECK(victim_zero(area, size / 2), "memory that was given back is not empty");
	memset(area, 7, PAGE);
	CHECK(area[0] == 7 && area[PAGE - 1] == 7, "memory that was written again is lost");
}

static void check_moved(unsigned char *area, size_t size, uint64_t seed)
{
	unsigned char *place = mmap(NULL, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *moved;

	CHECK(place != MAP_FAILED, "no room");
	moved = mremap(area, size, 2 * size, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	CHECK(moved == place, "mremap: %s", strerror(errno));
	if (moved != place)
		return;
	CHECK(victim_filled(moved, size, seed), "moved memory is wrong");
	CHECK(victim_zero(moved + size, size), "memory behind what was moved is not empty");
}

static void check_unmapped(unsigned char *area, size_t size)
{
	unsigned char *again;

	CHECK(!munmap(area, size), "munmap: %s", strerror(errno));
	again = mmap(area, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(again == area, "mapping again: %s", strerror(errno));
	CHECK(again == area && victim_zero(again, size), "new memory in the old place is not empty");
}

static void check_protected(unsigned char *area, size_t size, uint64_t seed)
{
	for (size_t at = PAGE; at + PAGE < size; at += 2 * PAGE)
		CHECK(!mprotect(area + at, PAGE, PROT_READ), "mprotect: %s", strerror(errno));
	CHECK(victim_filled(area, size, seed), "memory cut into many mappings is wrong");
}

/* The kernel itself touches the pages. */
static void check_system_calls(unsigned char *area, size_t size, uint64_t seed)
{
	unsigned char copy[4 * PAGE];
	int ends[2];

	CHECK(!pipe(ends), "no pipe");
	CHECK(write(ends[1], area, sizeof(copy)) == sizeof(copy), "write: %s", strerror(errno));
	CHECK(read(ends[0], copy, sizeof(copy)) == sizeof(copy), "read: %s", strerror(errno));
	CHECK(!memcmp(copy, area, sizeof(copy)), "what a system call read is not what is there");
	CHECK(victim_filled(area, size, seed), "memory for system calls is wrong");
	close(ends[0]);
	close(ends[1]);
}

int main(int argc, char **argv)
{
	pthread_t threads[NR_THREADS], slow;
	unsigned char *areas[6];
	const size_t size = 8 << 20;

	victim_init(argc, argv);
	if (argc > 2)
		nr_blocks = strtoul(argv[2], NULL, 10);
	memory = mmap(NULL, nr_blocks * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	for (size_t i = 0; i < nr_blocks; i++)
		victim_fill(block(i), BLOCK, i + 1);
	for (int i = 0; i < 6; i++) {
		areas[i] = mmap(NULL, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		MUST(areas[i] != MAP_FAILED);
		areas[i] += PAGE; /* no neighbours to grow together with */
		MUST(!mprotect(areas[i], size, PROT_READ | PROT_WRITE));
		victim_fill(areas[i], size, 1000 + i);
	}
	for (uintptr_t i = 0; i < NR_THREADS; i++)
		MUST(!pthread_create(&threads[i], NULL, touch_randomly, (void *)i));
	if (argc > 3)
		MUST(!pthread_create(&slow, NULL, touch_slowly, NULL));
	victim_ready();
	victim_wait();
	check_given_back(areas[0], size);
	check_moved(areas[1], size, 1001);
	check_forks();
	check_unmapped(areas[2], size);
	check_protected(areas[3], size, 1003);
	check_exec();
	check_system_calls(areas[4], size, 1004);
	for (int i = 0; i < NR_THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL), "a thread cannot be joined");
	stop = 1;
	CHECK(argc <= 3 || !pthread_join(slow, NULL), "the slow thread cannot be joined");
	for (size_t i = 0; i < nr_blocks; i++)
		CHECK(block_is_right(i), "block %zu is wrong at the end", i);
	CHECK(victim_filled(areas[5], size, 1005), "untouched memory is wrong at the end");
	return victim_done();
}
