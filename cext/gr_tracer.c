/* The tracer's thread and its queue; what happens on it stands in gr_tracee.c, gr_freeze.c, gr_inject.c, gr_spawn.c. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>

#include "gr_tracer_internal.h"

/* glibc 2.35 registers an rseq area for every thread and says where it lies, relative to the thread pointer. */
extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));
#define RSEQ_SIGNATURE 0x53053053
#define RSEQ_UNREGISTER 1
#define RSEQ_BYTES 32

struct gr_tracer {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t wake; /* the thread: there is a request, or quit */
	pthread_cond_t done; /* callers: a request is done, or the place is free */
	gr_request_fn *fn;   /* the one request in work; NULL: the place is free */
	void *arg;
	struct gr_error *err;
	int result;
	bool running, finished, quit;
	struct gr_tracer_state state;
};

/* Lets go of everything: a seized task goes on as it was; a spawned one dies with this thread (PTRACE_O_EXITKILL). */
static void let_go(struct gr_tracer_state *state)
{
	struct gr_error ignored;

	while (state->nr_hosts > 0) {
		int pid = state->hosts[state->nr_hosts - 1].pid;

		/* A task that died meanwhile has nothing to leave; leaving removes the host either way. */
		gr_host_leave(state, pid, &ignored);
	}
	for (int i = state->tracees.nr - 1; i >= 0; i--) {
		struct gr_tracee *tracee = state->tracees.items[i];

		if (!tracee->spawned && tracee->stopped)
			gr_tracee_detach(state, tracee, &ignored);
	}
	while (state->tracees.nr > 0)
		gr_tracee_remove(state, state->tracees.items[0]->tid);
	free(state->tracees.items);
	free(state->hosts);
}

/*
 * A task that this thread forks inherits its rseq registration, and dies by SIGSEGV as soon as it has unmapped the
 * area and is scheduled. The thread does without. A libc that registered nothing makes the call fail, harmlessly.
 */
static void unregister_rseq(void)
{
	if (&__rseq_offset && &__rseq_size && __rseq_size)
		syscall(__NR_rseq, (char *)__builtin_thread_pointer() + __rseq_offset, RSEQ_BYTES, RSEQ_UNREGISTER,
			RSEQ_SIGNATURE);
}

static void *tracer_main(void *arg)
{
	struct gr_tracer *tracer = arg;
	uint64_t all = ~0ULL;

	unregister_rseq();
	/* The thread takes no signals, and what it forks begins with all of them blocked; libc would spare two. */
	syscall(__NR_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof(all));

	pthread_mutex_lock(&tracer->lock);
	for (;;) {
		while (!tracer->quit && (!tracer->fn || tracer->finished))
			pthread_cond_wait(&tracer->wake, &tracer->lock);
		if (tracer->quit)
			break;
		pthread_mutex_unlock(&tracer->lock);
		int result = tracer->fn(&tracer->state, tracer->arg, tracer->err);
		pthread_mutex_lock(&tracer->lock);
		tracer->result = result;
		tracer->finished = true;
		pthread_cond_broadcast(&tracer->done);
	}
	pthread_mutex_unlock(&tracer->lock);
	let_go(&tracer->state);
	return NULL;
}

int gr_tracer_call(struct gr_tracer *tracer, gr_request_fn *fn, void *arg, struct gr_error *err)
{
	int result;

	pthread_mutex_lock(&tracer->lock);
	while (tracer->fn)
		pthread_cond_wait(&tracer->done, &tracer->lock);
	tracer->fn = fn;
	tracer->arg = arg;
	tracer->err = err;
	tracer->finished = false;
	pthread_cond_signal(&tracer->wake);
	while (!tracer->finished)
		pthread_cond_wait(&tracer->done, &tracer->lock);
	result = tracer->result;
	tracer->fn = NULL;
	pthread_cond_broadcast(&tracer->done);
	pthread_mutex_unlock(&tracer->lock);
	return result;
}

int gr_tracer_create(struct gr_tracer **out, struct gr_error *err)
{
	struct gr_tracer *tracer = calloc(1, sizeof(*tracer));
	sigset_t all, before;
	int code;

	if (!tracer)
		return gr_fail(err, ENOMEM, "making the tracer");
	pthread_mutex_init(&tracer->lock, NULL);
	pthread_cond_init(&tracer->wake, NULL);
	pthread_cond_init(&tracer->done, NULL);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	code = pthread_create(&tracer->thread, NULL, tracer_main, tracer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code) {
		free(tracer);
		return gr_fail(err, code, "starting the tracer's thread");
	}
	*out = tracer;
	return 0;
}

void gr_tracer_destroy(struct gr_tracer *tracer)
{
	pthread_mutex_lock(&tracer->lock);
	tracer->quit = true;
	pthread_cond_signal(&tracer->wake);
	pthread_mutex_unlock(&tracer->lock);
	pthread_join(tracer->thread, NULL);
	pthread_mutex_destroy(&tracer->lock);
	pthread_cond_destroy(&tracer->wake);
	pthread_cond_destroy(&tracer->done);
	free(tracer);
}
