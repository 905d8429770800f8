/*
 * Loading plugins and calling their hooks. gr_plugin_symbols.c holds what plugins call back, gr_plugin_crash.c what
 * happens when one dies by a signal.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "gr_internal.h"
#include "gr_plugin_internal.h"

struct gr_plugin {
	void *handle;
	char *path;
	char *name;
	struct gr_plugin_descriptor *desc;
	struct gr_plugin_descriptor *generated; /* ours to free */
};

/* What plugins from before descriptors call their hooks. */
static const char *const old_names[GR_PLUGIN_OLD_HOOKS] = {
	[GR_HOOK_DUMP_UNIX_SK] = "cr_plugin_dump_unix_sk",
	[GR_HOOK_RESTORE_UNIX_SK] = "cr_plugin_restore_unix_sk",
	[GR_HOOK_DUMP_EXT_FILE] = "cr_plugin_dump_file",
	[GR_HOOK_RESTORE_EXT_FILE] = "cr_plugin_restore_file",
	[GR_HOOK_DUMP_EXT_MOUNT] = "cr_plugin_dump_ext_mount",
	[GR_HOOK_RESTORE_EXT_MOUNT] = "cr_plugin_restore_ext_mount",
	[GR_HOOK_DUMP_EXT_LINK] = "cr_plugin_dump_ext_link",
	[GR_HOOK_HANDLE_DEVICE_VMA] = "cr_plugin_handle_device_vma",
	[GR_HOOK_UPDATE_VMA_MAP] = "cr_plugin_update_vma_map",
	[GR_HOOK_RESUME_DEVICES_LATE] = "cr_plugin_resume_devices_late",
	[GR_HOOK_PAUSE_DEVICES] = "cr_plugin_pause_devices",
	[GR_HOOK_CHECKPOINT_DEVICES] = "cr_plugin_checkpoint_devices",
	[GR_HOOK_POST_FORKING] = "cr_plugin_post_forking",
	[GR_HOOK_RESTORE_INIT] = "cr_plugin_restore_init",
	[GR_HOOK_DUMP_DEVICES_LATE] = "cr_plugin_dump_devices_late",
};

static const char *base_name(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

/* dlopen's own complaint, or only the symbol's name where that is what is missing: the caller asks other questions. */
static int open_failed(const char *message, struct gr_error *err)
{
	static const char marker[] = "undefined symbol: ";
	const char *symbol = message ? strstr(message, marker) : NULL;

	if (!symbol)
		return gr_fail(err, ELIBACC, "%s", message ? message : "dlopen gives no reason");
	symbol += sizeof(marker) - 1;
	return gr_fail(err, ENOEXEC, "%.*s", (int)strcspn(symbol, ", \t("), symbol);
}

static struct gr_plugin_descriptor *generate(void *handle)
{
	struct gr_plugin_descriptor *desc = calloc(1, sizeof(*desc) + GR_PLUGIN_MAX_HOOKS * sizeof(void *));
	bool any = false;

	if (!desc)
		return NULL;
	desc->version = GR_PLUGIN_OLD_VERSION;
	desc->max_hooks = GR_PLUGIN_OLD_HOOKS;
	for (uint32_t i = 0; i < GR_PLUGIN_OLD_HOOKS; i++) {
		desc->hooks[i] = dlsym(handle, old_names[i]);
		any |= desc->hooks[i] != NULL;
	}
	/* These take no arguments; what they are given besides is in registers that they do not look at. */
	*(void **)&desc->init = dlsym(handle, "cr_plugin_init");
	*(void **)&desc->exit = dlsym(handle, "cr_plugin_fini");
	if (any || desc->init)
		return desc;
	free(desc);
	return NULL;
}

/* Whether the descriptor lies within its symbol. A stripped size (0) proves nothing. */
static int check_descriptor(const struct gr_plugin_descriptor *desc, struct gr_error *err)
{
	ElfW(Sym) *symbol = NULL;
	Dl_info info;
	uint64_t need = sizeof(*desc);

	if (dladdr1(desc, &info, (void **)&symbol, RTLD_DL_SYMENT) == 0)
		symbol = NULL;
	if (symbol && symbol->st_size > 0 && symbol->st_size < need)
		return gr_fail(err, ELIBBAD, "CR_PLUGIN_DESC has %lu bytes, too few for a descriptor", symbol->st_size);
	/* One that will be refused for its number of hooks need not have room for them. */
	if (desc->max_hooks <= GR_PLUGIN_MAX_HOOKS)
		need += desc->max_hooks * sizeof(void *);
	if (symbol && symbol->st_size > 0 && symbol->st_size < need)
		return gr_fail(err, ELIBBAD, "CR_PLUGIN_DESC has %lu bytes, too few for %u hooks", symbol->st_size,
			       desc->max_hooks);
	if (!desc->name || !desc->name[0])
		return gr_fail(err, ELIBBAD, "CR_PLUGIN_DESC has no name");
	return 0;
}

static char *name_from_path(const char *path)
{
	char *name = strdup(base_name(path));
	char *suffix = name ? strstr(name, ".so") : NULL;

	if (suffix && suffix != name)
		*suffix = 0;
	return name;
}

static int find_entry(struct gr_plugin *plugin, struct gr_error *err)
{
	int ret;

	plugin->desc = dlsym(plugin->handle, "CR_PLUGIN_DESC");
	if (plugin->desc) {
		ret = check_descriptor(plugin->desc, err);
		if (ret < 0)
			return ret;
		plugin->name = strdup(plugin->desc->name);
	} else {
		plugin->desc = plugin->generated = generate(plugin->handle);
		if (!plugin->desc)
			return gr_fail(err, ELIBBAD, "neither CR_PLUGIN_DESC nor a function by the name of a hook");
		plugin->name = name_from_path(plugin->path);
	}
	return plugin->name ? 0 : gr_fail(err, ENOMEM, "loading %s", plugin->path);
}

static void describe(const struct gr_plugin *plugin, struct gr_plugin_info *info)
{
	const struct gr_plugin_descriptor *desc = plugin->desc;

	*info = (struct gr_plugin_info){
		.name = plugin->name,
		.version = desc->version,
		.max_hooks = desc->max_hooks,
		.generated = plugin->generated != NULL,
	};
	if (desc->max_hooks > GR_PLUGIN_MAX_HOOKS)
		return;
	for (uint32_t i = 0; i < desc->max_hooks; i++)
		if (desc->hooks[i])
			info->hooks |= 1u << i;
}

static void discard(struct gr_plugin *plugin)
{
	gr_plugin_forget_code(plugin);
	if (plugin->handle)
		dlclose(plugin->handle);
	free(plugin->generated);
	free(plugin->name);
	free(plugin->path);
	free(plugin);
}

int gr_plugin_open(const char *path, struct gr_plugin **out, struct gr_plugin_info *info, struct gr_error *err)
{
	struct gr_plugin_frame frame;
	struct gr_plugin *plugin;
	int ret;

	if (access(path, F_OK) < 0)
		return gr_fail(err, errno, "%s", path);
	plugin = calloc(1, sizeof(*plugin));
	if (!plugin)
		return gr_fail(err, ENOMEM, "loading %s", path);
	plugin->path = strdup(path);
	if (!plugin->path) {
		free(plugin);
		return gr_fail(err, ENOMEM, "loading %s", path);
	}
	/* All symbols now: one that is missing must not show up in the middle of a dump. Constructors run here. */
	gr_plugin_enter(&frame, base_name(path), "loading", 0);
	plugin->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	ret = plugin->handle ? 0 : open_failed(dlerror(), err);
	gr_plugin_leave(&frame);
	if (ret == 0)
		ret = find_entry(plugin, err);
	if (ret < 0) {
		discard(plugin);
		return ret;
	}
	gr_plugin_note_code(plugin, plugin->handle, plugin->name);
	describe(plugin, info);
	*out = plugin;
	return 0;
}

int gr_plugin_close(struct gr_plugin *plugin, struct gr_error *err)
{
	struct gr_plugin_frame frame;
	char *path = strdup(plugin->path);
	void *left;

	gr_plugin_enter(&frame, base_name(path ? path : ""), "unloading", 0);
	discard(plugin);
	gr_plugin_leave(&frame);
	left = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : NULL;
	free(path);
	if (!left)
		return 0;
	dlclose(left);
	return gr_fail(err, EBUSY, "it stays in memory after dlclose");
}

int gr_plugin_init(struct gr_plugin *plugin, int stage)
{
	struct gr_plugin_frame frame;
	int ret;

	if (!plugin->desc->init)
		return 0;
	gr_plugin_enter(&frame, plugin->name, "init", 0);
	ret = plugin->desc->init(stage);
	gr_plugin_leave(&frame);
	return ret;
}

void gr_plugin_exit(struct gr_plugin *plugin, int stage, int result)
{
	struct gr_plugin_frame frame;

	if (!plugin->desc->exit)
		return;
	gr_plugin_enter(&frame, plugin->name, "exit", 0);
	plugin->desc->exit(stage, result);
	gr_plugin_leave(&frame);
}

/* A hook's function, called with arguments of the types that follow. */
#define CALL(types, ...) (((int(*) types)function)(__VA_ARGS__))

static int handle_device_vma(void *function, int fd)
{
	struct stat stat;

	if (fstat(fd, &stat) < 0)
		return -errno;
	return CALL((int, const struct stat *), fd, &stat);
}

static int restore_ext_file(void *function, struct gr_plugin_call *c)
{
	bool retry = false;
	int ret = CALL((int, bool *), c->numbers[0], &retry);

	c->retry_needed = retry;
	return ret;
}

static int update_vma_map(void *function, struct gr_plugin_call *c)
{
	c->new_pgoff = c->wide[1];
	c->fd = -1;
	return CALL((const char *, uint64_t, uint64_t, uint64_t *, int *), c->texts[0], c->wide[0], c->wide[1],
		    &c->new_pgoff, &c->fd);
}

static int call_hook(void *function, uint32_t hook, struct gr_plugin_call *c)
{
	const int *n = c->numbers;

	switch (hook) {
	case GR_HOOK_DUMP_UNIX_SK:
	case GR_HOOK_DUMP_EXT_FILE:
		return CALL((int, int), n[0], n[1]);
	case GR_HOOK_RESTORE_EXT_FILE:
		return restore_ext_file(function, c);
	case GR_HOOK_DUMP_EXT_MOUNT:
		return CALL((char *, int), c->texts[0], n[0]);
	case GR_HOOK_RESTORE_EXT_MOUNT:
		return CALL((int, char *, char *, int *), n[0], c->texts[0], c->texts[1], &c->is_file);
	case GR_HOOK_DUMP_EXT_LINK:
		return CALL((int, int, char *), n[0], n[1], c->texts[0]);
	case GR_HOOK_HANDLE_DEVICE_VMA:
		return handle_device_vma(function, n[0]);
	case GR_HOOK_UPDATE_VMA_MAP:
		return update_vma_map(function, c);
	case GR_HOOK_POST_FORKING:
	case GR_HOOK_RESTORE_INIT:
		return CALL((void), );
	case GR_HOOK_UPDATE_INETSK:
		return CALL((uint32_t, uint32_t, uint32_t *, uint32_t *), (uint32_t)n[0], (uint32_t)n[1],
			    c->addresses[0], c->addresses[1]);
	default: /* RESTORE_UNIX_SK, and all that take a pid or a result */
		return CALL((int), n[0]);
	}
}

int gr_plugin_hook(struct gr_plugin *plugin, uint32_t hook, struct gr_plugin_call *call)
{
	const struct gr_plugin_descriptor *desc = plugin->desc;
	bool about_pid = hook == GR_HOOK_PAUSE_DEVICES || hook == GR_HOOK_CHECKPOINT_DEVICES ||
			 hook == GR_HOOK_RESUME_DEVICES_LATE || hook == GR_HOOK_DUMP_DEVICES_LATE;
	struct gr_plugin_frame frame;
	int ret;

	if (hook >= desc->max_hooks || hook >= GR_PLUGIN_MAX_HOOKS || !desc->hooks[hook])
		return -ENOTSUP;
	gr_plugin_enter(&frame, plugin->name, gr_plugin_hook_names[hook], about_pid ? call->numbers[0] : 0);
	ret = call_hook(desc->hooks[hook], hook, call);
	gr_plugin_leave(&frame);
	return ret;
}
