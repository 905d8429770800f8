#ifndef GR_OUTSIDE_H
#define GR_OUTSIDE_H

#include <stdint.h>
#include "gr_error.h"

/* System calls about another task that Python has no wrapper for. */

/* kcmp(2): 0 equal, 1 less, 2 greater, 3 unequal without order. */
int gr_kcmp(int pid1, int pid2, int type, uint64_t idx1, uint64_t idx2, struct gr_error *err);
/* pidfd_getfd(2): a new descriptor of ours (close-on-exec) for descriptor `fd` of the task behind `pidfd`. */
int gr_pidfd_getfd(int pidfd, int fd, struct gr_error *err);
/* get_robust_list(2) */
int gr_robust_list(int tid, uint64_t *head, uint64_t *bytes, struct gr_error *err);
/* PR_SET_CHILD_SUBREAPER of this process: orphans among its descendants become its children. Returns what it was. */
int gr_set_subreaper(int on, struct gr_error *err);

#endif
