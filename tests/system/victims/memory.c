/*
 * Private memory: filled and sparse mappings, the stack before and after it grows, every protection, memory that is
 * written and then made unreadable, huge reservations, advice and locks as smaps shows them, huge pages, grows-down.
 */
#include "victim.h"

#define PAGE 4096ul
#define GIB (1ul << 30)

struct area {
	char *start;
	size_t size;
	char flags[128]; /* of smaps */
};

static char *map(size_t size, int protection, int flags)
{
	char *memory = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	MUST(memory != MAP_FAILED);
	return memory;
}

/*
 * VmFlags of the mapping that holds `address`. "sd" (soft-dirty) says what was written lately, "nr" comes with MAP_NORESERVE
 * but not all kernels show it, "um" and "uw" are userfaultfd's: none of them is state.
 */
static void flags_of(const void *address, char *out, size_t size)
{
	unsigned long start, end;
	char line[512], *word;
	int inside = 0;
	FILE *file = fopen("/proc/self/smaps", "re");

	MUST(file);
	out[0] = 0;
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2 && strchr(line, '-') < strchr(line, ' '))
			inside = (unsigned long)address >= start && (unsigned long)address < end;
		if (inside && !strncmp(line, "VmFlags:", 8)) {
			for (word = strtok(line + 8, " \n"); word; word = strtok(NULL, " \n"))
				if (strcmp(word, "sd") && strcmp(word, "um") && strcmp(word, "uw"))
					snprintf(out + strlen(out), size - strlen(out), "%s ", word);
			break;
		}
	}
	fclose(file);
}

static char protection_of(const void *address, char *out)
{
	unsigned long start, end;
	char line[512], text[8] = "none";
	FILE *file = fopen("/proc/self/maps", "re");

	MUST(file);
	while (fgets(line, sizeof(line), file))
		if (sscanf(line, "%lx-%lx %4s", &start, &end, text) == 3 && (unsigned long)address >= start &&
		    (unsigned long)address < end)
			break;
	fclose(file);
	strcpy(out, text);
	return text[0];
}

static void check_protection(const void *address, const char *wanted)
{
	char is[8];

	protection_of(address, is);
	CHECK(!strcmp(is, wanted), "protection of %p is %s, wanted %s", address, is, wanted);
}

/* Deeper than the stack was at the dump, so that it must still grow down by itself. */
static int __attribute__((noinline)) dig(int depth)
{
	volatile char room[PAGE];

	room[0] = depth;
	room[PAGE - 1] = 1;
	return depth ? dig(depth - 1) + room[PAGE - 1] : 0;
}

static void *stack_mapping_grows(char *where)
{
	void *memory = mmap(where, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED,
			    -1, 0);

	MUST(memory != MAP_FAILED);
	return memory;
}

static struct area areas[8];
static char *filled, *sparse, *hidden, *readable, *code, *reserved, *huge, *guarded, *grows, *hole;
static size_t nr_areas;

static void prepare(void)
{
	filled = map(16 << 20, PROT_READ | PROT_WRITE, 0);
	victim_fill(filled, 16 << 20, 11);
	sparse = map(64 << 20, PROT_READ | PROT_WRITE, 0);
	for (size_t i = 0; i < (64 << 20) / PAGE; i += 37)
		victim_fill(sparse + i * PAGE, PAGE, 1000 + i);
	hidden = map(64 * PAGE, PROT_READ | PROT_WRITE, 0);
	victim_fill(hidden, 64 * PAGE, 12);
	MUST(!mprotect(hidden, 64 * PAGE, PROT_NONE));
	readable = map(3 * PAGE, PROT_READ | PROT_WRITE, 0);
	victim_fill(readable, 3 * PAGE, 13);
	MUST(!mprotect(readable, 3 * PAGE, PROT_READ));
	code = map(PAGE, PROT_READ | PROT_WRITE, 0);
	memcpy(code, "\xb8\x2a\x00\x00\x00\xc3", 6); /* mov $42, %eax; ret */
	MUST(!mprotect(code, PAGE, PROT_READ | PROT_EXEC));
	reserved = map(512 * GIB, PROT_NONE, MAP_NORESERVE);
	MUST(!mprotect(reserved + 100 * GIB, 8 * PAGE, PROT_READ | PROT_WRITE));
	victim_fill(reserved + 100 * GIB, 8 * PAGE, 14);
	hole = map(6 * PAGE, PROT_READ | PROT_WRITE, 0);
	victim_fill(hole, 6 * PAGE, 15);
	MUST(!madvise(hole + PAGE, 2 * PAGE, MADV_DONTNEED));
	huge = map(8 << 20, PROT_READ | PROT_WRITE, 0);
	MUST(!madvise(huge, 8 << 20, MADV_HUGEPAGE) || errno == EINVAL);
	victim_fill(huge, 8 << 20, 16);
	guarded = map(64 * PAGE, PROT_READ | PROT_WRITE, 0);
	victim_fill(guarded, 64 * PAGE, 17);
	MUST(!madvise(guarded, 16 * PAGE, MADV_DONTFORK) && !madvise(guarded + 16 * PAGE, 16 * PAGE, MADV_DONTDUMP));
	MUST(!madvise(guarded + 32 * PAGE, 16 * PAGE, MADV_SEQUENTIAL) && !madvise(guarded + 48 * PAGE, 8 * PAGE, MADV_RANDOM));
	MUST(!mlock(guarded + 56 * PAGE, 4 * PAGE) || errno == ENOMEM || errno == EPERM);
	MUST(!syscall(SYS_mlock2, guarded + 60 * PAGE, 4 * PAGE, 1 /* MLOCK_ONFAULT */) || errno == ENOMEM || errno == EPERM);
	grows = map(64 << 20, PROT_NONE, MAP_NORESERVE);
	MUST(!munmap(grows, 32 << 20));
	grows = stack_mapping_grows(grows + (16 << 20));
	victim_fill(grows, 4 * PAGE, 18);
}

static void note_flags(void)
{
	char *const looked_at[] = { guarded, guarded + 16 * PAGE, guarded + 32 * PAGE, guarded + 48 * PAGE, guarded + 56 * PAGE,
				    guarded + 60 * PAGE, huge, grows };
	for (size_t i = 0; i < sizeof(looked_at) / sizeof(*looked_at); i++, nr_areas++) {
		areas[i].start = looked_at[i];
		flags_of(looked_at[i], areas[i].flags, sizeof(areas[i].flags));
	}
}

static void check(void)
{
	char flags[128];
	int (*function)(void);

	CHECK(victim_filled(filled, 16 << 20, 11), "filled mapping changed");
	for (size_t i = 0; i < (64 << 20) / PAGE; i++)
		CHECK(i % 37 ? victim_zero(sparse + i * PAGE, PAGE) : victim_filled(sparse + i * PAGE, PAGE, 1000 + i),
		      "page %zu of the sparse mapping changed", i);
	check_protection(hidden, "---p");
	MUST(!mprotect(hidden, 64 * PAGE, PROT_READ));
	CHECK(victim_filled(hidden, 64 * PAGE, 12), "memory that was not readable changed");
	check_protection(readable, "r--p");
	CHECK(victim_filled(readable, 3 * PAGE, 13), "read-only memory changed");
	check_protection(code, "r-xp");
	function = (int (*)(void))(void *)code;
	CHECK_EQUAL(function(), 42, "result of a function in memory");
	check_protection(reserved, "---p");
	check_protection(reserved + 511 * GIB, "---p");
	check_protection(reserved + 100 * GIB, "rw-p");
	CHECK(victim_filled(reserved + 100 * GIB, 8 * PAGE, 14), "pages inside the reservation changed");
	CHECK(!mprotect(reserved + 300 * GIB, PAGE, PROT_READ | PROT_WRITE), "the reservation cannot be opened");
	CHECK(victim_zero(reserved + 300 * GIB, PAGE), "fresh page of the reservation is not zero");
	CHECK(victim_zero(hole + PAGE, 2 * PAGE), "dropped pages are not zero");
	CHECK(victim_filled(huge, 8 << 20, 16), "huge pages changed");
	CHECK(victim_filled(guarded, 64 * PAGE, 17), "advised memory changed");
	CHECK(victim_filled(grows, 4 * PAGE, 18), "grows-down mapping changed");
	for (size_t i = 0; i < nr_areas; i++) {
		flags_of(areas[i].start, flags, sizeof(flags));
		CHECK(!strcmp(flags, areas[i].flags), "flags of area %zu: '%s' became '%s'", i, areas[i].flags, flags);
	}
	*(volatile char *)(grows - 16) = 1; /* one page further down: the mapping grows */
	CHECK_EQUAL(dig(500), 500, "depth of the stack");
}

int main(int argc, char **argv)
{
	char before_stack[PAGE];

	victim_init(argc, argv);
	victim_fill(before_stack, sizeof(before_stack), 5);
	prepare();
	note_flags();
	victim_ready();
	victim_wait();
	CHECK(victim_filled(before_stack, sizeof(before_stack), 5), "stack changed");
	check();
	return victim_done();
}
