#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "gr_internal.h"
#include "gr_workers.h"

#define MAX_THREADS 256

struct crew {
	int (*work)(void *job, struct gr_error *err);
	void *job;
	int *stop;
	pthread_mutex_t lock; /* of what follows */
	int result;
	struct gr_error error;
};

static void *run_one(void *opaque)
{
	struct crew *crew = opaque;
	struct gr_error error = { 0 };
	int ret = crew->work(crew->job, &error);

	if (ret < 0) {
		pthread_mutex_lock(&crew->lock);
		if (crew->result == 0) {
			crew->result = ret;
			crew->error = error;
		}
		pthread_mutex_unlock(&crew->lock);
		__atomic_store_n(crew->stop, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

int gr_workers_run(uint32_t nr_threads, int (*work)(void *job, struct gr_error *err), void *job, int *stop,
		   struct gr_error *err)
{
	struct crew crew = { .work = work, .job = job, .stop = stop, .lock = PTHREAD_MUTEX_INITIALIZER };
	pthread_t threads[MAX_THREADS];
	uint32_t started = 0;
	sigset_t all, before;

	/* Signals belong to the caller's thread: a worker must not take them. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Fewer threads than asked for are slower, not wrong. */
	while (started + 1 < nr_threads && started < MAX_THREADS &&
	       pthread_create(&threads[started], NULL, run_one, &crew) == 0)
		started++;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	run_one(&crew);
	for (uint32_t i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
	if (crew.result < 0)
		*err = crew.error;
	return crew.result;
}
