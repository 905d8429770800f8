/* Uses the C client of the software accelerator (a stand-in for hardware) for one of everything; "fine" at the end. */
#include "softaccel_do.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
	double a[4] = { 1, 2, 3, 4 }, b[4] = { 1, 0, 0, 1 }, c[4];
	char error[SA_ERROR_BYTES] = "";
	struct sa_context *context;
	uint64_t x, y, z, stream, event, number;
	int done;

	if (sa_open(argc > 1 ? argv[1] : NULL, 0, &context, error)) {
		fprintf(stderr, "%s\n", error);
		return 2;
	}
	DO(sa_alloc(context, sizeof(a), &x));
	DO(sa_alloc(context, sizeof(b), &y));
	DO(sa_alloc(context, sizeof(c), &z));
	DO(sa_stream_create(context, &stream));
	DO(sa_event_create(context, &event));
	DO(sa_copy_in(context, 0, x, a, sizeof(a), NULL));
	DO(sa_copy_in(context, stream, y, b, sizeof(b), NULL));
	DO(sa_event_record(context, stream, event));
	DO(sa_event_await(context, 0, event));
	uint64_t matmul[9] = { z, x, y, 2, 2, 2, SA_TRANSPOSE_A, sa_double(2.0), sa_double(0.0) };
	DO(sa_launch(context, 0, SA_MATMUL, SA_FLOAT64, matmul, 9, NULL));
	DO(sa_copy(context, 0, x, z, sizeof(c), NULL));
	DO(sa_copy_out(context, 0, c, x, sizeof(c), &number));
	while (sa_completed(context, 0) < number && !sa_lost(context))
		;
	DO(sa_event_wait(context, event));
	DO(sa_event_query(context, event, &done));
	DO(sa_wait(context, SA_ALL_STREAMS));
	if (!done || c[0] != 2 || c[1] != 6 || c[2] != 4 || c[3] != 8) {
		fprintf(stderr, "got %g %g %g %g\n", c[0], c[1], c[2], c[3]);
		return 1;
	}
	DO(sa_event_destroy(context, event));
	DO(sa_stream_destroy(context, stream));
	DO(sa_free(context, z));
	if (sa_free(context, z) == 0 || strstr(sa_error(context), "no buffer") == NULL)
		return 1;
	sa_close(context);
	puts("fine");
	return 0;
}
