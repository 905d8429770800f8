#ifndef GR_LAZY_INTERNAL_H
#define GR_LAZY_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>

#include "gr_internal.h"
#include "gr_lazy.h"

#define GR_PAGE_SHIFT 12
/* Address spaces that one handler can serve, forks included. */
#define GR_LAZY_MAX_MMS 65536u
/* What one read of the background brings: fits into a core's second-level cache together with its copy. */
#define GR_LAZY_CHUNK_PAGES 64u
/* The most that a fault brings in with it. */
#define GR_LAZY_WINDOW_PAGES 256u

/* ---- what the images say: written before the fork of the handler, read-only afterwards (gr_lazy_source.c) */

struct gr_lazy_run {
	uint64_t vaddr;
	uint64_t offset; /* bytes, in the file */
	uint64_t first;  /* index of the first page, counted over all runs of the task */
	uint32_t file;
	uint32_t reserved;
};

struct gr_lazy_pages { /* page indexes [first, end) */
	uint64_t first, end;
};

struct gr_lazy_segment { /* [start, end) holds what was at `origin` when the tree was dumped */
	uint64_t start, end, origin;
	uint64_t object; /* 0, or: it shows sources[object - 1], and `origin` is where the handler has that */
};

struct gr_lazy_source {
	int pid; /* 0: an object of shared memory */
	char name[40];
	int *fds;
	uint64_t nr_fds;
	struct gr_lazy_run *runs; /* ascending; one more, empty, at the end */
	uint64_t nr_runs, nr_pages;
	struct gr_lazy_span *ranges;
	uint64_t nr_ranges;
	struct gr_lazy_segment *segments; /* ranges and views; ascending */
	uint64_t nr_segments, nr_views;
	struct gr_lazy_pages *order;
	uint64_t nr_order, nr_hot;
};

int gr_lazy_source_create(const struct gr_lazy_task *task, struct gr_lazy_source **out, struct gr_error *err);
void gr_lazy_source_destroy(struct gr_lazy_source *source);
/* The first run that ends behind `address`; nr_runs if there is none. */
uint64_t gr_lazy_find_run(const struct gr_lazy_source *source, uint64_t address);
/* The run that holds page `index`. */
uint64_t gr_lazy_find_index(const struct gr_lazy_source *source, uint64_t index);
static inline uint64_t gr_lazy_run_pages(const struct gr_lazy_source *source, uint64_t run)
{
	return source->runs[run + 1].first - source->runs[run].first;
}

/* ---- memory shared by this process, the handler and the keeper */

/* Numbers are those of the descriptor table that handler and keeper share. */
struct gr_lazy_watched {
	int uffd;  /* -1: let go */
	int pid;   /* 0: a fork that made no fault yet */
	int pidfd; /* -1 where pid is 0 */
};

struct gr_lazy_shared {
	struct gr_lazy_status status;
	int keeper_pidfd;
	int control; /* to the main process; -1 when it went away */
	uint32_t nr_watched; /* atomic: entries below it are valid */
	struct gr_lazy_watched watched[GR_LAZY_MAX_MMS];
	uint32_t nr_members; /* atomic: the tasks that were restored, whether they still miss pages or not */
	struct gr_lazy_watched members[GR_LAZY_MAX_MMS];
};

/* ---- one address space that misses pages (gr_lazy_mm.c) */

struct gr_lazy_mm {
	/*
	 * Held for reading while pages are placed, for writing while events are taken from the kernel: an event must not
	 * overtake a page that was chosen before it. All who show shared memory, and all objects, have one lock together.
	 */
	pthread_rwlock_t *lock, own_lock;
	int uffd; /* -1: let go, or the task is gone */
	uint32_t number;
	const struct gr_lazy_source *source; /* never changes: a place is taken again only by a fork of the same task */
	struct gr_lazy_segment *segments; /* ascending by start */
	uint64_t nr_segments, max_segments;
	bool moved;          /* some segment is not where it was when the tree was dumped */
	uint64_t generation; /* counts events */
	uint64_t *done;      /* a bit per page: in place, or no longer wanted */
	uint64_t remaining;  /* atomic */
	uint64_t *done_bytes; /* atomic, of everybody */
	/* background, under `order_lock` */
	pthread_mutex_t order_lock;
	uint64_t next_span, next_page;
	/* hints without a lock */
	uint64_t window_end, window_pages;
};

/* What became of a page or of a piece of them. */
enum gr_lazy_outcome { GR_LAZY_PLACED, GR_LAZY_CHANGING, GR_LAZY_GONE, GR_LAZY_BROKEN };

/* `mm` was zeroed or let go. What a fork still misses is what its parent misses. 0 or -ENOMEM. */
int gr_lazy_mm_init(struct gr_lazy_mm *mm, const struct gr_lazy_source *source, int uffd);
int gr_lazy_mm_init_fork(struct gr_lazy_mm *mm, const struct gr_lazy_mm *parent, int uffd);
/* The caller holds the lock for writing in all of these. */
void gr_lazy_mm_let_go(struct gr_lazy_mm *mm);
int gr_lazy_mm_unmapped(struct gr_lazy_mm *mm, uint64_t start, uint64_t end);
void gr_lazy_mm_removed(struct gr_lazy_mm *mm, uint64_t start, uint64_t end);
int gr_lazy_mm_moved(struct gr_lazy_mm *mm, uint64_t from, uint64_t to, uint64_t bytes);
/* The caller holds the lock in all of these. */
const struct gr_lazy_segment *gr_lazy_mm_at(const struct gr_lazy_mm *mm, uint64_t address);
/* Where the page that was at `origin` is now, and up to where its neighbours follow; false: nowhere. */
bool gr_lazy_mm_where(const struct gr_lazy_mm *mm, uint64_t origin, uint64_t *address, uint64_t *bytes);
bool gr_lazy_mm_is_done(const struct gr_lazy_mm *mm, uint64_t index);
void gr_lazy_mm_set_done(struct gr_lazy_mm *mm, uint64_t index, uint64_t nr);
/* Put bytes where they belong, but for what is there already. -errno in *code when BROKEN. */
enum gr_lazy_outcome gr_lazy_mm_copy(struct gr_lazy_mm *mm, uint64_t address, uint64_t index, uint64_t nr_pages,
				     const char *bytes, int *code);
enum gr_lazy_outcome gr_lazy_mm_zero(struct gr_lazy_mm *mm, uint64_t address, uint64_t nr_pages, int *code);
void gr_lazy_mm_wake(const struct gr_lazy_mm *mm, uint64_t address, uint64_t nr_pages);
/* Whether nobody has this address space any more. Places nothing. */
bool gr_lazy_is_gone(int uffd);
void gr_lazy_lock_init(pthread_rwlock_t *lock);
/* Why nothing can be placed there now: ESRCH if it is gone, EAGAIN while an event is under way, else another errno. */
int gr_lazy_probe(int uffd);

/* ---- the handler (gr_lazy_handler.c) */

struct gr_lazy_object {
	struct gr_lazy_mm *mm; /* its pages are placed in the handler's own mapping; NULL: no object, but a task */
	uint64_t inode;
};

struct gr_lazy_handler {
	struct gr_lazy_shared *shared;
	struct gr_lazy_source **sources;
	uint64_t nr_sources;
	struct gr_lazy_options options;
	int epoll;
	int ended; /* eventfd: nothing is left to do, or something failed */
	pthread_rwlock_t shared_lock; /* see struct gr_lazy_mm; taken before mms_lock */
	struct gr_lazy_object *objects; /* by number of their source */
	pthread_mutex_t mms_lock; /* of adding */
	struct gr_lazy_mm *mms[GR_LAZY_MAX_MMS];
	uint32_t nr_mms; /* atomic */
	uint32_t nr_free; /* of them were let go */
	uint32_t nr_live; /* atomic: tasks and forks that miss pages */
	uint32_t turn;    /* atomic: whose turn it is in the background */
	int filling;      /* atomic */
	int failed;       /* atomic */
	uint64_t last_fault_ns; /* atomic */
	pthread_mutex_t record_lock;
	struct { int pid; uint64_t address; } *record;
	uint64_t nr_record, max_record;
};

_Noreturn void gr_lazy_handle(struct gr_lazy_handler *handler);
/* Serve a new address space: a task's, an object's, or that of a fork of `parent` (whose lock is held for writing). */
int gr_lazy_register(struct gr_lazy_handler *handler, const struct gr_lazy_source *source,
		     const struct gr_lazy_mm *parent, int uffd, int pid, struct gr_lazy_mm **out);
/* Whether it misses nothing any more, nor does what it shows of shared memory. */
bool gr_lazy_is_complete(const struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm);
/* Let go of an address space if it is complete, or if nobody has it any more. */
void gr_lazy_finish(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm);
/* The tree cannot get its pages any more: say why and end; the keeper kills it. */
void gr_lazy_fail(struct gr_lazy_handler *handler, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
uint64_t gr_lazy_now_ns(void);

/* ---- its threads */

struct gr_lazy_fault {
	struct gr_lazy_mm *mm;
	uint64_t address;
	int tid;
};

struct gr_lazy_worker {
	struct gr_lazy_handler *handler;
	char *buffer; /* GR_LAZY_WINDOW_PAGES */
	struct gr_lazy_fault *faults; /* taken from the kernel, not answered yet */
	uint64_t nr_faults, max_faults;
	int short_of_memory; /* how often in a row */
};

static inline uint64_t gr_lazy_at_most(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* gr_lazy_serve.c: messages of the kernel. A body of threads, and what they all need. */
void *gr_lazy_serve(void *handler);
int gr_lazy_worker_open(struct gr_lazy_worker *worker, struct gr_lazy_handler *handler);
void gr_lazy_worker_close(struct gr_lazy_worker *worker);
/* What is to be done after pages were placed, or were not; the lock is not held. True: try again. */
bool gr_lazy_again(struct gr_lazy_worker *worker, struct gr_lazy_mm *mm, enum gr_lazy_outcome outcome, int code);
void gr_lazy_nap_us(long us);
/* gr_lazy_faults.c */
void gr_lazy_answer_faults(struct gr_lazy_worker *worker);
/* Whole pages from the file into the worker's buffer; false: the tree is given up. */
bool gr_lazy_read_pages(struct gr_lazy_worker *worker, const struct gr_lazy_source *source, const struct gr_lazy_run *run,
			uint64_t index, uint64_t nr_pages);
/* gr_lazy_fill.c: a body of threads; and what a task needs at once. */
void *gr_lazy_fill(void *handler);
void gr_lazy_fill_hot(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm);

/* ---- shared memory (gr_lazy_views.c) */

/* Have the objects filled through mappings of the handler. 0 or -errno. */
int gr_lazy_objects_open(struct gr_lazy_handler *handler);
/* The page that a thread misses at an address that nobody told of: a view that was made or grew since. */
bool gr_lazy_find_view(const struct gr_lazy_handler *handler, int tid, uint64_t address, struct gr_lazy_segment *out);

#define GR_LAZY_MAX_ADVICE 64

/* Calls of madvise(2) in which threads wait for their event to be taken. */
struct gr_lazy_advice {
	uint32_t nr;
	struct { uint64_t start, end, advice; } calls[GR_LAZY_MAX_ADVICE];
};

/* The lock is held for writing in both. To be called before events are taken from an address space with views. */
void gr_lazy_note_advice(const struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm,
			 struct gr_lazy_advice *advice);
/* Follow the event in the objects that [start, end) shows. 0, or -ESRCH if nobody can tell what is becoming of them. */
int gr_lazy_views_removed(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm, const struct gr_lazy_advice *advice,
			  uint64_t start, uint64_t end);

/* ---- the keeper (gr_lazy_keeper.c) */

/* Fork it, with the same table of descriptors; its pid or -errno. */
int gr_lazy_keeper_start(struct gr_lazy_handler *handler);
/* Kill all that is known of the tree, and what it forked. Uses no memory but the stack. */
void gr_lazy_kill_tree(struct gr_lazy_shared *shared);
void gr_lazy_report(const struct gr_lazy_options *options, const char *line);

/* ---- between this process and the handler */

enum gr_lazy_word { GR_LAZY_READY, GR_LAZY_ADD, GR_LAZY_RELEASE, GR_LAZY_ANSWER, GR_LAZY_END };

struct gr_lazy_message {
	int word;
	int value; /* pid, or a positive errno in an answer */
	char text[256];
};

/* `fd` may be -1. 0 or -errno; receiving gives 1 for a message, 0 for the end of the other side. */
int gr_lazy_send(int socket, const struct gr_lazy_message *message, int fd);
int gr_lazy_receive(int socket, struct gr_lazy_message *message, int *fd);

#endif
