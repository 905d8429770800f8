#ifndef GR_ERROR_H
#define GR_ERROR_H

/* What was being done when a call returned negative errno. Filled by the callee, only on failure. */
#define GR_ERROR_CONTEXT 256

struct gr_error {
	int code; /* positive errno */
	char context[256];
};

#endif
