/*
 * Uses the fake CUDA device: one step after the other, and at the end one line with all that it computed.
 * Arguments: the GPU's UUID (hex), the number of steps, milliseconds between them, and a file for the result. Half-way it
 * waits for a file of that name with ".go" behind.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int fakeStart(const char *uuid);
int fakeStep(uint64_t step, uint64_t *sum);

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	long steps = atol(argv[2]), ms = atol(argv[3]);
	uint64_t sum, all = 0;
	char go[4096];
	if (fakeStart(argv[1]))
		return 3;
	snprintf(go, sizeof go, "%s.go", argv[4]);
	for (long i = 0; i < steps; i++) {
		struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
		while (i == steps / 2 && access(go, F_OK))
			nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
		if (fakeStep(i, &sum))
			return 4;
		all = all * 31 + sum;
		nanosleep(&t, NULL);
	}
	FILE *out = fopen(argv[4], "w");
	if (!out)
		return 5;
	fprintf(out, "%016llx\n", (unsigned long long)all);
	return fclose(out) ? 6 : 0;
}
