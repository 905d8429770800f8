/* What a hook can see of the task that it is about. */
#ifndef TASK_STATE_H
#define TASK_STATE_H

#include <stdio.h>
#include <string.h>

/* R, S, t, T ... as /proc/PID/stat says, or - where there is no such task. */
static inline char state_of(int pid)
{
	char path[64], text[512] = "", *end;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return '-';
	end = fgets(text, sizeof(text), file) ? strrchr(text, ')') : NULL;
	fclose(file);
	return end && end[1] ? end[2] : '-';
}

#endif
