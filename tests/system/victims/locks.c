/*
 * File locks: flock (belongs to the description), POSIX record locks (belong to the process), open-file-description locks.
 * A child tries to take each of them after the restore: it must be told who holds them.
 */
#include "victim.h"
#include <sys/file.h>

static int flocked, shared_flock, records, ofd;

static int open_file(const char *name)
{
	int fd = open(victim_path(name), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	MUST(fd >= 0 && !ftruncate(fd, 1000));
	return fd;
}

static struct flock record(short type, off_t start, off_t length)
{
	return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length };
}

static void expect_record(const char *name, off_t start, pid_t holder, short type)
{
	int fd = open_file(name);
	struct flock probe = record(F_WRLCK, start, 1);

	CHECK(!fcntl(fd, F_GETLK, &probe), "F_GETLK on %s: %s", name, strerror(errno));
	CHECK(probe.l_type == type && (type == F_UNLCK || probe.l_pid == holder),
	      "byte %ld of %s: lock type %d held by %d, wanted type %d held by %d", (long)start, name, probe.l_type,
	      probe.l_pid, type, holder);
	close(fd);
}

static int child_main(void *unused)
{
	int fd;

	(void)unused;
	victim_ready();
	victim_wait_quietly();
	fd = open_file("flocked");
	CHECK(flock(fd, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the exclusive flock is gone");
	close(fd);
	fd = open_file("shared");
	CHECK(flock(fd, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the shared flock is gone");
	CHECK(!flock(fd, LOCK_SH | LOCK_NB), "the shared flock became exclusive");
	close(fd);
	expect_record("records", 10, getppid(), F_WRLCK);
	expect_record("records", 19, getppid(), F_WRLCK);
	expect_record("records", 20, 0, F_UNLCK);
	expect_record("records", 500, getppid(), F_RDLCK);
	expect_record("ofd", 3, -1, F_WRLCK);
	/* The description is shared with the parent: unlocking here unlocks there. */
	CHECK(!flock(flocked, LOCK_UN), "the inherited flock cannot be given up: %s", strerror(errno));
	fd = open_file("flocked");
	CHECK(!flock(fd, LOCK_EX | LOCK_NB), "the flock belongs to another description than the inherited one");
	return 0;
}

int main(int argc, char **argv)
{
	struct flock lock = record(F_WRLCK, 10, 10);
	pid_t child;

	victim_init(argc, argv);
	flocked = open_file("flocked");
	MUST(!flock(flocked, LOCK_EX));
	shared_flock = open_file("shared");
	MUST(!flock(shared_flock, LOCK_SH));
	records = open_file("records");
	MUST(!fcntl(records, F_SETLK, &lock));
	lock = record(F_RDLCK, 400, 0);
	MUST(!fcntl(records, F_SETLK, &lock));
	ofd = open_file("ofd");
	lock = record(F_WRLCK, 0, 5);
	MUST(!fcntl(ofd, F_OFD_SETLK, &lock));
	child = victim_child(child_main, NULL);
	victim_ready();
	victim_wait();
	victim_expect_exit(child, 0);
	return victim_done();
}
