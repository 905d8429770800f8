/* Files of the fake driver, which are how its processes see each other. */
#include "fake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

const char *folder(void)
{
	const char *dir = getenv("FAKE_CUDA_DIR");
	return dir ? dir : "/nonexistent";
}

void name_of(char *out, size_t size, const char *dir, int pid, const char *what)
{
	snprintf(out, size, "%s/%d.%s", dir, pid, what);
}

void pause_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

int read_text(const char *path, char *out, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, out, size - 1);
	close(fd);
	out[n > 0 ? n : 0] = 0;
	return n > 0 ? 0 : -1;
}

void write_text(const char *path, const char *text)
{
	char other[4200];
	snprintf(other, sizeof other, "%s.%ld", path, syscall(SYS_gettid));
	int fd = open(other, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		perror("fake_libcuda");
	close(fd);
	rename(other, path);
}
