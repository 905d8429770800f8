#ifndef GR_WORKERS_H
#define GR_WORKERS_H

#include <stdint.h>
#include "gr_error.h"

/*
 * Runs `work(job, err)` in nr_threads threads, one of them the caller's, and joins them all. The first that fails wins:
 * its error is returned, and `*stop` is set, which the others are expected to poll.
 */
int gr_workers_run(uint32_t nr_threads, int (*work)(void *job, struct gr_error *err), void *job, int *stop,
		   struct gr_error *err);

#endif
