/* The simplest task: one thread, a little memory, nothing open but its standard streams. Argument 2: MiB to hold. */
#include "victim.h"

int main(int argc, char **argv)
{
	size_t size = (argc > 2 ? strtoul(argv[2], NULL, 10) : 1) << 20;
	char *memory;

	victim_init(argc, argv);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	victim_fill(memory, size, 1);
	victim_ready();
	victim_wait();
	CHECK(victim_filled(memory, size, 1), "memory changed");
	return victim_done();
}
