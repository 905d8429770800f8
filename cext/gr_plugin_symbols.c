/*
 * What plugins import from their host, by CRIU's names. The only symbols of this library that others can see; the
 * library is made global before the first plugin is loaded.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "gr_internal.h"
#include "gr_plugin_internal.h"

#define EXPORT	__attribute__((visibility("default")))
#define MESSAGE 4096

EXPORT int criu_get_image_dir(void);
EXPORT void print_on_level(unsigned int level, const char *format, ...) __attribute__((format(printf, 2, 3)));
EXPORT int add_inventory_plugin(const char *name);
EXPORT bool check_and_remove_inventory_plugin(const char *name, size_t n);
EXPORT int criu_plugin_get_options(int *argc, char ***argv);

struct names {
	char **items;
	uint32_t nr;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static struct names added, taken, needed, options;
static bool needs_known;
static int image_dir = -1;
static gr_plugin_log log_to;
static int log_level = -1;

static void clear(struct names *names)
{
	for (uint32_t i = 0; i < names->nr; i++)
		free(names->items[i]);
	free(names->items);
	*names = (struct names){ 0 };
}

static int append(struct names *names, const char *name)
{
	char **items = realloc(names->items, (names->nr + 2) * sizeof(*items));
	char *copy = strdup(name);

	if (items)
		names->items = items;
	if (!items || !copy) {
		free(copy);
		return -ENOMEM;
	}
	items[names->nr++] = copy;
	items[names->nr] = NULL;
	return 0;
}

static int fill(struct names *names, const char **from, uint32_t nr, struct gr_error *err)
{
	int ret = 0;

	pthread_mutex_lock(&lock);
	clear(names);
	for (uint32_t i = 0; ret == 0 && i < nr; i++)
		ret = append(names, from[i]);
	pthread_mutex_unlock(&lock);
	return ret < 0 ? gr_fail(err, -ret, "copying names for plugins") : 0;
}

static int make_global(struct gr_error *err)
{
	Dl_info self;
	void *handle;

	if (dladdr((void *)criu_get_image_dir, &self) == 0)
		return gr_fail(err, ELIBACC, "finding the core's own file");
	handle = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
	if (!handle)
		return gr_fail(err, ELIBACC, "making the core's symbols visible: %s", dlerror());
	dlclose(handle); /* Python holds it for good */
	return 0;
}

int gr_plugin_host_begin(gr_plugin_log log, int max_level, int log_fd, int dir, struct gr_error *err)
{
	int ret = make_global(err);

	if (ret == 0)
		ret = gr_plugin_crash_begin(log_fd, err);
	if (ret < 0)
		return ret;
	pthread_mutex_lock(&lock);
	clear(&added);
	clear(&taken);
	clear(&needed);
	clear(&options);
	needs_known = false;
	image_dir = dir;
	pthread_mutex_unlock(&lock);
	__atomic_store_n(&log_level, max_level, __ATOMIC_RELAXED);
	__atomic_store_n(&log_to, log, __ATOMIC_RELEASE);
	return 0;
}

void gr_plugin_host_end(void)
{
	__atomic_store_n(&log_to, (gr_plugin_log)NULL, __ATOMIC_RELEASE);
	gr_plugin_crash_end();
	pthread_mutex_lock(&lock);
	image_dir = -1;
	pthread_mutex_unlock(&lock);
}

int gr_plugin_host_options(const char **argv, uint32_t nr, struct gr_error *err)
{
	return fill(&options, argv, nr, err);
}

int gr_plugin_host_needs(const char **names, int nr, struct gr_error *err)
{
	needs_known = nr >= 0;
	return fill(&needed, names, nr < 0 ? 0 : (uint32_t)nr, err);
}

int gr_plugin_host_name(int which, uint32_t index, char *out, uint32_t out_bytes)
{
	const struct names *names = which == 0 ? &added : &taken;
	int found;

	pthread_mutex_lock(&lock);
	found = index < names->nr;
	if (found)
		snprintf(out, out_bytes, "%s", names->items[index]);
	pthread_mutex_unlock(&lock);
	return found;
}

/* ---- called by plugins, from whatever thread */

int criu_get_image_dir(void)
{
	return image_dir;
}

void print_on_level(unsigned int level, const char *format, ...)
{
	gr_plugin_log log = __atomic_load_n(&log_to, __ATOMIC_ACQUIRE);
	const char *plugin = gr_plugin_current(__builtin_return_address(0));
	char text[MESSAGE];
	int saved = errno;
	va_list args;

	if (log && (int)level <= __atomic_load_n(&log_level, __ATOMIC_RELAXED)) {
		va_start(args, format);
		errno = saved; /* a format may hold %m */
		vsnprintf(text, sizeof(text), format, args);
		va_end(args);
		log((int)level, plugin ? plugin : "", text);
	}
	errno = saved;
}

int add_inventory_plugin(const char *name)
{
	int ret = 0;

	pthread_mutex_lock(&lock);
	for (uint32_t i = 0; i < added.nr; i++)
		if (strcmp(added.items[i], name) == 0)
			ret = 1;
	if (ret == 0)
		ret = append(&added, name);
	pthread_mutex_unlock(&lock);
	return ret < 0 ? -1 : 0;
}

bool check_and_remove_inventory_plugin(const char *name, size_t n)
{
	bool found = !needs_known;

	pthread_mutex_lock(&lock);
	for (uint32_t i = 0; i < needed.nr; i++) {
		if (strncmp(needed.items[i], name, n) != 0 || strlen(needed.items[i]) > n)
			continue;
		append(&taken, needed.items[i]);
		free(needed.items[i]);
		needed.items[i] = needed.items[--needed.nr];
		found = true;
		break;
	}
	pthread_mutex_unlock(&lock);
	return found;
}

int criu_plugin_get_options(int *argc, char ***argv)
{
	static char name[] = "criu-plugin";
	static char *none[] = { name, NULL };

	pthread_mutex_lock(&lock);
	*argc = options.nr ? (int)options.nr : 1;
	*argv = options.nr ? options.items : none;
	pthread_mutex_unlock(&lock);
	return 0;
}
