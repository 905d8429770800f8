/*
 * Areas of private memory that are populated in different ways, each a mapping of its own, for the question which of
 * their blocks become huge pages. The file "areas" has a line per area: name and address. Whatever that was, mappings,
 * flags and content must be as they were, and an area must still be movable as a whole.
 */
#include "victim.h"

#define PAGE 4096ul
#define BLOCK (2ul << 20)
#define AREA (8ul << 20)

static char *areas;

/* Areas have holes between them, and begin at a block's border but for one. */
static char *area(int number)
{
	return areas + number * 2 * AREA;
}

static void layout_of(char *out, size_t size)
{
	unsigned long start, end;
	char line[512];
	int inside = 0;
	FILE *file = fopen("/proc/self/smaps", "re");

	MUST(file);
	out[0] = 0;
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' ')) {
			inside = start >= (unsigned long)areas && start < (unsigned long)area(8);
			if (inside)
				snprintf(out + strlen(out), size - strlen(out), "%lx-%lx", start, end);
		}
		if (inside && !strncmp(line, "VmFlags:", 8))
			snprintf(out + strlen(out), size - strlen(out), "%s", line + 8);
	}
	fclose(file);
}

static void make(FILE *list, int number, const char *name, size_t offset)
{
	char *place = area(number) + offset;

	MUST(mmap(place, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == place);
	fprintf(list, "%s %lx\n", name, (unsigned long)place);
}

static char before[8192], after[8192];

static void prepare(void)
{
	FILE *list;

	areas = mmap(NULL, 18 * AREA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	MUST(areas != MAP_FAILED && !munmap(areas, 18 * AREA));
	areas = (char *)(((unsigned long)areas + AREA - 1) & ~(AREA - 1));
	MUST((list = fopen(victim_path("areas"), "we")));

	make(list, 0, "dense", 0);
	victim_fill(area(0), AREA, 1);
	make(list, 1, "unaligned", 5 * PAGE); /* three whole blocks */
	victim_fill(area(1) + 5 * PAGE, AREA, 2);
	make(list, 2, "half", 0); /* every other page: none */
	for (size_t i = 0; i < AREA; i += 2 * PAGE)
		victim_fill(area(2) + i, PAGE, 3 + i);
	make(list, 3, "partly", 0); /* one dense block, one with 20 pages missing, one with 200, one empty */
	victim_fill(area(3), BLOCK, 4);
	victim_fill(area(3) + BLOCK + 20 * PAGE, BLOCK - 20 * PAGE, 5);
	victim_fill(area(3) + 2 * BLOCK, BLOCK - 200 * PAGE, 6);
	make(list, 4, "nohuge", 0);
	MUST(!madvise(area(4), AREA, MADV_NOHUGEPAGE));
	victim_fill(area(4), AREA, 7);
	make(list, 5, "huge", 0); /* huge already, as far as the kernel plays along */
	MUST(!madvise(area(5), AREA, MADV_HUGEPAGE));
	victim_fill(area(5), AREA, 8);
	make(list, 6, "advised", 0); /* dense enough only after a restore that populates too much */
	MUST(!madvise(area(6), AREA, MADV_NOHUGEPAGE));
	for (size_t i = 0; i < AREA; i += 4 * PAGE)
		victim_fill(area(6) + i, PAGE, 9 + i);
	MUST(!madvise(area(6), AREA, MADV_HUGEPAGE));
	make(list, 7, "readonly", 0);
	victim_fill(area(7), AREA, 10);
	MUST(!mprotect(area(7), AREA, PROT_READ));
	MUST(!fclose(list));
	layout_of(before, sizeof(before));
}

static void check(void)
{
	char *moved;

	layout_of(after, sizeof(after));
	CHECK(!strcmp(before, after), "mappings were\n%sand are\n%s", before, after);
	CHECK(victim_filled(area(0), AREA, 1) && victim_filled(area(1) + 5 * PAGE, AREA, 2), "dense areas changed");
	for (size_t i = 0; i < AREA; i += 2 * PAGE)
		CHECK(victim_filled(area(2) + i, PAGE, 3 + i) && !area(2)[i + PAGE], "page %zu changed", i / PAGE);
	CHECK(victim_filled(area(3), BLOCK, 4) && victim_filled(area(3) + BLOCK + 20 * PAGE, BLOCK - 20 * PAGE, 5) &&
	      victim_filled(area(3) + 2 * BLOCK, BLOCK - 200 * PAGE, 6), "the partly populated area changed");
	for (size_t i = 0; i < 20 * PAGE; i++)
		CHECK(!area(3)[BLOCK + i], "what was never written is %d at %zu", area(3)[BLOCK + i], i);
	for (size_t i = 3 * BLOCK - 200 * PAGE; i < AREA; i++)
		CHECK(!area(3)[i], "what was never written is %d at %zu", area(3)[i], i);
	CHECK(victim_filled(area(4), AREA, 7) && victim_filled(area(5), AREA, 8), "memory with advice changed");
	for (size_t i = 0; i < AREA; i += 4 * PAGE)
		CHECK(victim_filled(area(6) + i, PAGE, 9 + i), "page %zu changed", i / PAGE);
	CHECK(victim_filled(area(7), AREA, 10), "the read-only area changed");
	/* A mapping that had been split could not grow. */
	moved = mremap(area(3), AREA, 2 * AREA, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED, "growing a mapping: %s", strerror(errno));
}

int main(int argc, char **argv)
{
	return victim_main(argc, argv, prepare, check);
}
