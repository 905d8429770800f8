/*
 * System call instructions in a task's own code. Two are enough to make a task run one system call and then find its
 * way back alone: `syscall; ret` and libc's signal restorer, `mov $15, %eax; syscall`.
 */
#include <inttypes.h>
#include <string.h>
#include <sys/uio.h>

#include "gr_tracer_internal.h"

#define CHUNK_BYTES 65536
#define OVERLAP 16 /* longer than any pattern, so that none is missed across two chunks */

static const uint8_t SYSCALL_RET[] = { 0x0f, 0x05, 0xc3 };
static const uint8_t SIGRETURN_LONG[] = { 0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05 };
static const uint8_t SIGRETURN_SHORT[] = { 0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05 };

struct search {
	uint64_t syscall_ret, sigreturn, plain_syscall;
};

static void look(uint64_t *found, const uint8_t *code, size_t bytes, uint64_t address, const uint8_t *pattern,
		 size_t pattern_bytes)
{
	const uint8_t *hit;

	if (*found)
		return;
	hit = memmem(code, bytes, pattern, pattern_bytes);
	if (hit)
		*found = address + (uint64_t)(hit - code);
}

static void search_range(int pid, uint64_t start, uint64_t end, struct search *s)
{
	uint8_t code[CHUNK_BYTES];

	for (uint64_t at = start; at < end && !(s->syscall_ret && s->sigreturn); at += CHUNK_BYTES - OVERLAP) {
		size_t want = end - at < CHUNK_BYTES ? end - at : CHUNK_BYTES;
		struct iovec local = { code, want }, remote = { (void *)at, want };
		ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);

		if (got <= 0)
			return;
		look(&s->syscall_ret, code, got, at, SYSCALL_RET, sizeof(SYSCALL_RET));
		look(&s->sigreturn, code, got, at, SIGRETURN_LONG, sizeof(SIGRETURN_LONG));
		look(&s->sigreturn, code, got, at, SIGRETURN_SHORT, sizeof(SIGRETURN_SHORT));
		look(&s->plain_syscall, code, got, at, SYSCALL_RET, 2);
	}
}

/* libc has both patterns, and a program may have tens of megabytes of other code in front of it. */
static bool is_likely(const char *maps_line)
{
	return strstr(maps_line, "/libc") || strstr(maps_line, "musl");
}

static int search_maps(int pid, bool likely, struct search *s, struct gr_error *err)
{
	char line[512];
	FILE *maps;

	snprintf(line, sizeof(line), "/proc/%d/maps", pid);
	maps = fopen(line, "re");
	if (!maps)
		return gr_fail(err, errno, "opening %s", line);
	while (fgets(line, sizeof(line), maps) && !(s->syscall_ret && s->sigreturn)) {
		uint64_t start, end;
		char prot[5];

		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &start, &end, prot) != 3 || prot[0] != 'r' ||
		    prot[2] != 'x' || strstr(line, "[vsyscall]") || is_likely(line) != likely)
			continue;
		search_range(pid, start, end, s);
	}
	fclose(maps);
	return 0;
}

int gr_find_gadgets(int pid, uint64_t *syscall_ret, uint64_t *sigreturn, uint64_t *plain_syscall, struct gr_error *err)
{
	struct search s = { 0 };
	int ret = search_maps(pid, true, &s, err);

	if (ret == 0)
		ret = search_maps(pid, false, &s, err);
	if (ret < 0)
		return ret;
	*syscall_ret = s.syscall_ret;
	*sigreturn = s.sigreturn;
	*plain_syscall = s.plain_syscall;
	if (!s.plain_syscall)
		return gr_fail(err, ENOEXEC, "task %d has no system call instruction in its code", pid);
	return 0;
}
