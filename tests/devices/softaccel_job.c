/* A job on the software accelerator (a stand-in for hardware) with its C client: softaccel_job ADDRESS FOLDER STEPS.
 *
 * Adds 1 to numbers on the device once per step, waits for it in every way that there is, appends a byte to
 * FOLDER/progress.0, and in the end compares what it has with what it must have: FOLDER/done.0 says "right".
 */
#define _GNU_SOURCE
#include "softaccel_do.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NR = 1000, BALLAST_BYTES = 1 << 20 };

static double ones[NR], sums[NR];
static unsigned char ballast[BALLAST_BYTES], back[BALLAST_BYTES];

/* Addresses on the device, and what orders the work there. */
struct device {
	uint64_t ones, sums, ballast, stream, event;
};

static int progress_file(const char *folder, const char *name)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	return open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
}

static int prepare(struct sa_context *context, struct device *device)
{
	for (int i = 0; i < NR; i++)
		ones[i] = 1;
	for (int i = 0; i < BALLAST_BYTES; i++)
		ballast[i] = (unsigned char)(i * 2654435761u >> 24);
	DO(sa_alloc(context, sizeof(ones), &device->ones));
	DO(sa_alloc(context, sizeof(sums), &device->sums));
	DO(sa_alloc(context, sizeof(ballast), &device->ballast));
	DO(sa_stream_create(context, &device->stream));
	DO(sa_event_create(context, &device->event));
	DO(sa_copy_in(context, 0, device->ones, ones, sizeof(ones), NULL));
	DO(sa_copy_in(context, 0, device->sums, sums, sizeof(sums), NULL));
	DO(sa_copy_in(context, 0, device->ballast, ballast, sizeof(ballast), NULL));
	DO(sa_wait(context, SA_ALL_STREAMS));
	return 0;
}

static int do_step(struct sa_context *context, const struct device *device, int step)
{
	uint64_t busy[1] = { 2000000 }, axpy[4] = { device->sums, device->ones, NR, sa_double(1.0) }, number;

	DO(sa_launch(context, device->stream, SA_BUSY, SA_FLOAT64, busy, 1, NULL));
	DO(sa_launch(context, device->stream, SA_AXPY, SA_FLOAT64, axpy, 4, &number));
	DO(sa_event_record(context, device->stream, device->event));
	if (step % 3 == 0)
		DO(sa_wait(context, SA_ALL_STREAMS));
	else if (step % 3 == 1)
		DO(sa_event_wait(context, device->event));
	else
		while (sa_completed(context, device->stream) < number && !sa_lost(context))
			;
	return 0;
}

static int check_results(struct sa_context *context, const struct device *device, int steps)
{
	DO(sa_copy_out(context, 0, sums, device->sums, sizeof(sums), NULL));
	DO(sa_copy_out(context, 0, back, device->ballast, sizeof(back), NULL));
	DO(sa_wait(context, SA_ALL_STREAMS));
	for (int i = 0; i < NR; i++) {
		if (sums[i] != steps) {
			fprintf(stderr, "sum %d is %g, not %d\n", i, sums[i], steps);
			return 1;
		}
	}
	if (memcmp(ballast, back, sizeof(back))) {
		fputs("the ballast has changed\n", stderr);
		return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	char error[SA_ERROR_BYTES] = "";
	struct sa_context *context;
	struct device device;
	int steps, progress, done;

	if (argc < 4 || sa_open(argv[1], 0, &context, error)) {
		fprintf(stderr, "%s\n", error);
		return 2;
	}
	steps = atoi(argv[3]);
	progress = progress_file(argv[2], "progress.0");
	if (prepare(context, &device))
		return 1;
	for (int step = 0; step < steps; step++) {
		if (do_step(context, &device, step))
			return 1;
		if (write(progress, "\n", 1) != 1)
			return 3;
	}
	if (check_results(context, &device, steps))
		return 1;
	sa_close(context);
	done = progress_file(argv[2], "done.0");
	return write(done, "right", 5) == 5 ? 0 : 3;
}
