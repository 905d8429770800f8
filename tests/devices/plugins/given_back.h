/* What a plugin puts in the place of what it claimed: both say "given back", which the victim "claimed" looks for. */
#ifndef GIVEN_BACK_H
#define GIVEN_BACK_H

#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static const char given_back[] = "given back";

/* A socket with the words in it, or a negative errno. */
static inline int given_socket(void)
{
	static int pair[2]; /* the other end stays open here until the end */

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	return send(pair[0], given_back, sizeof(given_back), 0) == sizeof(given_back) ? pair[1] : -EIO;
}

/* A file of one page with the words in it, or a negative errno. */
static inline int given_page(void)
{
	int fd = memfd_create("new-page", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, 4096) < 0 || pwrite(fd, given_back, sizeof(given_back), 0) != sizeof(given_back))
		return -EIO;
	return fd;
}

#endif
