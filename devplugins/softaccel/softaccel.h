/* The client library of the software accelerator: a stand-in for hardware, not a GPU. The same as client.py, for C.
 *
 * Calls return 0 or a negative errno; sa_error() has the sentence for people. One thread at a time may use a context,
 * and a context does not survive fork. Host memory of a queued copy must stay as it is until sa_wait().
 * Messages and the doorbell page are described in protocol.py.
 */
#ifndef SOFTACCEL_H
#define SOFTACCEL_H

#include <stddef.h>
#include <stdint.h>

#define SA_ALL_STREAMS UINT64_MAX
#define SA_ERROR_BYTES 512

enum sa_kernel {
	SA_FILL = 1,
	SA_ADD = 2,
	SA_ADD_ROW = 3,
	SA_SCALE = 4,
	SA_AXPY = 5,
	SA_RELU = 6,
	SA_RELU_GRADIENT = 7,
	SA_REDUCE_ROWS = 8,
	SA_MATMUL = 9,
	SA_SOFTMAX_CROSS_ENTROPY = 10,
	SA_BUSY = 11,
};
enum sa_type { SA_FLOAT32 = 1, SA_FLOAT64 = 2 };
enum { SA_TRANSPOSE_A = 1, SA_TRANSPOSE_B = 2 };

struct sa_context;

/* A context on a device. address: a path, @NAME in the abstract namespace, or NULL for $SOFTACCEL_SOCKET or the
 * default. On failure error (of SA_ERROR_BYTES) says what went wrong. */
int sa_open(const char *address, unsigned int device, struct sa_context **context, char *error);
/* Gives everything back; NULL is allowed. */
void sa_close(struct sa_context *context);
/* What went wrong last. Valid until the next call. */
const char *sa_error(const struct sa_context *context);

int sa_alloc(struct sa_context *context, size_t bytes, uint64_t *address);
int sa_free(struct sa_context *context, uint64_t address);

int sa_stream_create(struct sa_context *context, uint64_t *stream);
int sa_stream_destroy(struct sa_context *context, uint64_t stream);
/* Wait until everything queued so far is done, and say what went wrong in it. */
int sa_wait(struct sa_context *context, uint64_t stream);

/* Commands. Stream 0 is there from the start. number may be NULL. */
int sa_copy_in(struct sa_context *context, uint64_t stream, uint64_t to, const void *from, size_t bytes,
	       uint64_t *number);
int sa_copy_out(struct sa_context *context, uint64_t stream, void *to, uint64_t from, size_t bytes, uint64_t *number);
int sa_copy(struct sa_context *context, uint64_t stream, uint64_t to, uint64_t from, size_t bytes, uint64_t *number);
/* Up to nine parameters; doubles go through sa_double(). */
int sa_launch(struct sa_context *context, uint64_t stream, enum sa_kernel kernel, enum sa_type type,
	      const uint64_t *parameters, unsigned int nr_parameters, uint64_t *number);
uint64_t sa_double(double value);

int sa_event_create(struct sa_context *context, uint64_t *event);
int sa_event_destroy(struct sa_context *context, uint64_t event);
int sa_event_record(struct sa_context *context, uint64_t stream, uint64_t event);
int sa_event_await(struct sa_context *context, uint64_t stream, uint64_t event);
int sa_event_wait(struct sa_context *context, uint64_t event);
int sa_event_query(struct sa_context *context, uint64_t event, int *done);

/* From the doorbell page, without a message: the number of the last command done in a stream; is the device lost? */
uint64_t sa_completed(const struct sa_context *context, uint64_t stream);
int sa_lost(const struct sa_context *context);

#endif
