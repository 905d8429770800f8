/*
 * gpurestore-plugin.h: write a device plugin in C.
 *
 * The binary interface is the one of CRIU's plugins, versions 0.1.0 to 0.3.0, and names are the same, so that one source
 * serves both hosts. Compile with
 *
 *     cc -shared -fPIC -I$(python3 -c 'import gpurestore; print(gpurestore.include_dir())') plugin.c -o plugin.so
 *
 * and put the result in a folder that is given to gpurestore by -L. docs/plugins.md says when each hook is called.
 *
 *     static int pause_devices(int pid) { ... return 0; }
 *     CR_PLUGIN_REGISTER("mine", init, fini)
 *     CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__PAUSE_DEVICES, pause_devices)
 *
 * gpurestore never enters a plugin from two threads at the same time, but not always from the same one.
 */
#ifndef GPURESTORE_PLUGIN_H
#define GPURESTORE_PLUGIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#define CRIU_PLUGIN_GEN_VERSION(major, minor, sub) (((major) << 16) + ((minor) << 8) + (sub))

/* Define these before including the header to make a plugin that older hosts load, too. */
#ifndef CRIU_PLUGIN_VERSION
#define CRIU_PLUGIN_VERSION CRIU_PLUGIN_GEN_VERSION(0, 3, 0)
#endif

/* The place of each hook in the descriptor's table, and what is to be stored there. */
enum {
	CR_PLUGIN_HOOK__DUMP_UNIX_SK = 0,	 /* int (int fd, int id) */
	CR_PLUGIN_HOOK__RESTORE_UNIX_SK = 1,	 /* int (int id): a descriptor */
	CR_PLUGIN_HOOK__DUMP_EXT_FILE = 2,	 /* int (int fd, int id) */
	CR_PLUGIN_HOOK__RESTORE_EXT_FILE = 3,	 /* int (int id, bool *retry_needed): a descriptor */
	CR_PLUGIN_HOOK__DUMP_EXT_MOUNT = 4,	 /* int (char *mountpoint, int id) */
	CR_PLUGIN_HOOK__RESTORE_EXT_MOUNT = 5,	 /* int (int id, char *mountpoint, char *old_root, int *is_file) */
	CR_PLUGIN_HOOK__DUMP_EXT_LINK = 6,	 /* int (int index, int type, char *kind) */
	CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA = 7,	 /* int (int fd, const struct stat *) */
	CR_PLUGIN_HOOK__UPDATE_VMA_MAP = 8,	 /* int (const char *path, uint64_t addr, uint64_t old_pgoff,
						  *      uint64_t *new_pgoff, int *plugin_fd): 1 where it changed them */
	CR_PLUGIN_HOOK__RESUME_DEVICES_LATE = 9, /* int (int pid) */
	CR_PLUGIN_HOOK__PAUSE_DEVICES = 10,	 /* int (int pid) */
	CR_PLUGIN_HOOK__CHECKPOINT_DEVICES = 11, /* int (int pid) */
	CR_PLUGIN_HOOK__POST_FORKING = 12,	 /* int (void) */
	CR_PLUGIN_HOOK__RESTORE_INIT = 13,	 /* int (void) */
	CR_PLUGIN_HOOK__DUMP_DEVICES_LATE = 14,	 /* int (int pid of the root task) */
	CR_PLUGIN_HOOK__UPDATE_INETSK = 15,	 /* int (uint32_t family, uint32_t state, uint32_t *source,
						  *      uint32_t *destination); since 0.3.0 */
	CR_PLUGIN_HOOK__DUMP_FINISH = 16,	 /* int (int result); since 0.3.0 */

	CR_PLUGIN_HOOK__MAX = CRIU_PLUGIN_VERSION < CRIU_PLUGIN_GEN_VERSION(0, 3, 0) ? 15 : 17
};

/* What init and exit are told. */
enum {
	CR_PLUGIN_STAGE__DUMP = 0,
	CR_PLUGIN_STAGE__PRE_DUMP = 1,
	CR_PLUGIN_STAGE__RESTORE = 2,

	CR_PLUGIN_STAGE_MAX
};

/*
 * The host looks for a symbol CR_PLUGIN_DESC of this type. It reads max_hooks entries of the table and no more, so that a
 * plugin with a shorter table is still understood by a newer host.
 *
 * init returns 0, or the operation fails. exit is called once for each init that succeeded, with 0 or a negative errno:
 * what became of the operation.
 */
typedef struct {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[CR_PLUGIN_HOOK__MAX];
} cr_plugin_desc_t;

extern cr_plugin_desc_t CR_PLUGIN_DESC;

/* Define the descriptor; either function may be NULL. */
#define CR_PLUGIN_REGISTER(plugin_name, init_function, exit_function) \
	cr_plugin_desc_t CR_PLUGIN_DESC = {                           \
		.name = (plugin_name),                                \
		.init = (init_function),                              \
		.exit = (exit_function),                              \
		.version = CRIU_PLUGIN_VERSION,                       \
		.max_hooks = CR_PLUGIN_HOOK__MAX,                     \
	};

#define CR_PLUGIN_REGISTER_DUMMY(plugin_name) CR_PLUGIN_REGISTER(plugin_name, NULL, NULL)

/* Put a function into the descriptor's table when the plugin is loaded. */
#define CR_PLUGIN_REGISTER_HOOK(hook, function)                                            \
	__attribute__((constructor)) static void cr_plugin_register_hook_##function(void) \
	{                                                                                  \
		CR_PLUGIN_DESC.hooks[hook] = (void *)(function);                           \
	}

/* ---- what the host offers; any thread may call these between init and the end of exit */

/* A descriptor of the folder with the images, for openat(2). It stays the host's. */
int criu_get_image_dir(void);

/* Write to the host's log, under the plugin's name. Level 0 message, 1 error, 2 warning, 3 information, 4 debugging. */
void print_on_level(unsigned int level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* At dump: note that a restore of these images will need the plugin of this name. */
int add_inventory_plugin(const char *name);

/* At restore: whether the images need this plugin. Asking says that it is here: names nobody asks for end the restore. */
bool check_and_remove_inventory_plugin(const char *name, size_t n);

/*
 * All --plugin-option of the command line: "criu-plugin", then "--PLUGIN.NAME=VALUE" or "--PLUGIN.NAME" for each, then
 * NULL; ready for getopt_long(3), which must not reorder it. The strings stay the host's.
 */
int criu_plugin_get_options(int *argc, char ***argv);

#endif
