/*
 * Pipes and FIFOs with data in flight, their capacity and flags, half-closed ones, both ends between two tasks, and one
 * description shared by parent and child: a seek of one moves the other.
 */
#include "victim.h"

static int to_child[2], to_parent[2], lonely_read, lonely_write, full[2], fifo, packet[2], shared_file, both_ends;
static char big[40000], back[40000];

static int child_main(void *unused)
{
	char text[64] = "";

	(void)unused;
	close(to_child[1]);
	close(to_parent[0]);
	close(full[1]);
	victim_ready();
	victim_wait_quietly();
	/* What the parent wrote before the dump was in the pipe; what it writes now comes behind. */
	CHECK(read(to_child[0], text, 6) == 6 && !memcmp(text, "before", 6), "child read '%s' from the pipe", text);
	CHECK(read(to_child[0], text, 5) == 5 && !memcmp(text, "after", 5), "child read '%s' from the pipe", text);
	CHECK(lseek(shared_file, 0, SEEK_CUR) == 17, "child: shared position is %ld", (long)lseek(shared_file, 0, SEEK_CUR));
	CHECK(lseek(shared_file, 5, SEEK_SET) == 5, "child cannot seek");
	CHECK(write(to_parent[1], "answer", 6) == 6, "child cannot write to its pipe");
	return 0;
}

static int count_flags(int fd)
{
	return fcntl(fd, F_GETFL) & (O_NONBLOCK | O_DIRECT | O_ACCMODE);
}

static void set_up(void)
{
	int ends[2];

	MUST(!pipe(to_child) && !pipe2(to_parent, O_CLOEXEC));
	MUST(!pipe(ends) && write(ends[1], "last words", 10) == 10 && !close(ends[1]));
	lonely_read = ends[0]; /* no writer: data, then end of file */
	MUST(!pipe2(ends, O_NONBLOCK) && !close(ends[0]));
	lonely_write = ends[1]; /* no reader: EPIPE */
	MUST(!pipe2(full, O_NONBLOCK) && fcntl(full[1], F_SETPIPE_SZ, 65536 * 2) == 65536 * 2);
	victim_fill(big, sizeof(big), 3);
	MUST(write(full[1], big, sizeof(big)) == sizeof(big));
	MUST(!pipe2(packet, O_DIRECT) && write(packet[1], "one", 3) == 3 && write(packet[1], "two!", 4) == 4);
	MUST(!mkfifo(victim_path("fifo"), 0600));
	fifo = open(victim_path("fifo"), O_RDWR | O_CLOEXEC);
	MUST(fifo >= 0 && write(fifo, "in the fifo", 11) == 11);
	both_ends = open(victim_path("fifo"), O_RDONLY | O_NONBLOCK);
	shared_file = open(victim_path("shared.txt"), O_RDWR | O_CREAT | O_TRUNC, 0600);
	MUST(shared_file >= 0 && write(shared_file, "0123456789abcdefghij", 20) == 20 && lseek(shared_file, 2, SEEK_SET) == 2);
}

int main(int argc, char **argv)
{
	char text[64] = "";
	size_t used = 0;
	ssize_t got;
	pid_t child;

	victim_init(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	set_up();
	child = victim_child(child_main, NULL);
	close(to_child[0]);
	close(to_parent[1]);
	MUST(write(to_child[1], "before", 6) == 6);
	victim_ready();
	victim_wait();

	/* The child may have moved the shared position already, or not yet: so set it before telling the child. */
	CHECK(lseek(shared_file, 0, SEEK_CUR) == 2, "shared position is %ld", (long)lseek(shared_file, 0, SEEK_CUR));
	MUST(lseek(shared_file, 17, SEEK_SET) == 17);
	CHECK(write(to_child[1], "after", 5) == 5, "parent cannot write to its pipe");
	CHECK(read(to_parent[0], text, sizeof(text)) == 6 && !memcmp(text, "answer", 6), "parent read '%s'", text);
	CHECK(lseek(shared_file, 0, SEEK_CUR) == 5, "the child's seek is not seen: %ld", (long)lseek(shared_file, 0, SEEK_CUR));
	victim_expect_exit(child, 0);
	CHECK(read(to_parent[0], text, 1) == 0, "no end of file after the last writer is gone");
	CHECK(read(lonely_read, text, sizeof(text)) == 10 && !memcmp(text, "last words", 10), "half-closed pipe lost its data");
	CHECK(read(lonely_read, text, 1) == 0, "half-closed pipe has a writer");
	CHECK(write(lonely_write, "x", 1) == -1 && errno == EPIPE, "pipe without reader has a reader");
	CHECK_EQUAL(count_flags(lonely_write), O_NONBLOCK | O_WRONLY, "flags of a pipe end");
	CHECK_EQUAL(count_flags(full[0]), O_NONBLOCK | O_RDONLY, "flags of a pipe end");
	CHECK_EQUAL(fcntl(full[0], F_GETPIPE_SZ), 65536 * 2, "capacity of a pipe");
	while (used < sizeof(back) && (got = read(full[0], back + used, sizeof(back) - used)) > 0)
		used += got;
	CHECK(used == sizeof(back) && !memcmp(big, back, sizeof(big)), "%zu bytes of data in flight came back, or other ones", used);
	CHECK(read(full[0], text, 1) == -1 && errno == EAGAIN, "more came out of a pipe than went in");
	CHECK_EQUAL(count_flags(packet[1]), O_DIRECT | O_WRONLY, "flags of a packet pipe");
	CHECK(read(packet[0], text, sizeof(text)) == 3 && !memcmp(text, "one", 3), "first packet changed");
	CHECK(read(packet[0], text, sizeof(text)) == 4 && !memcmp(text, "two!", 4), "second packet changed");
	CHECK_EQUAL(count_flags(both_ends), O_NONBLOCK | O_RDONLY, "flags of a FIFO");
	CHECK(read(both_ends, text, sizeof(text)) == 11 && !memcmp(text, "in the fifo", 11), "FIFO lost its data");
	CHECK(write(fifo, "again", 5) == 5 && read(fifo, text, 5) == 5 && !memcmp(text, "again", 5), "FIFO does not work");
	CHECK(fcntl(fifo, F_GETFD) == FD_CLOEXEC && fcntl(both_ends, F_GETFD) == 0, "close-on-exec of FIFOs");
	return victim_done();
}
