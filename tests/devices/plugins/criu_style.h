/* A plugin interface of version 0.2.0 with CRIU's macro names and layout, written for the tests from its description. */
#ifndef CRIU_STYLE_H
#define CRIU_STYLE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

enum {
	CR_PLUGIN_HOOK__DUMP_EXT_FILE = 2,
	CR_PLUGIN_HOOK__RESTORE_EXT_FILE = 3,
	CR_PLUGIN_HOOK__RESUME_DEVICES_LATE = 9,
	CR_PLUGIN_HOOK__PAUSE_DEVICES = 10,
	CR_PLUGIN_HOOK__CHECKPOINT_DEVICES = 11,
	CR_PLUGIN_HOOK__MAX = 15
};

typedef struct {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[CR_PLUGIN_HOOK__MAX];
} cr_plugin_desc_t;

extern cr_plugin_desc_t CR_PLUGIN_DESC;

#define CR_PLUGIN_REGISTER(n, i, e) \
	cr_plugin_desc_t CR_PLUGIN_DESC = { n, i, e, 0x000200, CR_PLUGIN_HOOK__MAX, { 0 } };

#define CR_PLUGIN_REGISTER_HOOK(number, f) \
	static void __attribute__((constructor)) register_##f(void) { CR_PLUGIN_DESC.hooks[number] = (void *)f; }

int criu_get_image_dir(void);
void print_on_level(unsigned int level, const char *format, ...);
int add_inventory_plugin(const char *name);
bool check_and_remove_inventory_plugin(const char *name, unsigned long n);

#endif
