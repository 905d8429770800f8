#ifndef GR_PLUGIN_H
#define GR_PLUGIN_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Host of device plugins written in C. There is one host in a process, between gr_plugin_host_begin and _end; the
 * symbols that plugins import (see gpurestore/include/gpurestore-plugin.h) answer from what was given to it.
 * Nothing here locks a plugin: the caller never enters one from two threads at once.
 */

/* Called for each message, from any thread. `plugin` is empty where the caller is unknown. */
typedef void (*gr_plugin_log)(int level, const char *plugin, const char *text);

/*
 * Messages above max_level are dropped unformatted. log_fd (or -1) gets the report of a crash besides stderr.
 * image_dir is what criu_get_image_dir() returns; both descriptors stay the caller's.
 */
int gr_plugin_host_begin(gr_plugin_log log, int max_level, int log_fd, int image_dir, struct gr_error *err);
void gr_plugin_host_end(void);

/* The argument vector for criu_plugin_get_options(); copied. */
int gr_plugin_host_options(const char **argv, uint32_t nr, struct gr_error *err);

/* Names that the images need, for check_and_remove_inventory_plugin(); nr < 0: the images do not say. */
int gr_plugin_host_needs(const char **names, int nr, struct gr_error *err);

/* Copy name `index` of those that plugins added (which = 0) or took off (1) into out; 0 when there is none. */
int gr_plugin_host_name(int which, uint32_t index, char *out, uint32_t out_bytes);

struct gr_plugin;

struct gr_plugin_info {
	const char *name; /* the plugin's memory */
	uint32_t version;
	uint32_t max_hooks;
	uint32_t hooks; /* bit per hook, of the first 17 */
	int generated;  /* there was no descriptor */
};

/*
 * Load the file. -ENOENT: not there. -ENOEXEC: a symbol is missing everywhere, its name is the context. -ELIBACC: dlopen
 * refused, why is the context. -ELIBBAD: neither a usable descriptor nor a function by an old hook's name.
 */
int gr_plugin_open(const char *path, struct gr_plugin **out, struct gr_plugin_info *info, struct gr_error *err);

/* Unload and free. -EBUSY: unloaded as far as we can, but its code stays in the process. */
int gr_plugin_close(struct gr_plugin *plugin, struct gr_error *err);

/* What the plugin returned; 0 without such a function. */
int gr_plugin_init(struct gr_plugin *plugin, int stage);
void gr_plugin_exit(struct gr_plugin *plugin, int stage, int result);

/* Arguments in the order of each hook's signature, by kind; what a hook writes comes back in the fields below. */
struct gr_plugin_call {
	int numbers[3];
	char *texts[2];
	uint64_t wide[2];
	uint32_t *addresses[2];
	uint64_t new_pgoff;
	int fd;
	int retry_needed;
	int is_file;
};

/* What the plugin returned; the hook must be in info.hooks. */
int gr_plugin_hook(struct gr_plugin *plugin, uint32_t hook, struct gr_plugin_call *call);

#endif
