/* Pages that were written to and hold nothing but zeros: of private and shared memory, and over a file. */
#include "victim.h"

#define PAGE 4096
#define NR 2048

static const size_t size = (size_t)NR * PAGE;

/* Every other page, and a long run of them. */
static int is_zero(size_t page)
{
	return page % 2 || (page > 700 && page < 1500);
}

static void prepare(char *memory, unsigned int seed)
{
	victim_fill(memory, size, seed);
	for (size_t page = 0; page < NR; page++)
		if (is_zero(page))
			memset(memory + page * PAGE, 0, PAGE);
}

static int is_right(const char *memory, char *scratch, unsigned int seed)
{
	prepare(scratch, seed);
	return memcmp(memory, scratch, size) == 0;
}

int main(int argc, char **argv)
{
	char *memory[3], *scratch;
	int fd;

	victim_init(argc, argv);
	fd = open(victim_path("file"), O_RDWR | O_CREAT | O_TRUNC, 0600);
	MUST(fd >= 0 && ftruncate(fd, size) == 0);
	memory[0] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	MUST(memory[0] != MAP_FAILED);
	victim_fill(memory[0], size, 9);
	MUST(munmap(memory[0], size) == 0);
	memory[0] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memory[1] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memory[2] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	MUST(close(fd) == 0);
	for (unsigned int i = 0; i < 3; i++) {
		MUST(memory[i] != MAP_FAILED);
		prepare(memory[i], i);
	}
	victim_ready();
	victim_wait();
	scratch = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(scratch != MAP_FAILED);
	CHECK(is_right(memory[0], scratch, 0), "private memory changed");
	CHECK(is_right(memory[1], scratch, 1), "shared memory changed");
	CHECK(is_right(memory[2], scratch, 2), "memory over a file changed");
	return victim_done();
}
