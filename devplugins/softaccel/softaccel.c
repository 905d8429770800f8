/* The client library of the software accelerator: a stand-in for hardware, not a GPU. See softaccel.h and protocol.py. */
#define _GNU_SOURCE
#include "softaccel.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define VERSION 1
#define NR_ARGS 12
#define NR_VALUES 6
#define PAGE_BYTES 4096
#define PAGE_MAGIC 0x3143434154464F53ULL
#define MAX_REPLY_BYTES 4096

/* Words of the doorbell page. */
enum { AT_MAGIC = 0, AT_READY = 2, AT_DOORBELL = 3, AT_LOST = 4, AT_FENCES = 32 };

enum op {
	HELLO = 1,
	READY,
	INFO,
	ALLOC,
	FREE,
	STREAM_CREATE,
	STREAM_DESTROY,
	EVENT_CREATE,
	EVENT_DESTROY,
	EVENT_QUERY,
	WAIT,
	EVENT_WAIT,
	COPY_IN = 32,
	COPY_OUT,
	COPY,
	LAUNCH,
	EVENT_RECORD,
	EVENT_AWAIT,
};

struct request {
	uint32_t op;
	uint32_t reserved;
	uint64_t seq;
	uint64_t args[NR_ARGS];
};

struct reply {
	int32_t error;
	uint32_t text_bytes;
	uint64_t seq;
	uint64_t values[NR_VALUES];
	char text[MAX_REPLY_BYTES - 64];
};

struct sa_context {
	int fd;
	uint64_t seq;
	uint64_t rung;
	volatile uint64_t *page;
	char error[SA_ERROR_BYTES];
};

static int fail(struct sa_context *context, int error, const char *text)
{
	snprintf(context->error, sizeof(context->error), "%.*s", SA_ERROR_BYTES - 1, text);
	return error > 0 ? -error : -EIO;
}

static int send_request(struct sa_context *context, enum op op, const uint64_t *args, unsigned int nr)
{
	struct request request = { .op = op, .seq = ++context->seq };

	if (nr > 0)
		memcpy(request.args, args, nr * sizeof(*args));
	while (send(context->fd, &request, sizeof(request), MSG_NOSIGNAL) < 0) {
		if (errno != EINTR)
			return fail(context, ENODEV, "the server of the software accelerator is gone");
	}
	return 0;
}

/* The descriptor in a message, or -1. */
static int take_fd(struct msghdr *message)
{
	struct cmsghdr *head = CMSG_FIRSTHDR(message);
	int fd = -1;

	if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(head), sizeof(fd));
	return fd;
}

/* The reply to the last request. Others are stale: a restored server may repeat one. */
static int receive(struct sa_context *context, struct reply *reply, int *fd)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control;

	for (;;) {
		struct iovec vector = { reply, sizeof(*reply) };
		struct msghdr message = { .msg_iov = &vector,
					  .msg_iovlen = 1,
					  .msg_control = &control,
					  .msg_controllen = sizeof(control) };
		ssize_t size = recvmsg(context->fd, &message, MSG_CMSG_CLOEXEC);
		int given;

		if (size < 0 && errno == EINTR)
			continue;
		if (size < (ssize_t)offsetof(struct reply, text))
			return fail(context, ENODEV, "the server of the software accelerator is gone");
		given = take_fd(&message);
		if (reply->seq == context->seq) {
			size -= offsetof(struct reply, text);
			reply->text[size < (ssize_t)sizeof(reply->text) ? (size_t)size : sizeof(reply->text) - 1] = 0;
			if (fd)
				*fd = given;
			else if (given >= 0)
				close(given);
			return 0;
		}
		if (given >= 0)
			close(given);
	}
}

static int request(struct sa_context *context, enum op op, const uint64_t *args, unsigned int nr, uint64_t *value)
{
	struct reply reply;
	int error;

	context->page[AT_DOORBELL] = ++context->rung;
	error = send_request(context, op, args, nr);
	if (!error)
		error = receive(context, &reply, NULL);
	if (error)
		return error;
	if (reply.error)
		return fail(context, reply.error, reply.text);
	if (value)
		*value = reply.values[0];
	return 0;
}

static int map_page(struct sa_context *context, int fd)
{
	void *page;

	if (fd < 0)
		return fail(context, EPROTO, "the server sent no doorbell page");
	page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (page == MAP_FAILED)
		return fail(context, errno, "cannot map the doorbell page");
	madvise(page, PAGE_BYTES, MADV_DONTFORK);
	context->page = page;
	if (context->page[AT_MAGIC] != PAGE_MAGIC)
		return fail(context, EPROTO, "the doorbell page is not one");
	return 0;
}

/* Map the page until the server sees what is written there: a dump while its descriptor lay open leaves a copy. */
static int say_hello(struct sa_context *context, unsigned int device)
{
	uint64_t args[3] = { VERSION, device, 0 };
	struct reply reply;
	struct stat found;
	int fd = -1, error;

	if (fstat(context->fd, &found))
		return fail(context, errno, "cannot look at the socket");
	args[2] = found.st_ino;
	error = send_request(context, HELLO, args, 3);
	if (!error)
		error = receive(context, &reply, &fd);
	if (!error && reply.error)
		error = fail(context, reply.error, reply.text);
	while (!error) {
		uint64_t word = 1;

		error = map_page(context, fd);
		if (error)
			break;
		if (getrandom(&word, sizeof(word), GRND_NONBLOCK) != sizeof(word))
			word = (uint64_t)getpid() << 32 | context->seq;
		context->page[AT_READY] = word;
		error = send_request(context, READY, &word, 1);
		if (!error)
			error = receive(context, &reply, &fd);
		if (error || !reply.error)
			break;
		if (reply.error != EAGAIN) {
			error = fail(context, reply.error, reply.text);
			break;
		}
		munmap((void *)context->page, PAGE_BYTES);
		context->page = NULL;
	}
	return error;
}

static int connect_to(struct sa_context *context, const char *address)
{
	struct sockaddr_un where = { .sun_family = AF_UNIX };
	size_t size;

	if (!address)
		address = getenv("SOFTACCEL_SOCKET");
	if (!address || !*address)
		address = "@softaccel";
	size = strlen(address);
	if (size >= sizeof(where.sun_path))
		return fail(context, ENAMETOOLONG, "the address is too long");
	memcpy(where.sun_path, address, size);
	if (address[0] == '@')
		where.sun_path[0] = 0;
	context->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (context->fd < 0)
		return fail(context, errno, "no socket");
	if (connect(context->fd, (struct sockaddr *)&where,
		    (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size))) {
		int error = errno;

		snprintf(context->error, sizeof(context->error), "no software accelerator listens at %s: %s", address,
			 strerror(error));
		return -error;
	}
	return 0;
}

int sa_open(const char *address, unsigned int device, struct sa_context **context, char *error)
{
	struct sa_context *made = calloc(1, sizeof(*made));
	int result;

	*context = NULL;
	if (!made)
		return -ENOMEM;
	made->fd = -1;
	result = connect_to(made, address);
	if (!result)
		result = say_hello(made, device);
	if (result) {
		if (error)
			memcpy(error, made->error, SA_ERROR_BYTES);
		sa_close(made);
		return result;
	}
	*context = made;
	return 0;
}

void sa_close(struct sa_context *context)
{
	if (!context)
		return;
	if (context->fd >= 0)
		close(context->fd);
	if (context->page)
		munmap((void *)context->page, PAGE_BYTES);
	free(context);
}

const char *sa_error(const struct sa_context *context)
{
	return context->error;
}

int sa_alloc(struct sa_context *context, size_t bytes, uint64_t *address)
{
	return request(context, ALLOC, (uint64_t[]){ bytes }, 1, address);
}

int sa_free(struct sa_context *context, uint64_t address)
{
	int error = sa_wait(context, SA_ALL_STREAMS);

	return error ? error : request(context, FREE, &address, 1, NULL);
}

int sa_stream_create(struct sa_context *context, uint64_t *stream)
{
	return request(context, STREAM_CREATE, NULL, 0, stream);
}

int sa_stream_destroy(struct sa_context *context, uint64_t stream)
{
	int error = sa_wait(context, stream);

	return error ? error : request(context, STREAM_DESTROY, &stream, 1, NULL);
}

int sa_wait(struct sa_context *context, uint64_t stream)
{
	return request(context, WAIT, &stream, 1, NULL);
}

int sa_copy_in(struct sa_context *context, uint64_t stream, uint64_t to, const void *from, size_t bytes,
	       uint64_t *number)
{
	return request(context, COPY_IN, (uint64_t[]){ stream, to, (uintptr_t)from, bytes }, 4, number);
}

int sa_copy_out(struct sa_context *context, uint64_t stream, void *to, uint64_t from, size_t bytes, uint64_t *number)
{
	return request(context, COPY_OUT, (uint64_t[]){ stream, (uintptr_t)to, from, bytes }, 4, number);
}

int sa_copy(struct sa_context *context, uint64_t stream, uint64_t to, uint64_t from, size_t bytes, uint64_t *number)
{
	return request(context, COPY, (uint64_t[]){ stream, to, from, bytes }, 4, number);
}

int sa_launch(struct sa_context *context, uint64_t stream, enum sa_kernel kernel, enum sa_type type,
	      const uint64_t *parameters, unsigned int nr_parameters, uint64_t *number)
{
	uint64_t args[NR_ARGS] = { stream, kernel, type };

	if (nr_parameters > NR_ARGS - 3)
		return fail(context, E2BIG, "a kernel has at most nine parameters");
	memcpy(args + 3, parameters, nr_parameters * sizeof(*parameters));
	return request(context, LAUNCH, args, NR_ARGS, number);
}

uint64_t sa_double(double value)
{
	uint64_t bits;

	memcpy(&bits, &value, sizeof(bits));
	return bits;
}

int sa_event_create(struct sa_context *context, uint64_t *event)
{
	return request(context, EVENT_CREATE, NULL, 0, event);
}

int sa_event_destroy(struct sa_context *context, uint64_t event)
{
	return request(context, EVENT_DESTROY, &event, 1, NULL);
}

int sa_event_record(struct sa_context *context, uint64_t stream, uint64_t event)
{
	return request(context, EVENT_RECORD, (uint64_t[]){ stream, event }, 2, NULL);
}

int sa_event_await(struct sa_context *context, uint64_t stream, uint64_t event)
{
	return request(context, EVENT_AWAIT, (uint64_t[]){ stream, event }, 2, NULL);
}

int sa_event_wait(struct sa_context *context, uint64_t event)
{
	return request(context, EVENT_WAIT, &event, 1, NULL);
}

int sa_event_query(struct sa_context *context, uint64_t event, int *done)
{
	uint64_t value;
	int error = request(context, EVENT_QUERY, &event, 1, &value);

	if (!error)
		*done = value != 0;
	return error;
}

uint64_t sa_completed(const struct sa_context *context, uint64_t stream)
{
	return context->page[AT_FENCES + stream];
}

int sa_lost(const struct sa_context *context)
{
	return context->page[AT_LOST] != 0;
}
