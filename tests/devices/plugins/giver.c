/*
 * Claims every descriptor and mapping that it is offered. Gives back sockets and pages that say "given back"; at the first
 * asking for a socket it wants to be asked again.
 */
#define _GNU_SOURCE
#include <errno.h>

#include <gpurestore-plugin.h>

#include "given_back.h"

static int begin(int stage)
{
	if (stage == CR_PLUGIN_STAGE__RESTORE && !check_and_remove_inventory_plugin("giver", 5))
		return -ENOENT;
	return 0;
}

static int dump_ext_file(int fd, int id)
{
	struct stat stat;

	(void)id;
	return fstat(fd, &stat) == 0 && S_ISSOCK(stat.st_mode) ? add_inventory_plugin("giver") : -ENOTSUP;
}

static int handle_device_vma(int fd, const struct stat *stat)
{
	(void)fd;
	return stat->st_size == 4096 ? add_inventory_plugin("giver") : -ENOTSUP;
}

static int restore_ext_file(int id, bool *retry_needed)
{
	static int asked;

	(void)id;
	if (asked++ == 0) {
		*retry_needed = true;
		return -EAGAIN;
	}
	return given_socket();
}

static int update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd)
{
	(void)addr, (void)old_pgoff;
	*new_pgoff = 0;
	*plugin_fd = given_page();
	print_on_level(3, "instead of %s: %d\n", path, *plugin_fd);
	return *plugin_fd < 0 ? -EIO : 1;
}

CR_PLUGIN_REGISTER("giver", begin, NULL)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, handle_device_vma)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, restore_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, update_vma_map)
