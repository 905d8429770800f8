/*
 * Who is in a plugin right now, and what is said when a signal ends the process there: which plugin, which hook, which
 * task. The handler only writes; then whatever would have happened without it happens.
 */
#include <dlfcn.h>
#include <link.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ucontext.h>

#include "gr_internal.h"
#include "gr_plugin_internal.h"

#define MAX_CODE 64

struct code {
	const void *key;
	uintptr_t start, end;
	char name[64];
};

static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGTRAP };
#define NR_SIGNALS (sizeof(signals) / sizeof(signals[0]))

static struct sigaction before[NR_SIGNALS];
static int installed;
static int report_fd = -1;
static struct code codes[MAX_CODE]; /* written while no plugin runs, or one entry at a time by the loading thread */

/* Initial-exec: a handler must not be the first to touch it, which would allocate. */
static __thread const struct gr_plugin_frame *current __attribute__((tls_model("initial-exec")));

const char *const gr_plugin_hook_names[GR_PLUGIN_MAX_HOOKS] = {
	"DUMP_UNIX_SK",	      "RESTORE_UNIX_SK", "DUMP_EXT_FILE",     "RESTORE_EXT_FILE",    "DUMP_EXT_MOUNT",
	"RESTORE_EXT_MOUNT",  "DUMP_EXT_LINK",	 "HANDLE_DEVICE_VMA", "UPDATE_VMA_MAP",	     "RESUME_DEVICES_LATE",
	"PAUSE_DEVICES",      "CHECKPOINT_DEVICES", "POST_FORKING",   "RESTORE_INIT",	     "DUMP_DEVICES_LATE",
	"UPDATE_INETSK",      "DUMP_FINISH",
};

void gr_plugin_enter(struct gr_plugin_frame *frame, const char *plugin, const char *where, int pid)
{
	stack_t stack = { .ss_sp = frame->stack, .ss_size = sizeof(frame->stack) };

	frame->plugin = plugin;
	frame->where = where;
	frame->pid = pid;
	frame->outer = current;
	frame->has_stack = sigaltstack(NULL, &frame->stack_before) == 0 &&
			   (frame->stack_before.ss_flags & SS_DISABLE) && sigaltstack(&stack, NULL) == 0;
	current = frame;
}

void gr_plugin_leave(struct gr_plugin_frame *frame)
{
	current = frame->outer;
	if (frame->has_stack)
		sigaltstack(&frame->stack_before, NULL);
}

static const char *owner_of(uintptr_t address)
{
	for (int i = 0; i < MAX_CODE; i++)
		if (codes[i].key && address >= codes[i].start && address < codes[i].end)
			return codes[i].name;
	return NULL;
}

const char *gr_plugin_current(const void *address)
{
	return current ? current->plugin : owner_of((uintptr_t)address);
}

static int measure(struct dl_phdr_info *info, size_t size, void *opaque)
{
	struct code *code = opaque;

	(void)size;
	if (info->dlpi_addr != code->start)
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];

		if (part->p_type == PT_LOAD && info->dlpi_addr + part->p_vaddr + part->p_memsz > code->end)
			code->end = info->dlpi_addr + part->p_vaddr + part->p_memsz;
	}
	return 1;
}

void gr_plugin_note_code(const void *key, void *handle, const char *name)
{
	struct link_map *map = NULL;
	struct code code = { .key = key };

	if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0)
		return;
	code.start = map->l_addr;
	if (dl_iterate_phdr(measure, &code) == 0)
		return;
	strncpy(code.name, name, sizeof(code.name) - 1);
	for (int i = 0; i < MAX_CODE; i++) {
		if (!codes[i].key) {
			codes[i] = code;
			return;
		}
	}
}

void gr_plugin_forget_code(const void *key)
{
	for (int i = 0; i < MAX_CODE; i++)
		if (codes[i].key == key)
			codes[i].key = NULL;
}

/* ---- in the handler: nothing but stores and write(2) */

struct text {
	size_t used;
	char bytes[512];
};

static void add(struct text *text, const char *more)
{
	while (*more && text->used < sizeof(text->bytes) - 1)
		text->bytes[text->used++] = *more++;
}

static void add_number(struct text *text, uint64_t value, unsigned int base)
{
	char digits[24];
	int at = sizeof(digits) - 1;

	digits[at] = 0;
	do {
		digits[--at] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	add(text, digits + at);
}

static const char *signal_name(int number)
{
	switch (number) {
	case SIGSEGV:
		return "SIGSEGV";
	case SIGBUS:
		return "SIGBUS";
	case SIGILL:
		return "SIGILL";
	case SIGFPE:
		return "SIGFPE";
	case SIGABRT:
		return "SIGABRT";
	case SIGSYS:
		return "SIGSYS";
	default:
		return "SIGTRAP";
	}
}

static void compose(struct text *text, int number, const siginfo_t *info, const char *owner)
{
	add(text, "gpurestore: plugin ");
	if (current) {
		add(text, current->plugin);
		add(text, " crashed in ");
		add(text, current->where);
		if (current->pid) {
			add(text, " of pid ");
			add_number(text, (uint64_t)current->pid, 10);
		}
	} else {
		add(text, owner);
		add(text, " crashed in a thread of its own");
	}
	add(text, ": ");
	add(text, signal_name(number));
	if (number == SIGSEGV || number == SIGBUS) {
		add(text, " at address 0x");
		add_number(text, (uint64_t)info->si_addr, 16);
	}
	add(text, "; this is a fault of the plugin\n");
}

static void put(int fd, const struct text *text)
{
	ssize_t ignored = fd >= 0 ? write(fd, text->bytes, text->used) : 0;

	(void)ignored;
}

static void on_crash(int number, siginfo_t *info, void *opaque)
{
	const ucontext_t *context = opaque;
	const char *owner = owner_of((uintptr_t)context->uc_mcontext.gregs[REG_RIP]);
	int saved = errno;

	if (current || owner) {
		struct text text = { 0 };

		compose(&text, number, info, owner);
		put(STDERR_FILENO, &text);
		if (report_fd != STDERR_FILENO)
			put(report_fd, &text);
	}
	for (size_t i = 0; i < NR_SIGNALS; i++)
		if (signals[i] == number)
			sigaction(number, &before[i], NULL);
	errno = saved;
	raise(number); /* blocked until we return; then as if we had never been here */
}

int gr_plugin_crash_begin(int log_fd, struct gr_error *err)
{
	struct sigaction action = { .sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	report_fd = log_fd;
	if (installed)
		return 0;
	sigemptyset(&action.sa_mask);
	for (size_t i = 0; i < NR_SIGNALS; i++)
		if (sigaction(signals[i], &action, &before[i]) < 0)
			return gr_fail(err, errno, "watching for signal %d", signals[i]);
	installed = 1;
	return 0;
}

void gr_plugin_crash_end(void)
{
	for (size_t i = 0; installed && i < NR_SIGNALS; i++) {
		struct sigaction now;

		/* Somebody who put a handler over ours keeps it. */
		if (sigaction(signals[i], NULL, &now) == 0 && now.sa_sigaction == on_crash)
			sigaction(signals[i], &before[i], NULL);
	}
	installed = 0;
	report_fd = -1;
}
