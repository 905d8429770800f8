/*
 * Shared memory that four tasks show: anonymous, with a dense part, single pages and holes, and a memfd that nobody may
 * write to any more. Each task verifies all of it; that there is nothing where the holes are is asked first.
 */
#include "victim.h"

#define PAGE 4096ul
#define NR_PAGES 5000ul
#define DENSE 3000ul

static char *anonymous, *sealed;

/* What the page of an object holds; 0: it is a hole. */
static int seed_of(size_t page)
{
	if (page < DENSE)
		return 1 + page % 200;
	return page % 3 ? 0 : 7;
}

static void fill(char *memory)
{
	for (size_t i = 0; i < NR_PAGES; i++)
		if (seed_of(i))
			victim_fill(memory + i * PAGE, PAGE, seed_of(i));
}

static void check(const char *name, char *memory)
{
	static unsigned char there[NR_PAGES];

	MUST(!mincore(memory, NR_PAGES * PAGE, there));
	for (size_t i = 0; i < NR_PAGES; i++) {
		CHECK((there[i] & 1) == !!seed_of(i), "%s: page %zu is%s there", name, i, there[i] & 1 ? "" : " not");
		if (seed_of(i))
			CHECK(victim_filled(memory + i * PAGE, PAGE, seed_of(i)), "%s: page %zu changed", name, i);
	}
}

static int child_main(void *unused)
{
	(void)unused;
	victim_ready();
	victim_wait_quietly();
	check("child: anonymous", anonymous);
	check("child: memfd", sealed);
	return 0;
}

static char *map(int fd, int protection)
{
	char *memory = mmap(NULL, NR_PAGES * PAGE, protection, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);

	MUST(memory != MAP_FAILED);
	return memory;
}

int main(int argc, char **argv)
{
	pid_t children[3];
	int fd;

	victim_init(argc, argv);
	anonymous = map(-1, PROT_READ | PROT_WRITE);
	fill(anonymous);
	fd = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	MUST(fd >= 0 && !ftruncate(fd, NR_PAGES * PAGE));
	sealed = map(fd, PROT_READ | PROT_WRITE);
	fill(sealed);
	MUST(!munmap(sealed, NR_PAGES * PAGE));
	MUST(!fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK));
	sealed = map(fd, PROT_READ);
	for (int i = 0; i < 3; i++)
		children[i] = victim_child(child_main, NULL);
	victim_ready();
	victim_wait();
	check("anonymous", anonymous);
	check("memfd", sealed);
	CHECK_EQUAL(fcntl(fd, F_GET_SEALS), F_SEAL_WRITE | F_SEAL_SHRINK, "the memfd's seals");
	for (int i = 0; i < 3; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
