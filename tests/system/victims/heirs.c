/*
 * Memory that fork left shared, and everything that can become of it in a child: written, dropped, unmapped, protected,
 * moved, and shared once more with a grandchild. Arguments: MiB of memory, workers, and how many pages there are to each
 * that a worker writes.
 */
#include "victim.h"

#define PAGE 4096ul
#define FILE_PAGES 64
#define PIECE 96 /* pages of each piece that a worker does something odd with */
#define SOON 64  /* the first such piece */

enum { DROPS = 1, UNMAPS, PROTECTS, FORKS, MOVES, GRANDCHILD = 50, NOBODY = 99 };

static size_t nr_pages = 24 * 256, stride = 16;
static int nr_workers = 6;
static char *memory, *file, *unseen;

static size_t piece(int which)
{
	return SOON + (size_t)which * 2 * PIECE;
}

static int in_piece(size_t i, int which)
{
	return i >= piece(which) && i < piece(which) + PIECE;
}

static void put(char *page, uint64_t i, uint64_t who)
{
	for (size_t word = 0; word < PAGE / 8; word++)
		((uint64_t *)page)[word] = who << 40 ^ i << 10 ^ word;
}

static int has(const char *page, uint64_t i, uint64_t who)
{
	if (who == NOBODY)
		return victim_zero(page, PAGE);
	for (size_t word = 0; word < PAGE / 8; word++)
		if (((const uint64_t *)page)[word] != (who << 40 ^ i << 10 ^ word))
			return 0;
	return 1;
}

static size_t share_of(int who)
{
	return (size_t)who % stride;
}

/* Who wrote page i last, as task `who` (0: the root) sees it; `again`: after everybody wrote once more. */
static uint64_t writer_of(size_t i, int who, int again)
{
	if (again && i % stride == (share_of(who) + 1) % stride)
		return 1000 + who;
	if (who == 0)
		return in_piece(i, 0) ? NOBODY : i % stride == stride - 1 ? 500 : 0;
	if (who == DROPS && in_piece(i, DROPS))
		return NOBODY;
	if (who == GRANDCHILD && i % (2 * stride) == share_of(FORKS))
		return GRANDCHILD;
	if (i % stride == share_of(who == GRANDCHILD ? FORKS : who))
		return who == GRANDCHILD ? FORKS : who;
	return 0;
}

static int is_out_of_reach(size_t i, int who)
{
	return (who == UNMAPS && in_piece(i, UNMAPS)) || (who == MOVES && in_piece(i, MOVES));
}

static void check_pages(int who, int again)
{
	for (size_t i = 0; i < nr_pages; i++)
		if (!is_out_of_reach(i, who))
			CHECK(has(memory + i * PAGE, i, writer_of(i, who, again)), "task %d: page %zu is wrong%s", who, i,
			      again ? " after all wrote" : "");
}

static void check_file(int who)
{
	for (size_t i = 0; i < FILE_PAGES; i++) {
		int copied = i < 16 && !(who == DROPS && i >= 4 && i < 8);
		uint64_t seen = copied ? 700 : who == 0 && i >= 20 && i < 24 ? 701 : 600;

		CHECK(has(file + i * PAGE, i, seen), "task %d: page %zu of the file's mapping is wrong", who, i);
	}
}

static int is_mapped(const char *page)
{
	unsigned char there;

	return mincore((void *)page, PAGE, &there) == 0;
}

static void check_mappings(int who, char *moved)
{
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);

	MUST(zero >= 0);
	CHECK(is_mapped(unseen) == (who == 0), "task %d: what the root mapped later", who);
	for (int which = UNMAPS; which <= MOVES; which++)
		for (size_t i = piece(which); i < piece(which) + PIECE; i++)
			CHECK(is_mapped(memory + i * PAGE) == !is_out_of_reach(i, who), "task %d: page %zu", who, i);
	CHECK((read(zero, memory + piece(PROTECTS) * PAGE, 0) == 0), "reading nothing");
	if (who == PROTECTS)
		CHECK(read(zero, memory + piece(PROTECTS) * PAGE, 8) < 0 && errno == EFAULT, "a page is not protected");
	for (size_t i = 0; moved && i < PIECE; i++)
		CHECK(has(moved + i * PAGE, piece(MOVES) + i, writer_of(piece(MOVES) + i, who, 0)), "moved page %zu", i);
	close(zero);
}

static char *do_own_things(int who)
{
	char *start = memory + piece(who) * PAGE, *moved = NULL;

	for (size_t i = share_of(who); i < nr_pages; i += stride)
		put(memory + i * PAGE, i, who);
	if (who == DROPS) {
		MUST(!madvise(start, PIECE * PAGE, MADV_DONTNEED));
		MUST(!madvise(file + 4 * PAGE, 4 * PAGE, MADV_DONTNEED));
	} else if (who == UNMAPS) {
		MUST(!munmap(start, PIECE * PAGE));
	} else if (who == PROTECTS) {
		MUST(!mprotect(start, PIECE * PAGE, PROT_READ));
	} else if (who == MOVES) {
		moved = mremap(start, PIECE * PAGE, PIECE * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, unseen + 512 * PAGE);
		MUST(moved != MAP_FAILED);
	}
	return moved;
}

static void finish(int who, char *moved)
{
	check_pages(who, 0);
	check_file(who);
	check_mappings(who, moved);
	for (size_t i = (share_of(who) + 1) % stride; i < nr_pages; i += stride)
		if (!is_out_of_reach(i, who) && !(who == PROTECTS && in_piece(i, PROTECTS)))
			put(memory + i * PAGE, i, 1000 + who);
	victim_nap(50); /* time for the others' stores, which must not be seen */
	if (who != PROTECTS)
		check_pages(who, 1);
}

static int grandchild_main(void *argument)
{
	(void)argument;
	for (size_t i = share_of(FORKS); i < nr_pages; i += 2 * stride)
		put(memory + i * PAGE, i, GRANDCHILD);
	victim_ready();
	victim_wait_quietly();
	finish(GRANDCHILD, NULL);
	return 0;
}

static int worker_main(void *argument)
{
	int who = (int)(intptr_t)argument;
	char *moved = do_own_things(who);
	pid_t child = who == FORKS ? victim_child(grandchild_main, NULL) : 0;

	victim_ready();
	victim_wait_quietly();
	finish(who, moved);
	if (child)
		victim_expect_exit(child, 0);
	return 0;
}

static void map_file(void)
{
	int fd = open(victim_path("mapped"), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	char page[PAGE];

	MUST(fd >= 0);
	for (size_t i = 0; i < FILE_PAGES; i++) {
		put(page, i, 600);
		MUST(write(fd, page, PAGE) == PAGE);
	}
	file = mmap(NULL, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	MUST(file != MAP_FAILED);
	close(fd);
	for (size_t i = 0; i < 16; i++)
		put(file + i * PAGE, i, 700);
}

int main(int argc, char **argv)
{
	static pid_t workers[64];

	victim_init(argc, argv);
	if (argc > 4) {
		nr_pages = strtoul(argv[2], NULL, 10) * 256;
		nr_workers = atoi(argv[3]);
		stride = strtoul(argv[4], NULL, 10);
	}
	memory = mmap(NULL, nr_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unseen = mmap(NULL, 1024 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	MUST(memory != MAP_FAILED && unseen != MAP_FAILED && nr_workers < 50);
	MUST(!munmap(unseen, 1024 * PAGE));
	for (size_t i = 0; i < nr_pages; i++)
		put(memory + i * PAGE, i, 0);
	map_file();
	for (int who = 1; who <= nr_workers; who++)
		workers[who] = victim_child(worker_main, (void *)(intptr_t)who);
	for (size_t i = stride - 1; i < nr_pages; i += stride)
		put(memory + i * PAGE, i, 500);
	MUST(!madvise(memory + piece(0) * PAGE, PIECE * PAGE, MADV_DONTNEED));
	for (size_t i = 20; i < 24; i++)
		put(file + i * PAGE, i, 701);
	MUST(mmap(unseen, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == unseen);
	put(unseen, 0, 0);
	victim_ready();
	victim_wait();
	finish(0, NULL);
	for (int who = 1; who <= nr_workers; who++)
		victim_expect_exit(workers[who], 0);
	return victim_done();
}
