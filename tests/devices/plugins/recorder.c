/*
 * Has every hook, and writes each call with its arguments, one line each, to the file that its option `to` names
 * (--plugin-option recorder.to=FILE), or else $RECORDER_LOG. Hooks about a task add its state from /proc.
 *
 * Option fail=HOOK makes that hook return -EIO (init and exit are no hooks); claim=HOOK makes that one claim.
 * Compile with -DNAME='"other"' for a second one, -DCRIU_PLUGIN_VERSION=0x000200 for one without the newest hooks.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gpurestore-plugin.h>

#include "task_state.h"

#ifndef NAME
#define NAME "recorder"
#endif

static char to[4096], failing[64], claiming[64];

static void option(const char *text, const char *name, char *value, size_t bytes)
{
	char head[128];
	int length = snprintf(head, sizeof(head), "--" NAME ".%s=", name);

	if (strncmp(text, head, (size_t)length) == 0)
		snprintf(value, bytes, "%s", text + length);
}

static void read_options(void)
{
	char **argv;
	int argc;

	snprintf(to, sizeof(to), "%s", getenv("RECORDER_LOG") ?: "");
	criu_plugin_get_options(&argc, &argv);
	for (int i = 1; i < argc; i++) {
		option(argv[i], "to", to, sizeof(to));
		option(argv[i], "fail", failing, sizeof(failing));
		option(argv[i], "claim", claiming, sizeof(claiming));
	}
}

static void record(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void record(const char *format, ...)
{
	char line[1024];
	int length = snprintf(line, sizeof(line), "%s: ", NAME);
	int fd = open(to, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	va_list args;

	va_start(args, format);
	length += vsnprintf(line + length, sizeof(line) - (size_t)length - 1, format, args);
	va_end(args);
	line[length++] = '\n';
	if (fd < 0 || write(fd, line, (size_t)length) != length)
		print_on_level(1, "cannot write to %s\n", to);
	if (fd >= 0)
		close(fd);
}

static int answer(const char *hook)
{
	return strcmp(hook, failing) == 0 ? -EIO : 0;
}

static int claim(const char *hook, int value)
{
	if (strcmp(hook, failing) == 0)
		return -EIO;
	return strcmp(hook, claiming) == 0 ? value : -ENOTSUP;
}

static int begin(int stage)
{
	read_options();
	record("init %d", stage);
	return answer("init");
}

static void end(int stage, int ret)
{
	record("exit %d %d", stage, ret);
}

#define ABOUT_TASK(function, hook)                                        \
	static int function(int pid)                                      \
	{                                                                 \
		record(hook " pid=%d state=%c", pid, state_of(pid));      \
		return answer(hook);                                      \
	}                                                                 \
	CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__##function, function)

#define GLOBAL(function, hook)         \
	static int function(void)      \
	{                              \
		record(hook);          \
		return answer(hook);   \
	}                              \
	CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__##function, function)

CR_PLUGIN_REGISTER(NAME, begin, end)
ABOUT_TASK(PAUSE_DEVICES, "PAUSE_DEVICES")
ABOUT_TASK(CHECKPOINT_DEVICES, "CHECKPOINT_DEVICES")
ABOUT_TASK(DUMP_DEVICES_LATE, "DUMP_DEVICES_LATE")
ABOUT_TASK(RESUME_DEVICES_LATE, "RESUME_DEVICES_LATE")
GLOBAL(POST_FORKING, "POST_FORKING")
GLOBAL(RESTORE_INIT, "RESTORE_INIT")

static int dump_unix_sk(int fd, int id)
{
	record("DUMP_UNIX_SK fd=%d id=%d", fd >= 0, id);
	return claim("DUMP_UNIX_SK", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_UNIX_SK, dump_unix_sk)

static int restore_unix_sk(int id)
{
	record("RESTORE_UNIX_SK id=%d", id);
	return claim("RESTORE_UNIX_SK", strcmp("RESTORE_UNIX_SK", claiming) ? 0 : open("/dev/null", O_RDWR | O_CLOEXEC));
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_UNIX_SK, restore_unix_sk)

static int dump_ext_file(int fd, int id)
{
	record("DUMP_EXT_FILE fd=%d id=%d", fd >= 0, id);
	return claim("DUMP_EXT_FILE", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_ext_file)

/* Asks to be asked again the first time. */
static int restore_ext_file(int id, bool *retry_needed)
{
	static int asked;
	bool mine = strcmp("RESTORE_EXT_FILE", claiming) == 0;

	record("RESTORE_EXT_FILE id=%d", id);
	if (mine && asked++ == 0) {
		*retry_needed = true;
		return -EAGAIN;
	}
	return claim("RESTORE_EXT_FILE", mine ? open("/dev/null", O_RDWR | O_CLOEXEC) : 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, restore_ext_file)

static int dump_ext_mount(char *mountpoint, int id)
{
	record("DUMP_EXT_MOUNT %s id=%d", mountpoint, id);
	return claim("DUMP_EXT_MOUNT", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_MOUNT, dump_ext_mount)

static int restore_ext_mount(int id, char *mountpoint, char *old_root, int *is_file)
{
	record("RESTORE_EXT_MOUNT id=%d %s %s", id, mountpoint, old_root);
	*is_file = 1;
	return claim("RESTORE_EXT_MOUNT", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_MOUNT, restore_ext_mount)

static int dump_ext_link(int index, int type, char *kind)
{
	record("DUMP_EXT_LINK index=%d type=%d %s", index, type, kind);
	return claim("DUMP_EXT_LINK", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_LINK, dump_ext_link)

static int handle_device_vma(int fd, const struct stat *found)
{
	record("HANDLE_DEVICE_VMA fd=%d device=%d", fd >= 0, (found->st_mode & S_IFMT) == S_IFCHR);
	return claim("HANDLE_DEVICE_VMA", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, handle_device_vma)

static int update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd)
{
	record("UPDATE_VMA_MAP %s addr=%#lx pgoff=%#lx", path, addr, old_pgoff);
	if (strcmp("UPDATE_VMA_MAP", claiming) == 0) {
		*new_pgoff = old_pgoff + 0x1000;
		*plugin_fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	}
	return claim("UPDATE_VMA_MAP", 1);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, update_vma_map)

#if CRIU_PLUGIN_VERSION >= 0x000300
static int update_inetsk(uint32_t family, uint32_t state, uint32_t *source, uint32_t *destination)
{
	record("UPDATE_INETSK family=%u state=%u %#x %#x", family, state, source[0], destination[0]);
	source[0] = 0x0100007f;
	return claim("UPDATE_INETSK", 0);
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_INETSK, update_inetsk)

static int dump_finish(int result)
{
	record("DUMP_FINISH %d", result);
	return answer("DUMP_FINISH");
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_FINISH, dump_finish)
#endif
