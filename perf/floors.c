/*
 * What this machine can do without any of us: the limits that the benchmarks are measured against.
 *
 *   floors copy FILE...    read files into fresh memory: the page cache's limit for a restore
 *   floors write FILE      write --bytes of memory into a new file: the limit for a dump
 *   floors read FILE...    O_DIRECT reads with --threads in flight: the disk's limit where there is no fio
 *   floors touch           touch --bytes of memory once, so that the hypervisor has backed it before anything is timed
 *   floors hold            touch --bytes of memory, say so, and keep them until stdin ends
 *   floors evict FILE...   drop files from the page cache
 *   floors cached FILE...  how many of their bytes are in the page cache
 *
 *   --threads N  --chunk BYTES  --bytes BYTES  --direct  --sync  --mapped (write through a mapping of the file)
 *   --memory small|huge|shared|shared-huge     what is read into: pages of 4 KiB or huge ones, private or shared
 *   --populate none|ahead|placed               let the copy fault pages in, or madvise(POPULATE_WRITE) each chunk first,
 *                                              or UFFDIO_COPY it from a mapping of the file
 *
 * One line of JSON: {"seconds": ..., "bytes": ...}. Exit status 1 and a line on stderr where something fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define HUGE_BYTES (2ul << 20)
#define MAX_THREADS 256
#define MAX_FILES 1024

#define DIE(...)                                              \
	do {                                                  \
		int error_ = errno;                           \
		fprintf(stderr, "floors: " __VA_ARGS__);      \
		fprintf(stderr, ": %s\n", strerror(error_));  \
		exit(1);                                      \
	} while (0)

struct options {
	const char *memory, *populate;
	size_t chunk, bytes;
	int threads, direct, sync, mapped;
};

struct file {
	const char *name;
	char *at, *mapping;
	size_t bytes;
	int fd;
};

/* One queue of chunks of all files, which the threads share. */
struct queue {
	const struct options *options;
	struct file *files;
	atomic_size_t next;
	int nr_files, uffd;
	void (*work)(const struct queue *, const struct file *, size_t offset, size_t bytes);
};

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static size_t round_up(size_t bytes, size_t to)
{
	return (bytes + to - 1) / to * to;
}

static void *serve(void *argument)
{
	struct queue *queue = argument;
	size_t chunk = queue->options->chunk;

	for (;;) {
		size_t place = atomic_fetch_add(&queue->next, chunk);
		int i = 0;

		while (i < queue->nr_files && place >= round_up(queue->files[i].bytes, chunk))
			place -= round_up(queue->files[i++].bytes, chunk);
		if (i == queue->nr_files)
			return NULL;
		size_t left = queue->files[i].bytes - place;

		queue->work(queue, &queue->files[i], place, left < chunk ? left : chunk);
	}
}

static double run(struct queue *queue)
{
	pthread_t threads[MAX_THREADS];
	double begin = now();
	int nr = queue->options->threads;

	for (int i = 0; i < nr; i++)
		if ((errno = pthread_create(&threads[i], NULL, serve, queue)))
			DIE("thread %d", i);
	for (int i = 0; i < nr; i++)
		pthread_join(threads[i], NULL);
	return now() - begin;
}

static int is(const char *text, const char *other)
{
	return !strcmp(text, other);
}

/* Memory that nobody touched, aligned so that all of it can be huge. */
static char *fresh(const struct options *options, size_t bytes)
{
	int is_shared = !strncmp(options->memory, "shared", 6), is_huge = strstr(options->memory, "huge") != NULL;
	int flags = MAP_ANONYMOUS | MAP_NORESERVE | (is_shared ? MAP_SHARED : MAP_PRIVATE);
	char *map = mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (map == MAP_FAILED)
		DIE("mapping %zu bytes", bytes);
	map = (char *)round_up((size_t)map, HUGE_BYTES);
	/* A kernel without huge pages refuses both advices, and then all pages are small. */
	if (madvise(map, bytes, is_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && errno != EINVAL)
		DIE("advising about huge pages");
	return map;
}

static void populate(void *memory, size_t bytes)
{
	if (madvise(memory, round_up(bytes, 4096), MADV_POPULATE_WRITE))
		DIE("populating %zu bytes", bytes);
}

static void read_all(const struct file *file, char *to, size_t offset, size_t bytes)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t got = pread(file->fd, to + done, bytes - done, offset + done);

		if (got <= 0)
			DIE("reading %s", file->name);
		done += got;
	}
}

static void copy_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	if (is(queue->options->populate, "ahead"))
		populate(file->at + offset, bytes);
	read_all(file, file->at + offset, offset, bytes);
}

static void place_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	struct uffdio_copy copy = { .dst = (size_t)file->at + offset, .src = (size_t)file->mapping + offset,
				    .len = round_up(bytes, 4096) };

	if (madvise(file->mapping + offset, copy.len, MADV_POPULATE_READ))
		DIE("mapping %s", file->name);
	if (ioctl(queue->uffd, UFFDIO_COPY, &copy))
		DIE("UFFDIO_COPY of %zu bytes", bytes);
}

/* A userfaultfd for `memory`, which nobody touched. */
static int registered(char *memory, size_t bytes)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .range = { (size_t)memory, bytes }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		DIE("userfaultfd for %zu bytes", bytes);
	return uffd;
}

static char *mapped(const struct file *file, int protection)
{
	char *mapping = mmap(NULL, file->bytes, protection, MAP_SHARED, file->fd, 0);

	if (mapping == MAP_FAILED)
		DIE("mapping %s", file->name);
	return mapping;
}

static void write_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	(void)queue;
	for (size_t done = 0; done < bytes;) {
		ssize_t put = pwrite(file->fd, file->at + offset + done, bytes - done, offset + done);

		if (put <= 0)
			DIE("writing %s", file->name);
		done += put;
	}
}

static void map_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	(void)queue;
	populate(file->mapping + offset, bytes);
	memcpy(file->mapping + offset, file->at + offset, bytes);
}

static void map_new_file(struct file *file)
{
	if (ftruncate(file->fd, file->bytes))
		DIE("growing %s", file->name);
	file->mapping = mapped(file, PROT_READ | PROT_WRITE);
}

static void read_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	static __thread char *buffer;

	if (!buffer && posix_memalign((void **)&buffer, 4096, round_up(queue->options->chunk, 4096)))
		DIE("memory");
	if (pread(file->fd, buffer, round_up(bytes, 4096), offset) != (ssize_t)bytes)
		DIE("reading %s", file->name);
}

static void touch_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	(void)queue;
	populate(file->at + offset, bytes);
}

static void fill_chunk(const struct queue *queue, const struct file *file, size_t offset, size_t bytes)
{
	touch_chunk(queue, file, offset, bytes);
	for (size_t i = 0; i < bytes; i += sizeof(size_t))
		*(size_t *)(file->at + offset + i) = (offset + i) * 0x9e3779b97f4a7c15ull + 1;
}

static size_t open_all(struct file *files, int nr, int flags)
{
	size_t total = 0;

	for (int i = 0; i < nr; i++) {
		struct stat stat;

		files[i].fd = open(files[i].name, flags | O_CLOEXEC);
		if (files[i].fd < 0 || fstat(files[i].fd, &stat))
			DIE("opening %s", files[i].name);
		files[i].bytes = stat.st_size;
		total += stat.st_size;
	}
	return total;
}

static void answer(double seconds, size_t bytes)
{
	printf("{\"seconds\": %.9f, \"bytes\": %zu}\n", seconds, bytes);
}

static void copy(const struct options *options, struct file *files, int nr)
{
	struct queue queue = { .options = options, .files = files, .nr_files = nr, .work = copy_chunk };
	size_t total = open_all(files, nr, O_RDONLY), room = 0;
	char *memory;

	for (int i = 0; i < nr; i++)
		room += round_up(files[i].bytes, HUGE_BYTES);
	memory = fresh(options, room);
	if (is(options->populate, "placed")) {
		queue.work = place_chunk;
		queue.uffd = registered(memory, room);
	}
	for (int i = 0; i < nr; i++) {
		files[i].at = memory;
		if (queue.work == place_chunk)
			files[i].mapping = mapped(&files[i], PROT_READ);
		memory += round_up(files[i].bytes, HUGE_BYTES);
	}
	answer(run(&queue), total);
}

/* Memory that goes back at once, so that the next to take some gets what the hypervisor has backed. */
static double touch(const struct options *options)
{
	struct file file = { .name = "memory", .bytes = options->bytes };
	struct queue queue = { .options = options, .files = &file, .nr_files = 1, .work = touch_chunk };
	double seconds;

	file.at = fresh(options, file.bytes);
	seconds = run(&queue);
	munmap(file.at, file.bytes);
	return seconds;
}

/* The memory stays ours until whoever started us closes our stdin, or has died, or until others cannot do without it. */
static void hold(const struct options *options)
{
	struct file file = { .name = "memory", .bytes = options->bytes };
	struct queue queue = { .options = options, .files = &file, .nr_files = 1, .work = touch_chunk };
	int oom = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	char byte;

	if (oom < 0 || write(oom, "1000", 4) != 4)
		DIE("/proc/self/oom_score_adj");
	file.at = fresh(options, file.bytes);
	answer(run(&queue), file.bytes);
	fflush(stdout);
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
}

static void write_out(const struct options *options, struct file *file)
{
	struct queue filling = { .options = options, .files = file, .nr_files = 1, .work = fill_chunk };
	struct queue queue = { .options = options, .files = file, .nr_files = 1, .work = write_chunk };
	int flags = O_CREAT | O_EXCL | O_CLOEXEC | (options->direct ? O_DIRECT : 0);
	double begin;

	file->bytes = options->bytes;
	file->at = fresh(options, file->bytes);
	run(&filling);
	touch(options);
	begin = now();
	file->fd = open(file->name, flags | (options->mapped ? O_RDWR : O_WRONLY), 0600);
	if (file->fd < 0)
		DIE("making %s", file->name);
	if (options->mapped) {
		map_new_file(file);
		queue.work = map_chunk;
	}
	run(&queue);
	if (options->sync && fsync(file->fd))
		DIE("syncing %s", file->name);
	answer(now() - begin, file->bytes);
}

static void read_directly(const struct options *options, struct file *files, int nr)
{
	struct queue queue = { .options = options, .files = files, .nr_files = nr, .work = read_chunk };
	size_t total = open_all(files, nr, O_RDONLY | O_DIRECT);

	answer(run(&queue), total);
}

static size_t in_page_cache(const struct file *file)
{
	size_t nr = round_up(file->bytes, 4096) / 4096, found = 0;
	unsigned char *there = malloc(nr + 1);
	void *map;

	if (!nr)
		return 0;
	map = mmap(NULL, file->bytes, PROT_READ, MAP_SHARED, file->fd, 0);
	if (!there || map == MAP_FAILED || mincore(map, file->bytes, there))
		DIE("looking at %s", file->name);
	for (size_t i = 0; i < nr; i++)
		found += there[i] & 1;
	munmap(map, file->bytes);
	free(there);
	return found * 4096;
}

static void look_at_cache(struct file *files, int nr, int is_to_drop)
{
	size_t left = 0;

	open_all(files, nr, O_RDONLY);
	for (int i = 0; i < nr; i++) {
		if (is_to_drop && (fsync(files[i].fd) || (errno = posix_fadvise(files[i].fd, 0, 0, POSIX_FADV_DONTNEED))))
			DIE("dropping %s", files[i].name);
		left += in_page_cache(&files[i]);
	}
	answer(0, left);
}

static size_t number(const char *text)
{
	char *end;
	size_t value = strtoul(text, &end, 10);

	if (*end || end == text || !value) {
		fprintf(stderr, "floors: %s is not a number above 0\n", text);
		exit(2);
	}
	return value;
}

static void set(struct options *options, const char *name, const char *value)
{
	if (is(name, "--threads"))
		options->threads = number(value) < MAX_THREADS ? number(value) : MAX_THREADS;
	else if (is(name, "--chunk"))
		options->chunk = round_up(number(value), 4096);
	else if (is(name, "--bytes"))
		options->bytes = round_up(number(value), 4096);
	else if (is(name, "--memory"))
		options->memory = value;
	else if (is(name, "--populate"))
		options->populate = value;
	else {
		fprintf(stderr, "floors: %s is no option\n", name);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	struct options options = { .memory = "small", .populate = "none", .chunk = 1 << 20, .bytes = 1 << 30, .threads = 1 };
	static struct file files[MAX_FILES];
	int nr = 0;

	for (int i = 2; i < argc; i++) {
		if (is(argv[i], "--direct"))
			options.direct = 1;
		else if (is(argv[i], "--sync"))
			options.sync = 1;
		else if (is(argv[i], "--mapped"))
			options.mapped = 1;
		else if (argv[i][0] == '-' && i + 1 < argc)
			set(&options, argv[i], argv[i + 1]), i++;
		else if (nr < MAX_FILES)
			files[nr++].name = argv[i];
	}
	if (argc > 1 && is(argv[1], "touch"))
		return answer(touch(&options), options.bytes), 0;
	if (argc > 1 && is(argv[1], "hold"))
		return hold(&options), 0;
	if (nr && is(argv[1], "copy"))
		return copy(&options, files, nr), 0;
	if (nr == 1 && is(argv[1], "write"))
		return write_out(&options, files), 0;
	if (nr && is(argv[1], "read"))
		return read_directly(&options, files, nr), 0;
	if (nr && (is(argv[1], "evict") || is(argv[1], "cached")))
		return look_at_cache(files, nr, is(argv[1], "evict")), 0;
	fprintf(stderr, "usage: floors copy|write|read|touch|hold|evict|cached [OPTION...] [FILE...]\n");
	return 2;
}
