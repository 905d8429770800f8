/*
 * Mappings of files: private without copied pages, private with some, shared, past an offset, of a file that is unlinked
 * since, past the end of the file, of /dev/zero.
 */
#include "victim.h"
#include <setjmp.h>

#define PAGE 4096ul

static sigjmp_buf after_fault;

static void on_bus(int number)
{
	siglongjmp(after_fault, number);
}

static int make_file(const char *name, size_t pages, uint64_t seed)
{
	static char page[PAGE];
	int fd = open(victim_path(name), O_RDWR | O_CREAT | O_TRUNC, 0644);

	MUST(fd >= 0);
	for (size_t i = 0; i < pages; i++) {
		victim_fill(page, PAGE, seed + i);
		MUST(write(fd, page, PAGE) == PAGE);
	}
	return fd;
}

static char *map(int fd, size_t pages, int protection, int flags, size_t page_offset)
{
	char *memory = mmap(NULL, pages * PAGE, protection, flags, fd, page_offset * PAGE);

	MUST(memory != MAP_FAILED);
	return memory;
}

static void check_pages(const char *what, const char *memory, size_t from, size_t to, uint64_t seed)
{
	for (size_t i = from; i < to; i++)
		CHECK(victim_filled(memory + i * PAGE, PAGE, seed + i), "%s: page %zu changed", what, i);
}

static char *clean, *copied, *shared, *offset, *gone, *beyond, *read_only, *zero;

static void prepare(void)
{
	int fd, shared_fd, gone_fd;

	fd = make_file("private.data", 32, 100);
	clean = map(fd, 32, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	copied = map(fd, 32, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	for (size_t i = 0; i < 32; i += 3)
		victim_fill(copied + i * PAGE, PAGE, 5000 + i);
	offset = map(fd, 4, PROT_READ, MAP_PRIVATE, 8);
	read_only = map(fd, 32, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	victim_fill(read_only + PAGE, PAGE, 6001); /* as a relocated, then protected data segment */
	MUST(!mprotect(read_only, 32 * PAGE, PROT_READ));
	close(fd);
	shared_fd = make_file("shared.data", 16, 200);
	shared = map(shared_fd, 16, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	victim_fill(shared + 3 * PAGE, PAGE, 7003);
	close(shared_fd);
	gone_fd = make_file("gone.data", 8, 300);
	gone = map(gone_fd, 8, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	victim_fill(gone + 2 * PAGE, PAGE, 8002);
	close(gone_fd);
	MUST(!unlink(victim_path("gone.data")));
	fd = make_file("short.data", 2, 400);
	beyond = map(fd, 6, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	close(fd);
	fd = open("/dev/zero", O_RDWR);
	MUST(fd >= 0);
	zero = map(fd, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
	close(fd);
	victim_fill(zero + PAGE, PAGE, 9001);
}

static void check(void)
{
	struct sigaction action = { .sa_handler = on_bus };
	char page[PAGE];
	int fd;

	check_pages("clean", clean, 0, 32, 100);
	for (size_t i = 0; i < 32; i++)
		CHECK(victim_filled(copied + i * PAGE, PAGE, (i % 3 ? 100 : 5000) + i), "copied: page %zu changed", i);
	for (size_t i = 0; i < 4; i++)
		CHECK(victim_filled(offset + i * PAGE, PAGE, 108 + i), "offset: page %zu changed", i);
	CHECK(victim_filled(read_only, PAGE, 100) && victim_filled(read_only + PAGE, PAGE, 6001), "read-only changed");
	CHECK(victim_filled(shared, PAGE, 200) && victim_filled(shared + 3 * PAGE, PAGE, 7003), "shared changed");
	/* A store through the shared mapping still reaches the file. */
	victim_fill(shared + 5 * PAGE, PAGE, 7005);
	fd = open(victim_path("shared.data"), O_RDONLY);
	CHECK(fd >= 0 && pread(fd, page, PAGE, 5 * PAGE) == PAGE && victim_filled(page, PAGE, 7005),
	      "a store through the shared mapping does not reach the file");
	close(fd);
	CHECK(victim_filled(gone, PAGE, 300) && victim_filled(gone + 2 * PAGE, PAGE, 8002), "unlinked file's mapping changed");
	CHECK(access(victim_path("gone.data"), F_OK), "the unlinked file came back");
	CHECK(victim_filled(beyond + PAGE, PAGE, 401), "short file's mapping changed");
	MUST(!sigaction(SIGBUS, &action, NULL));
	if (!sigsetjmp(after_fault, 1)) {
		page[0] = *(volatile char *)(beyond + 4 * PAGE);
		CHECK(0, "no SIGBUS past the end of the file");
	}
	CHECK(victim_zero(zero, PAGE) && victim_filled(zero + PAGE, PAGE, 9001), "/dev/zero mapping changed");
}

int main(int argc, char **argv)
{
	return victim_main(argc, argv, prepare, check);
}
