/*
 * 64 GiB of address space that is almost never touched: argument 2 MiB of content in pieces of 1 MiB, evenly spread, and
 * beside them 256 MiB of pages that were written and hold nothing but zeros.
 */
#include "victim.h"

#define SPACE (64ul << 30)
#define PIECE (1ul << 20)
#define ZEROS (256ul << 20)

int main(int argc, char **argv)
{
	size_t nr = argc > 2 ? strtoul(argv[2], NULL, 10) : 64, step;
	char *memory, *zeros;

	victim_init(argc, argv);
	MUST(nr && nr <= SPACE / PIECE / 2);
	step = SPACE / nr / PIECE * PIECE;
	memory = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	zeros = mmap(NULL, ZEROS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED && zeros != MAP_FAILED);
	for (size_t i = 0; i < nr; i++)
		victim_fill(memory + i * step, PIECE, i + 1);
	memset(zeros, 0, ZEROS);
	victim_ready();
	victim_wait();
	for (size_t i = 0; i < nr; i++) {
		CHECK(victim_filled(memory + i * step, PIECE, i + 1), "piece %zu changed", i);
		CHECK(victim_zero(memory + i * step + PIECE, PIECE), "there is something behind piece %zu", i);
	}
	CHECK(victim_zero(zeros, ZEROS), "zeros changed");
	return victim_done();
}
