#include <sys/prctl.h>
#include <sys/syscall.h>

#include "gr_internal.h"
#include "gr_outside.h"

int gr_kcmp(int pid1, int pid2, int type, uint64_t idx1, uint64_t idx2, struct gr_error *err)
{
	long ret = syscall(__NR_kcmp, pid1, pid2, type, idx1, idx2);

	if (ret < 0)
		return gr_fail(err, errno, "comparing tasks %d and %d (kcmp type %d)", pid1, pid2, type);
	return (int)ret;
}

int gr_pidfd_getfd(int pidfd, int fd, struct gr_error *err)
{
	long ret = syscall(__NR_pidfd_getfd, pidfd, fd, 0);

	if (ret < 0)
		return gr_fail(err, errno, "getting descriptor %d of the task", fd);
	return (int)ret;
}

int gr_robust_list(int tid, uint64_t *head, uint64_t *bytes, struct gr_error *err)
{
	if (syscall(__NR_get_robust_list, tid, head, bytes) < 0)
		return gr_fail(err, errno, "reading the robust list of task %d", tid);
	return 0;
}

int gr_set_subreaper(int on, struct gr_error *err)
{
	int before = 0;

	if (prctl(PR_GET_CHILD_SUBREAPER, &before) < 0 || prctl(PR_SET_CHILD_SUBREAPER, on) < 0)
		return gr_fail(err, errno, "becoming the reaper of orphaned tasks");
	return before;
}
