/*
 * Claims every descriptor and mapping that it is offered. Gives back sockets and pages that say "given back"; at the first
 * asking for a socket it wants to be asked again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gpurestore-plugin.h>

static const char words[] = "given back";

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
	static int asked, pair[2]; /* the other end stays open here until the end */

	(void)id;
	if (asked++ == 0) {
		*retry_needed = true;
		return -EAGAIN;
	}
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	return send(pair[0], words, sizeof(words), 0) == sizeof(words) ? pair[1] : -EIO;
}

static int update_vma_map(const char *path, uint64_t addr, uint64_t old_pgoff, uint64_t *new_pgoff, int *plugin_fd)
{
	int fd = memfd_create("new-page", MFD_CLOEXEC);

	(void)addr, (void)old_pgoff;
	print_on_level(3, "instead of %s: %d\n", path, fd);
	if (fd < 0 || ftruncate(fd, 4096) < 0 || pwrite(fd, words, sizeof(words), 0) != sizeof(words))
		return -EIO;
	*new_pgoff = 0;
	*plugin_fd = fd;
	return 1;
}

CR_PLUGIN_REGISTER("giver", begin, NULL)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, handle_device_vma)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, restore_ext_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, update_vma_map)
