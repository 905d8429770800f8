#ifndef GR_INTERNAL_H
#define GR_INTERNAL_H

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "gr_error.h"

#define GR_PAGE_BYTES 4096UL

/* Fill `err` with what was being done and return -code; `return gr_fail(err, errno, "reading %s", path)`. */
__attribute__((format(printf, 3, 4))) static inline int gr_fail(struct gr_error *err, int code, const char *fmt, ...)
{
	va_list args;

	if (code <= 0)
		code = EIO;
	err->code = code;
	va_start(args, fmt);
	vsnprintf(err->context, sizeof(err->context), fmt, args);
	va_end(args);
	return -code;
}

static inline void gr_close_fd(const int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

/* /proc/PID/`name`, opened with `flags`; or -errno. */
static inline int gr_open_of_task(int pid, const char *name, int flags, struct gr_error *err)
{
	char path[48];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, flags | O_CLOEXEC);
	return fd < 0 ? gr_fail(err, errno, "opening %s", path) : fd;
}

/* Whether whoever waits for a long call wants it to end; `cancel` may be NULL. */
static inline int gr_is_cancelled(const int *cancel)
{
	return cancel && __atomic_load_n(cancel, __ATOMIC_ACQUIRE);
}

#define GR_CLOSE __attribute__((cleanup(gr_close_fd)))

#endif
