/*
 * Descriptors of files: position, access mode, flags, close-on-exec, high and sparse numbers, unlinked files, directories,
 * the usual character devices, eventfds, memfds, and two descriptions of one file next to two descriptors of one.
 */
#include "victim.h"
#include <sys/eventfd.h>

enum { NR = 14 };

static struct kept {
	const char *what;
	int fd, flags, close_on_exec;
	off_t position;
	struct stat status;
} kept[NR];

static int nr_kept;

static int keep(const char *what, int fd)
{
	struct kept *k = &kept[nr_kept++];

	MUST(fd >= 0 && nr_kept <= NR);
	k->what = what;
	k->fd = fd;
	k->flags = fcntl(fd, F_GETFL);
	k->close_on_exec = fcntl(fd, F_GETFD);
	k->position = lseek(fd, 0, SEEK_CUR);
	MUST(!fstat(fd, &k->status));
	return fd;
}

static int make(const char *name, const char *text, int flags, mode_t mode)
{
	int fd = open(victim_path(name), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);

	MUST(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
	fd = open(victim_path(name), flags);
	MUST(fd >= 0);
	return fd;
}

static void check_text(const char *what, int fd, off_t at, const char *wanted)
{
	char text[256] = "";
	ssize_t got = pread(fd, text, sizeof(text) - 1, at);

	CHECK(got >= 0 && !strcmp(text, wanted), "%s holds '%s', wanted '%s'", what, text, wanted);
}

static void compare(const struct kept *k)
{
	struct stat status;

	CHECK(fcntl(k->fd, F_GETFL) == k->flags, "%s: flags %#o became %#o", k->what, k->flags, fcntl(k->fd, F_GETFL));
	CHECK(fcntl(k->fd, F_GETFD) == k->close_on_exec, "%s: close-on-exec %d became %d", k->what, k->close_on_exec,
	      fcntl(k->fd, F_GETFD));
	CHECK(lseek(k->fd, 0, SEEK_CUR) == k->position, "%s: position %ld became %ld", k->what, (long)k->position,
	      (long)lseek(k->fd, 0, SEEK_CUR));
	CHECK(!fstat(k->fd, &status) && status.st_mode == k->status.st_mode && status.st_size == k->status.st_size &&
	      status.st_uid == k->status.st_uid && status.st_gid == k->status.st_gid &&
	      status.st_rdev == k->status.st_rdev, "%s: file is another one: mode %#o size %ld, was %#o %ld", k->what,
	      status.st_mode, (long)status.st_size, k->status.st_mode, (long)k->status.st_size);
}

static int count_descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static int plain, same, other, append, gone, directory, null, zero, random_fd, event, semaphore, path_only;
static int nr_before;

static void prepare(void)
{
	plain = make("plain.txt", "0123456789", O_RDWR, 0644);
	MUST(lseek(plain, 4, SEEK_SET) == 4);
	same = dup3(plain, 900, O_CLOEXEC);
	other = open(victim_path("plain.txt"), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	append = make("append.txt", "first", O_WRONLY | O_APPEND, 0600);
	gone = make("gone.txt", "still here", O_RDWR, 0640);
	MUST(lseek(gone, 3, SEEK_SET) == 3 && !unlink(victim_path("gone.txt")));
	MUST(!mkdir(victim_path("some"), 0750));
	directory = open(victim_path("some"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	null = dup2(open("/dev/null", O_RDWR), 300);
	zero = open("/dev/zero", O_RDONLY);
	random_fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	event = eventfd(77, EFD_CLOEXEC | EFD_NONBLOCK);
	semaphore = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK);
	path_only = open(victim_path("plain.txt"), O_PATH | O_CLOEXEC);
	keep("plain", plain);
	keep("dup of plain", same);
	keep("second open of plain", other);
	keep("append", append);
	keep("unlinked file", gone);
	keep("directory", directory);
	keep("/dev/null", null);
	keep("/dev/zero", zero);
	keep("/dev/urandom", random_fd);
	keep("O_PATH", path_only);
	nr_before = count_descriptors();
}

static void check(void)
{
	char text[64] = "";
	uint64_t value = 0;
	ssize_t got;

	CHECK_EQUAL(count_descriptors(), nr_before, "number of open descriptors");
	for (int i = 0; i < nr_kept; i++)
		compare(&kept[i]);
	check_text("plain", plain, 0, "0123456789");
	check_text("unlinked file", gone, 0, "still here");
	CHECK(access(victim_path("gone.txt"), F_OK), "the unlinked file came back");
	MUST(lseek(plain, 7, SEEK_SET) == 7);
	CHECK_EQUAL(lseek(same, 0, SEEK_CUR), 7, "position of the dup");
	CHECK_EQUAL(lseek(other, 0, SEEK_CUR), 0, "position of the second open");
	CHECK(write(append, " second", 7) == 7, "appending fails");
	append = open(victim_path("append.txt"), O_RDONLY | O_CLOEXEC);
	check_text("append", append, 0, "first second");
	CHECK(write(gone, "HERE", 4) == 4, "writing to the unlinked file fails");
	check_text("unlinked file", gone, 0, "stiHEREere");
	CHECK(read(event, &value, 8) == 8 && value == 77, "eventfd holds %lu", (long)value);
	CHECK(read(event, &value, 8) == -1 && errno == EAGAIN, "eventfd blocks or holds more");
	CHECK(read(semaphore, &value, 8) == 8 && value == 1, "semaphore eventfd gave %lu", (long)value);
	CHECK(read(semaphore, &value, 8) == 8 && read(semaphore, &value, 8) == 8, "semaphore eventfd is not at 3");
	CHECK(fcntl(event, F_GETFD) == FD_CLOEXEC && fcntl(semaphore, F_GETFD) == 0, "close-on-exec of eventfds");
	CHECK(read(zero, text, 8) == 8 && victim_zero(text, 8), "/dev/zero does not give zeros");
	CHECK(write(null, "x", 1) == 1 && read(null, text, 1) == 0, "/dev/null is another device");
	got = read(random_fd, text, 16);
	CHECK(got == 16, "/dev/urandom gives %zd bytes", got);
	CHECK(!unlinkat(directory, "nothing", 0) || errno == ENOENT, "directory descriptor: %s", strerror(errno));
	CHECK(read(path_only, text, 1) == -1 && errno == EBADF, "O_PATH descriptor can be read");
}

int main(int argc, char **argv)
{
	return victim_main(argc, argv, prepare, check);
}
