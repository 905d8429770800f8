/*
 * Memory that tasks share: anonymous (inherited, seen through different windows, one end unmapped), memfd with seals both
 * open and mapped, /dev/shm both linked and unlinked. Stores of one task must be seen by the other after the restore.
 */
#include "victim.h"

#define PAGE 4096ul

static char shm_name[64];
static volatile char *anonymous, *window, *memfd_memory, *linked, *unlinked;
static int memfd;

/* After the test's folder, so that the test can clear away what a killed victim leaves. */
static void name_shm(void)
{
	char folder[PATH_MAX], *slash;

	strcpy(folder, victim_folder);
	slash = strrchr(folder, '/');
	*slash = 0;
	slash = strrchr(folder, '/');
	snprintf(shm_name, sizeof(shm_name), "/dev/shm/%.40s-%d", slash ? slash + 1 : "victim", getpid());
}

static char *map_shared(int fd, size_t pages, size_t page_offset)
{
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd,
			    page_offset * PAGE);

	MUST(memory != MAP_FAILED);
	return memory;
}

static void wait_byte(volatile char *where, char wanted)
{
	for (int i = 0; i < 10000 && *where != wanted; i++)
		victim_nap(1);
	CHECK(*where == wanted, "byte %p is %d, wanted %d: not shared any more", (void *)where, *where, wanted);
}

static int child_main(void *unused)
{
	(void)unused;
	/* The child looks through a smaller window only: the kernel object is larger than what it maps. */
	MUST(!munmap((void *)anonymous, 8 * PAGE));
	window = anonymous + 8 * PAGE;
	victim_ready();
	victim_wait_quietly();
	CHECK(victim_filled((void *)(window + PAGE), PAGE, 29), "child: anonymous page 9 changed");
	wait_byte(&window[0], 'p');
	window[1] = 'c';
	wait_byte(&memfd_memory[0], 'p');
	memfd_memory[1] = 'c';
	wait_byte(&linked[0], 'p');
	linked[1] = 'c';
	wait_byte(&unlinked[0], 'p');
	unlinked[1] = 'c';
	return 0;
}

static pid_t child;

static void prepare(void)
{
	int fd;

	anonymous = map_shared(-1, 16, 0);
	for (size_t i = 0; i < 16; i += 3)
		victim_fill((void *)(anonymous + i * PAGE), PAGE, 20 + i);
	memfd = memfd_create("a name with spaces", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	MUST(memfd >= 0 && !ftruncate(memfd, 8 * PAGE));
	memfd_memory = map_shared(memfd, 8, 0);
	victim_fill((void *)(memfd_memory + 2 * PAGE), PAGE, 42);
	MUST(!fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	MUST(lseek(memfd, 12345, SEEK_SET) == 12345);
	name_shm();
	fd = open(shm_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	MUST(fd >= 0 && !ftruncate(fd, 4 * PAGE));
	linked = map_shared(fd, 4, 0);
	victim_fill((void *)(linked + PAGE), PAGE, 51);
	close(fd);
	strcat(shm_name, "-u");
	fd = open(shm_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	MUST(fd >= 0 && !ftruncate(fd, 4 * PAGE) && !unlink(shm_name));
	shm_name[strlen(shm_name) - 2] = 0;
	unlinked = map_shared(fd, 4, 0);
	victim_fill((void *)(unlinked + PAGE), PAGE, 61);
	close(fd);
	child = victim_child(child_main, NULL);
}

static void check(void)
{
	static char page[PAGE];
	struct stat status;
	int seals;

	for (size_t i = 0; i < 16; i++)
		if (i != 8)
			CHECK(i % 3 ? victim_zero((void *)(anonymous + i * PAGE), PAGE)
				    : victim_filled((void *)(anonymous + i * PAGE), PAGE, 20 + i),
			      "anonymous shared page %zu changed", i);
	CHECK(victim_filled((void *)(memfd_memory + 2 * PAGE), PAGE, 42), "memfd's memory changed");
	CHECK(victim_filled((void *)(linked + PAGE), PAGE, 51), "/dev/shm file's memory changed");
	CHECK(victim_filled((void *)(unlinked + PAGE), PAGE, 61), "unlinked /dev/shm file's memory changed");
	anonymous[8 * PAGE] = memfd_memory[0] = linked[0] = unlinked[0] = 'p';
	wait_byte(&anonymous[8 * PAGE + 1], 'c');
	wait_byte(&memfd_memory[1], 'c');
	wait_byte(&linked[1], 'c');
	wait_byte(&unlinked[1], 'c');
	victim_expect_exit(child, 0);
	seals = fcntl(memfd, F_GET_SEALS);
	CHECK_EQUAL(seals, F_SEAL_SHRINK | F_SEAL_GROW, "seals");
	CHECK(ftruncate(memfd, 9 * PAGE) == -1 && errno == EPERM, "a sealed memfd can grow");
	CHECK_EQUAL(lseek(memfd, 0, SEEK_CUR), 12345, "position of the memfd");
	CHECK(!fstat(memfd, &status) && status.st_size == 8 * (off_t)PAGE, "size of the memfd is %ld", (long)status.st_size);
	CHECK(pread(memfd, page, PAGE, 2 * PAGE) == (ssize_t)PAGE && victim_filled(page, PAGE, 42), "memfd's content changed");
	memset(page, 0, sizeof(page));
	snprintf(page, sizeof(page), "/proc/self/fd/%d", memfd);
	CHECK(readlink(page, page + 100, 200) > 0 && !strncmp(page + 100, "/memfd:a name with spaces", 25),
	      "the memfd is called '%s'", page + 100);
	CHECK(!unlink(shm_name), "the /dev/shm file is gone");
}

int main(int argc, char **argv)
{
	return victim_main(argc, argv, prepare, check);
}
