/*
 * What holds for an address space as a whole, or for a mapping whatever lies in it: memory that is writable and
 * executable denied (PR_SET_MDWE), what is mapped in future locked (mlockall), NUMA policies of mappings and of the
 * thread. Argument 2: "now" or "on-fault", when memory that is mapped in future gets its pages.
 */
#include "victim.h"
#include <linux/mempolicy.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
enum { PAGE = 4096, AREA_PAGES = 3, BOUND = MPOL_BIND | MPOL_F_STATIC_NODES };

static char *area;

static int policy_at(void *address, unsigned long *nodes)
{
	int mode = -1;

	*nodes = 0;
	CHECK(!syscall(SYS_get_mempolicy, &mode, nodes, 64, address, address ? MPOL_F_ADDR : 0), "get_mempolicy: %s",
	      strerror(errno));
	return mode;
}

static void check_policies(void)
{
	unsigned long nodes;

	CHECK_EQUAL(policy_at(area, &nodes), MPOL_DEFAULT, "the policy of the first page");
	CHECK_EQUAL(policy_at(area + PAGE, &nodes), BOUND, "the policy of the second page");
	CHECK_EQUAL(nodes, 1, "its nodes");
	CHECK_EQUAL(policy_at(area + 2 * PAGE, &nodes), MPOL_DEFAULT, "the policy of the third page");
	CHECK_EQUAL(policy_at(NULL, &nodes), MPOL_INTERLEAVE, "the policy of the thread");
	CHECK_EQUAL(nodes, 1, "its nodes");
	for (int page = 0; page < AREA_PAGES; page++)
		CHECK_EQUAL(area[page * PAGE], 'a' + page, "a byte of the area");
}

static int has_flag(const char *line, const char *flag)
{
	return strstr(line, flag) != NULL;
}

/* The flags that the kernel shows of a mapping that is made now. */
static void check_new_mapping(int on_fault)
{
	char *fresh = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char line[512], head[32];
	unsigned char there = 2;
	int inside = 0;
	FILE *smaps;

	CHECK(fresh != MAP_FAILED, "mmap: %s", strerror(errno));
	CHECK(!mincore(fresh, PAGE, &there), "mincore: %s", strerror(errno));
	CHECK_EQUAL(there & 1, !on_fault, "whether a new page is there at once");
	snprintf(head, sizeof(head), "%lx-", (unsigned long)fresh);
	CHECK(mprotect(fresh, PAGE, PROT_READ) == 0, "mprotect: %s", strerror(errno)); /* alone in its mapping */
	smaps = fopen("/proc/self/smaps", "r");
	while (smaps && fgets(line, sizeof(line), smaps)) {
		if (!strncmp(line, head, strlen(head)))
			inside = 1;
		if (!inside || strncmp(line, "VmFlags:", 8))
			continue;
		CHECK(has_flag(line, " lo"), "a new mapping is not locked: %s", line);
		CHECK_EQUAL(has_flag(line, " lf"), on_fault, "whether it is locked on fault");
		break;
	}
	CHECK(inside, "the new mapping is not in smaps");
	if (smaps)
		fclose(smaps);
	munmap(fresh, PAGE);
}

static void check_denial(void)
{
	void *both = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK_EQUAL(prctl(PR_GET_MDWE, 0, 0, 0, 0), 1, "memory-deny-write-execute");
	CHECK(both == MAP_FAILED && errno == EACCES, "memory that is writable and executable was given");
	CHECK(mprotect(area, PAGE, PROT_READ | PROT_EXEC) == -1 && errno == EACCES, "data could be made executable");
}

static void check_all(int on_fault)
{
	check_policies();
	check_new_mapping(on_fault);
	check_denial();
}

int main(int argc, char **argv)
{
	unsigned long first = 1;
	int on_fault;

	victim_init(argc, argv);
	MUST(argc > 2);
	on_fault = !strcmp(argv[2], "on-fault");
	area = mmap(NULL, AREA_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(area != MAP_FAILED);
	if (syscall(SYS_mbind, area + PAGE, PAGE, BOUND, &first, 64, 0) ||
	    syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, &first, 64) || prctl(PR_SET_MDWE, 1, 0, 0, 0))
		return 77;
	for (int page = 0; page < AREA_PAGES; page++)
		area[page * PAGE] = 'a' + page;
	MUST(!mlockall(MCL_FUTURE | (on_fault ? MCL_ONFAULT : 0)));
	check_all(on_fault);
	victim_ready();
	victim_wait();
	check_all(on_fault);
	return victim_done();
}
