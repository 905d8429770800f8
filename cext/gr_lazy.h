#ifndef GR_LAZY_H
#define GR_LAZY_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Lazy restore: the tree runs while its memory comes. A process of its own, the handler, answers page faults through
 * userfaultfd and fills the rest in the background; a second one, the keeper, shares the handler's table of descriptors,
 * so that nothing is let go when the handler dies: it then kills the tree, which must never see zeros instead of its
 * pages. Both are forks of this process that run C only.
 */
struct gr_lazy;

/* Addresses [start, end). */
struct gr_lazy_span {
	uint64_t start;
	uint64_t end;
};

/* A mapping that shows shared memory: tasks[object] is that, and `at` is where this process has what `start` shows. */
struct gr_lazy_view {
	uint64_t start;
	uint64_t end;
	uint64_t at;
	uint64_t object;
};

/*
 * What one task takes lazily. `entries` say which pages are where: nr_pages from page_offsets of the file fds[files] on
 * belong at vaddrs; what lies outside of `ranges` (the mappings that will be registered, ascending) is left out.
 * `order` are addresses in the order of first need: the first nr_hot spans are in place before gr_lazy_add returns. What
 * no span names is not filled in the background, so the last ones should be all of `ranges`.
 *
 * With pid 0 it is an object of shared memory: its addresses are those where this process has mapped all of it, which is
 * the only range, and the handler, a fork of this process, fills it there. Tasks show it in their `views`.
 */
struct gr_lazy_task {
	int pid;
	uint64_t shmid; /* names the object in messages */
	const int *fds;
	uint64_t nr_fds;
	const uint64_t *vaddrs;
	const uint64_t *nr_pages;
	const uint64_t *page_offsets;
	const uint32_t *files;
	uint64_t nr_entries;
	const struct gr_lazy_span *ranges;
	uint64_t nr_ranges;
	const struct gr_lazy_view *views;
	uint64_t nr_views;
	const struct gr_lazy_span *order;
	uint64_t nr_order;
	uint64_t nr_hot;
};

struct gr_lazy_options {
	uint32_t nr_threads;  /* as many serve faults, and as many fill */
	uint32_t wait_for_ms; /* fill only after so long without a fault; 0: at once */
	const int *report_fds; /* where the handler and the keeper say, in one line, what became of them */
	uint64_t nr_report_fds;
	int log_fd;            /* takes one line when all memory is in place; -1: nobody asked */
	int record_fd;         /* takes the faults, one line each, in the order of their coming; -1: nobody asked */
};

enum gr_lazy_state { GR_LAZY_WAITING, GR_LAZY_FILLING, GR_LAZY_FILLED, GR_LAZY_ENDED, GR_LAZY_FAILED };

struct gr_lazy_status {
	uint64_t done_bytes;  /* in place, or no longer wanted */
	uint64_t total_bytes; /* grows with every fork of a task that still misses pages */
	uint64_t lost_bytes;  /* of done_bytes: the task that missed them ended, or ran another program */
	uint64_t nr_faults;
	uint64_t released_ns; /* CLOCK_MONOTONIC */
	uint64_t filled_ns;
	int state;
	int handler_pid;
	int keeper_pid;
	char message[256];
};

/* 0 if this process may let tasks be served by userfaultfd, events included; else -errno. Changes nothing. */
int gr_lazy_check(struct gr_error *err);
/*
 * Start handler and keeper. The arrays are not needed afterwards. All descriptors but those named are closed there.
 * Call it while no other thread of this process creates threads or loads libraries.
 */
int gr_lazy_start(const struct gr_lazy_task *tasks, uint64_t nr_tasks, const struct gr_lazy_options *options,
		  struct gr_lazy **out, struct gr_error *err);
/* Hand over the userfaultfd of a task, whose ranges are registered. Its faults are served from now on. */
int gr_lazy_add(struct gr_lazy *lazy, int pid, int uffd, int *cancel, struct gr_error *err);
/* The tree runs: fill. From now on the handler lives on without us; before, our end is its own and that of the tasks. */
int gr_lazy_release(struct gr_lazy *lazy, struct gr_error *err);
/* A descriptor that becomes readable when the handler has ended. */
int gr_lazy_fd(const struct gr_lazy *lazy);
void gr_lazy_read(const struct gr_lazy *lazy, struct gr_lazy_status *out);
/* Before the release: waits until the handler has ended. After it: only lets go. */
void gr_lazy_destroy(struct gr_lazy *lazy);

#endif
