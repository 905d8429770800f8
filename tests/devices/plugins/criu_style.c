/* Uses each host symbol of CRIU 4.2 once. HEADER may name another header with the same interface. */
#ifndef HEADER
#define HEADER "criu_style.h"
#endif
#include HEADER

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* CRIU's own header declares only the first of what it exports. */
void print_on_level(unsigned int level, const char *format, ...);
int add_inventory_plugin(const char *name);
bool check_and_remove_inventory_plugin(const char *name, size_t n);

#define NAME "criu_style"

static int begin(int stage)
{
	if (stage == 0)
		return add_inventory_plugin(NAME);
	if (stage == 2)
		print_on_level(3, "needed: %d\n", check_and_remove_inventory_plugin(NAME, strlen(NAME)));
	return 0;
}

static void end(int stage, int ret)
{
	print_on_level(2, "exit %d %d\n", stage, ret);
}

static int pause_devices(int pid)
{
	int fd = openat(criu_get_image_dir(), "criu_style.img", O_CREAT | O_WRONLY, 0600);

	if (fd < 0 || write(fd, &pid, sizeof(pid)) != sizeof(pid))
		return -EIO;
	close(fd);
	return 0;
}

static int dump_file(int fd, int id)
{
	(void)fd;
	return id == 7 ? 0 : -ENOTSUP;
}

CR_PLUGIN_REGISTER(NAME, begin, end)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__PAUSE_DEVICES, pause_devices)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_file)
