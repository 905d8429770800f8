/* A plugin that is wrong in one way, chosen by a macro: see the #ifs. */
#include <stdlib.h>

#ifndef NAME
#define NAME "odd"
#endif
#ifndef VERSION
#define VERSION 0x000200
#endif
#ifndef MAX_HOOKS
#define MAX_HOOKS 15
#endif
#ifndef TABLE
#define TABLE MAX_HOOKS
#endif

#ifdef NEEDS
extern int NEEDS(void);
#endif

#ifdef INIT_RETURNS
static int begin(int stage)
{
	(void)stage;
	return INIT_RETURNS;
}
#define INIT begin
#else
#define INIT NULL
#endif

#ifndef EMPTY
struct {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int ret);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[TABLE];
} CR_PLUGIN_DESC = { .name = NAME, .init = INIT, .version = VERSION, .max_hooks = MAX_HOOKS };
#endif

int something(void);
int something(void)
{
#ifdef NEEDS
	return NEEDS();
#else
	return 0;
#endif
}
