/*
 * Holds what only a device plugin can carry: a UNIX socket and a shared page of a memfd that belongs to somebody else.
 * After a restore the plugin has put "given back" into both.
 */
#include "victim.h"

#include <sys/socket.h>

int main(int argc, char **argv)
{
	char text[32] = "";
	int pair[2], fd;
	char *page;

	victim_init(argc, argv);
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	close(pair[1]);
	fd = memfd_create("claimed-page", MFD_CLOEXEC);
	MUST(fd >= 0 && ftruncate(fd, 4096) == 0);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	MUST(page != MAP_FAILED);
	strcpy(page, "before");
	close(fd);
	victim_ready();
	victim_wait();
	CHECK(recv(pair[0], text, sizeof(text) - 1, MSG_DONTWAIT) > 0, "nothing on the socket");
	CHECK(!strcmp(text, "given back"), "the socket says '%s'", text);
	CHECK(!strcmp(page, "given back"), "the page says '%s'", page);
	CHECK_EQUAL(fcntl(pair[0], F_GETFD), FD_CLOEXEC, "close-on-exec of the socket");
	return victim_done();
}
