/* Every second page of a mapping is touched: a pagemap of as many runs as argument 2 says, each of one page. */
#include "victim.h"

#define PAGE 4096ul

int main(int argc, char **argv)
{
	size_t nr = argc > 2 ? strtoul(argv[2], NULL, 10) : 1000, changed = 0;
	char *memory;

	victim_init(argc, argv);
	memory = mmap(NULL, nr * 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	MUST(!madvise(memory, nr * 2 * PAGE, MADV_NOHUGEPAGE) || errno == EINVAL);
	for (size_t i = 0; i < nr; i++)
		victim_fill(memory + 2 * i * PAGE, PAGE, i + 1);
	victim_ready();
	victim_wait();
	for (size_t i = 0; i < nr; i++)
		changed += !victim_filled(memory + 2 * i * PAGE, PAGE, i + 1);
	CHECK_EQUAL(changed, 0, "number of changed pages");
	/* The gaps last: looking at them brings them in. */
	for (size_t i = 0; i < nr; i += 97)
		CHECK(victim_zero(memory + (2 * i + 1) * PAGE, PAGE), "the page behind run %zu is not zero", i);
	return victim_done();
}
