/* One task with argument 2 MiB of content that compresses about two to one: of each 64 bytes the half is noise. */
#include "victim.h"

static void fill(uint64_t *words, size_t nr)
{
	victim_fill(words, nr * 8, 7);
	for (size_t i = 0; i < nr; i++)
		if (i % 8 >= 4)
			words[i] = i / 4096;
}

int main(int argc, char **argv)
{
	size_t size = (argc > 2 ? strtoul(argv[2], NULL, 10) : 1) << 20;
	uint64_t *memory, *expected;

	victim_init(argc, argv);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST((void *)memory != MAP_FAILED && size);
	fill(memory, size / 8);
	victim_ready();
	victim_wait();
	expected = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK((void *)expected != MAP_FAILED, "no memory to compare with");
	if ((void *)expected != MAP_FAILED) {
		fill(expected, size / 8);
		CHECK(!memcmp(memory, expected, size), "memory changed");
	}
	return victim_done();
}
