#ifndef GR_PLUGIN_INTERNAL_H
#define GR_PLUGIN_INTERNAL_H

#include <signal.h>
#include <stdint.h>

#include "gr_plugin.h"

/* The C ABI of plugins; gpurestore/include/gpurestore-plugin.h says it to those who write one. */
#define GR_PLUGIN_OLD_VERSION 0x000100
#define GR_PLUGIN_OLD_HOOKS   15
#define GR_PLUGIN_MAX_HOOKS   17

enum {
	GR_HOOK_DUMP_UNIX_SK,
	GR_HOOK_RESTORE_UNIX_SK,
	GR_HOOK_DUMP_EXT_FILE,
	GR_HOOK_RESTORE_EXT_FILE,
	GR_HOOK_DUMP_EXT_MOUNT,
	GR_HOOK_RESTORE_EXT_MOUNT,
	GR_HOOK_DUMP_EXT_LINK,
	GR_HOOK_HANDLE_DEVICE_VMA,
	GR_HOOK_UPDATE_VMA_MAP,
	GR_HOOK_RESUME_DEVICES_LATE,
	GR_HOOK_PAUSE_DEVICES,
	GR_HOOK_CHECKPOINT_DEVICES,
	GR_HOOK_POST_FORKING,
	GR_HOOK_RESTORE_INIT,
	GR_HOOK_DUMP_DEVICES_LATE,
	GR_HOOK_UPDATE_INETSK,
	GR_HOOK_DUMP_FINISH,
};

extern const char *const gr_plugin_hook_names[GR_PLUGIN_MAX_HOOKS];

struct gr_plugin_descriptor {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[]; /* max_hooks of them */
};

/*
 * Between enter and leave the calling thread is inside a plugin: messages and crashes carry these names, and signal
 * handlers have a stack of their own, so that even a stack overflow is reported. The frame lives on the caller's stack.
 */
#define GR_PLUGIN_ALTSTACK 65536

struct gr_plugin_frame {
	const char *plugin;
	const char *where;
	int pid;
	int has_stack;
	stack_t stack_before;
	const struct gr_plugin_frame *outer;
	char stack[GR_PLUGIN_ALTSTACK];
};

void gr_plugin_enter(struct gr_plugin_frame *frame, const char *plugin, const char *where, int pid);
void gr_plugin_leave(struct gr_plugin_frame *frame);

/* The plugin that this thread is in, or whose code `address` is; NULL when neither is known. */
const char *gr_plugin_current(const void *address);

/* Remember which addresses are the code of a loaded plugin, under a key for forgetting them. */
void gr_plugin_note_code(const void *key, void *handle, const char *name);
void gr_plugin_forget_code(const void *key);

int gr_plugin_crash_begin(int log_fd, struct gr_error *err);
void gr_plugin_crash_end(void);

#endif
