/*
 * What belongs to the process as a whole and any user may set: limits, umask, cwd, comm, exe link, the areas of argv,
 * environment and auxiliary vector, brk, dumpable, parent-death signal, subreaper, personality, oom_score_adj, THP switch,
 * no_new_privs, and the vdso (time through it, at its old place).
 */
#include "victim.h"
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/resource.h>

struct facts {
	struct rlimit limits[16];
	char cwd[PATH_MAX], exe[PATH_MAX], comm[32], arguments[4096], environment[8192], auxv[1024], oom[16], stat_areas[512];
	size_t arguments_size, environment_size, auxv_size;
	mode_t mask;
	int dumpable, death_signal, subreaper, personality_flags, thp, no_new_privs, keep_caps, tsc, mce;
	void *brk_now;
	unsigned long vdso;
};

static size_t slurp(const char *path, char *buffer, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	memset(buffer, 0, size);
	if (fd < 0)
		return 0;
	got = read(fd, buffer, size - 1);
	close(fd);
	return got < 0 ? 0 : got;
}

/* Fields 26 to 28 and 45 to 51 of /proc/self/stat: code, stack start, data, brk start, argument and environment areas. */
static void read_areas(char *out, size_t size)
{
	char text[2048], *field;
	int number = 3;

	slurp("/proc/self/stat", text, sizeof(text));
	out[0] = 0;
	for (field = strtok(strrchr(text, ')') + 2, " "); field; field = strtok(NULL, " "), number++)
		if ((number >= 26 && number <= 28) || (number >= 45 && number <= 51))
			snprintf(out + strlen(out), size - strlen(out), "%d=%s ", number, field);
}

static void read_facts(struct facts *f)
{
	memset(f, 0, sizeof(*f));
	for (int i = 0; i < 16; i++)
		MUST(!getrlimit(i, &f->limits[i]));
	MUST(getcwd(f->cwd, sizeof(f->cwd)));
	MUST(readlink("/proc/self/exe", f->exe, sizeof(f->exe) - 1) > 0);
	slurp("/proc/self/comm", f->comm, sizeof(f->comm));
	f->arguments_size = slurp("/proc/self/cmdline", f->arguments, sizeof(f->arguments));
	f->environment_size = slurp("/proc/self/environ", f->environment, sizeof(f->environment));
	f->auxv_size = slurp("/proc/self/auxv", f->auxv, sizeof(f->auxv));
	slurp("/proc/self/oom_score_adj", f->oom, sizeof(f->oom));
	read_areas(f->stat_areas, sizeof(f->stat_areas));
	f->mask = umask(0);
	umask(f->mask);
	f->dumpable = prctl(PR_GET_DUMPABLE);
	prctl(PR_GET_PDEATHSIG, &f->death_signal);
	prctl(PR_GET_CHILD_SUBREAPER, &f->subreaper);
	f->personality_flags = personality(0xffffffff);
	f->thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	f->no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
	f->brk_now = sbrk(0);
	f->vdso = getauxval(AT_SYSINFO_EHDR);
}

static void compare(const struct facts *was, const struct facts *is)
{
	for (int i = 0; i < 16; i++)
		CHECK(was->limits[i].rlim_cur == is->limits[i].rlim_cur && was->limits[i].rlim_max == is->limits[i].rlim_max,
		      "limit %d: %lu/%lu became %lu/%lu", i, was->limits[i].rlim_cur, was->limits[i].rlim_max,
		      is->limits[i].rlim_cur, is->limits[i].rlim_max);
	CHECK(!strcmp(was->cwd, is->cwd), "cwd %s became %s", was->cwd, is->cwd);
	CHECK(!strcmp(was->exe, is->exe), "exe %s became %s", was->exe, is->exe);
	CHECK(!strcmp(was->comm, is->comm), "comm %s became %s", was->comm, is->comm);
	CHECK(was->arguments_size == is->arguments_size && !memcmp(was->arguments, is->arguments, was->arguments_size),
	      "cmdline changed: '%s' of %zu bytes became '%s' of %zu", was->arguments, was->arguments_size, is->arguments,
	      is->arguments_size);
	CHECK(was->environment_size == is->environment_size &&
	      !memcmp(was->environment, is->environment, was->environment_size), "environ changed");
	CHECK(was->auxv_size == is->auxv_size && !memcmp(was->auxv, is->auxv, was->auxv_size), "auxv changed");
	CHECK(!strcmp(was->oom, is->oom), "oom_score_adj %s became %s", was->oom, is->oom);
	CHECK(!strcmp(was->stat_areas, is->stat_areas), "areas %s became %s", was->stat_areas, is->stat_areas);
	CHECK_EQUAL(is->mask, was->mask, "umask");
	CHECK_EQUAL(is->dumpable, was->dumpable, "dumpable");
	CHECK_EQUAL(is->death_signal, was->death_signal, "parent-death signal");
	CHECK_EQUAL(is->subreaper, was->subreaper, "subreaper");
	CHECK_EQUAL(is->personality_flags, was->personality_flags, "personality");
	CHECK_EQUAL(is->thp, was->thp, "THP switch");
	CHECK_EQUAL(is->no_new_privs, was->no_new_privs, "no_new_privs");
	CHECK(was->brk_now == is->brk_now, "brk moved from %p to %p", was->brk_now, is->brk_now);
	CHECK(was->vdso == is->vdso, "vdso moved");
}

static void set_limit(int resource, rlim_t soft, rlim_t hard)
{
	struct rlimit limit;

	MUST(!getrlimit(resource, &limit));
	limit.rlim_max = limit.rlim_max < hard ? limit.rlim_max : hard;
	limit.rlim_cur = limit.rlim_max < soft ? limit.rlim_max : soft;
	MUST(!setrlimit(resource, &limit));
}

static void set_up(void)
{
	int fd;

	set_limit(RLIMIT_CORE, 4096, RLIM_INFINITY);
	set_limit(RLIMIT_NOFILE, 100, 500);
	set_limit(RLIMIT_STACK, 4 << 20, 64 << 20);
	set_limit(RLIMIT_NPROC, 5000, 6000);
	set_limit(RLIMIT_FSIZE, 1ul << 30, RLIM_INFINITY);
	umask(027);
	if (mkdir(victim_path("inside"), 0755))
		MUST(errno == EEXIST);
	MUST(!chdir(victim_path("inside")));
	MUST(!prctl(PR_SET_NAME, "od) d\n(name"));
	MUST(!prctl(PR_SET_PDEATHSIG, SIGWINCH));
	MUST(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	MUST(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(personality(PER_LINUX | ADDR_NO_RANDOMIZE) >= 0);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	MUST(fd >= 0 && write(fd, "321", 3) == 3);
	close(fd);
}

/* Through the vdso as glibc finds it: a wrong or missing vdso crashes or gives nonsense. */
static void check_clock(double before)
{
	double now = victim_now(CLOCK_MONOTONIC), again;
	struct timespec wall;
	unsigned cpu;

	CHECK(now >= before && now < before + 600, "monotonic clock went from %f to %f", before, now);
	for (int i = 0; i < 1000; i++) {
		again = victim_now(CLOCK_MONOTONIC);
		CHECK(again >= now, "monotonic clock goes backwards");
		now = again;
	}
	CHECK(!clock_gettime(CLOCK_REALTIME, &wall) && labs(wall.tv_sec - time(NULL)) <= 1, "wall clock is odd");
	CHECK(!getcpu(&cpu, NULL), "getcpu fails");
}

static void check_heap(char **old, size_t count)
{
	char *grown, *before = sbrk(0);

	for (size_t i = 0; i < count; i++) {
		CHECK(victim_filled(old[i], 4096, i), "heap block %zu changed", i);
		free(old[i]);
	}
	for (size_t i = 0; i < 200; i++) {
		grown = malloc(10000);
		CHECK(grown != NULL, "malloc fails after %zu blocks", i);
		memset(grown, 1, 10000);
	}
	CHECK((char *)sbrk(1 << 20) >= before, "brk does not grow: %s", strerror(errno));
	memset((char *)sbrk(0) - (1 << 20), 2, 1 << 20);
}

int main(int argc, char **argv)
{
	static struct facts before, after;
	char *blocks[64];
	double started;

	victim_init(argc, argv);
	set_up();
	for (size_t i = 0; i < 64; i++) {
		MUST(blocks[i] = malloc(4096));
		victim_fill(blocks[i], 4096, i);
	}
	started = victim_now(CLOCK_MONOTONIC);
	read_facts(&before);
	victim_ready();
	victim_wait();
	read_facts(&after);
	compare(&before, &after);
	check_clock(started);
	check_heap(blocks, 64);
	return victim_done();
}
