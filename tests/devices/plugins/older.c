/*
 * From before descriptors, with every hook of that time that a live tree can reach: writes each call to $RECORDER_LOG,
 * claims UNIX sockets and one page, and gives back ones that say "given back".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "given_back.h"
#include "task_state.h"

int add_inventory_plugin(const char *name);

int cr_plugin_init(void);
void cr_plugin_fini(void);
int cr_plugin_dump_unix_sk(int fd, int id);
int cr_plugin_restore_unix_sk(int id);
int cr_plugin_handle_device_vma(int fd, const struct stat *stat);
int cr_plugin_update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd);
int cr_plugin_pause_devices(int pid);
int cr_plugin_checkpoint_devices(int pid);
int cr_plugin_restore_init(void);
int cr_plugin_post_forking(void);
int cr_plugin_resume_devices_late(int pid);

static int record(const char *hook, int pid)
{
	char line[128];
	int fd = open(getenv("RECORDER_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	int length = pid ? snprintf(line, sizeof(line), "%s pid=%d state=%c\n", hook, pid, state_of(pid)) :
			   snprintf(line, sizeof(line), "%s\n", hook);
	int ret = write(fd, line, (size_t)length) == length ? 0 : -EIO;

	close(fd);
	return ret;
}

int cr_plugin_init(void)
{
	return record("init", 0);
}

void cr_plugin_fini(void)
{
	record("fini", 0);
}

int cr_plugin_dump_unix_sk(int fd, int id)
{
	struct stat stat;

	(void)id;
	if (fstat(fd, &stat) || !S_ISSOCK(stat.st_mode))
		return -ENOTSUP;
	return record("dump_unix_sk", 0) || add_inventory_plugin("older") ? -EIO : 0;
}

int cr_plugin_restore_unix_sk(int id)
{
	(void)id;
	return record("restore_unix_sk", 0) ?: given_socket();
}

int cr_plugin_handle_device_vma(int fd, const struct stat *stat)
{
	(void)fd;
	return stat->st_size == 4096 ? record("handle_device_vma", 0) : -ENOTSUP;
}

int cr_plugin_update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd)
{
	(void)path, (void)addr, (void)old_pgoff;
	*new_pgoff = 0;
	*plugin_fd = given_page();
	return record("update_vma_map", 0) || *plugin_fd < 0 ? -EIO : 1;
}

int cr_plugin_pause_devices(int pid)
{
	return record("pause_devices", pid);
}

int cr_plugin_checkpoint_devices(int pid)
{
	return record("checkpoint_devices", pid);
}

int cr_plugin_restore_init(void)
{
	return record("restore_init", 0);
}

int cr_plugin_post_forking(void)
{
	return record("post_forking", 0);
}

int cr_plugin_resume_devices_late(int pid)
{
	return record("resume_devices_late", pid);
}
