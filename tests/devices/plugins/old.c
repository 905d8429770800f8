/* From before descriptors: functions by name, and nothing else. */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

void print_on_level(unsigned int level, const char *format, ...);

int cr_plugin_init(void);
void cr_plugin_fini(void);
int cr_plugin_dump_file(int fd, int id);
int cr_plugin_restore_file(int id);
int cr_plugin_update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd);
int cr_plugin_resume_devices_late(int pid);
int cr_plugin_post_forking(void);

int cr_plugin_init(void)
{
	print_on_level(2, "old init\n");
	return 0;
}

void cr_plugin_fini(void)
{
	print_on_level(2, "old fini\n");
}

int cr_plugin_dump_file(int fd, int id)
{
	return fd >= 0 && id == 3 ? 0 : -ENOTSUP;
}

int cr_plugin_restore_file(int id)
{
	return id == 3 ? -EBADF : -ENOTSUP;
}

int cr_plugin_update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd)
{
	(void)path, (void)addr, (void)old_pgoff, (void)new_pgoff, (void)plugin_fd;
	return 0;
}

int cr_plugin_resume_devices_late(int pid)
{
	return pid == 13 ? -1 : 5;
}

int cr_plugin_post_forking(void)
{
	return 0;
}
