/* DO(call): a call of the C client that must succeed, in a function with a variable context; it returns 1 if not. */
#ifndef SOFTACCEL_DO_H
#define SOFTACCEL_DO_H

#include "softaccel.h"

#include <stdio.h>

#define DO(call)                                                                          \
	do {                                                                              \
		int result = (call);                                                      \
		if (result) {                                                             \
			fprintf(stderr, "%s: %d %s\n", #call, result, sa_error(context)); \
			return 1;                                                         \
		}                                                                         \
	} while (0)

#endif
