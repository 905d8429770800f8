/*
 * Shared memory that comes late. An object is filled through a mapping of the handler's own, so each page is placed once,
 * whoever shows it, and pages that nobody shows come as well; tasks that wait for one are only woken.
 */
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "gr_lazy_internal.h"

struct vma {
	uint64_t start, end, offset, inode;
	bool is_shared;
};

/* The mapping around `address`, of any thread. */
static bool find_vma(const char *maps, uint64_t address, struct vma *out)
{
	FILE *file = fopen(maps, "re");
	char line[512], rights[8];
	bool found = false;

	while (file && !found && fgets(line, sizeof(line), file)) {
		int got = sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %" SCNx64 " %*s %" SCNu64, &out->start, &out->end, rights,
				 &out->offset, &out->inode);

		/* The rest of a line that is too long begins with no address. */
		found = got == 5 && out->start <= address && address < out->end;
	}
	if (file)
		fclose(file);
	out->is_shared = found && rights[3] == 's';
	return found;
}

/* ---- objects */

static int make_userfaultfd(const struct gr_lazy_span *range)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = { .range = { range->start, range->end - range->start },
					.mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), code;

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &area) == 0)
		return fd;
	code = errno;
	if (fd >= 0)
		close(fd);
	return -code;
}

static int open_object(struct gr_lazy_handler *handler, const struct gr_lazy_source *source, struct gr_lazy_object *out)
{
	const struct gr_lazy_span *range = &source->ranges[0];
	struct vma vma;
	int fd, ret;

	if (!find_vma("/proc/self/maps", range->start, &vma) || !vma.is_shared)
		return -ENOENT;
	out->inode = vma.inode;
	/* A new keeper is a fork, too. */
	if (madvise((void *)range->start, range->end - range->start, MADV_DONTFORK) < 0)
		return -errno;
	fd = make_userfaultfd(range);
	if (fd < 0)
		return fd;
	ret = gr_lazy_register(handler, source, NULL, fd, 0, &out->mm);
	if (ret < 0)
		close(fd);
	else
		gr_lazy_fill_hot(handler, out->mm);
	return ret;
}

int gr_lazy_objects_open(struct gr_lazy_handler *handler)
{
	int ret = 0;

	for (uint64_t i = 0; ret == 0 && i < handler->nr_sources; i++)
		if (!handler->sources[i]->pid)
			ret = open_object(handler, handler->sources[i], &handler->objects[i]);
	return ret;
}

/* ---- views */

bool gr_lazy_find_view(const struct gr_lazy_handler *handler, int tid, uint64_t address, struct gr_lazy_segment *out)
{
	char path[64];
	struct vma vma;

	snprintf(path, sizeof(path), "/proc/%d/maps", tid);
	if (!find_vma(path, address, &vma) || !vma.is_shared)
		return false;
	for (uint64_t i = 0; i < handler->nr_sources; i++) {
		const struct gr_lazy_source *source = handler->sources[i];
		uint64_t origin;

		if (source->pid || handler->objects[i].inode != vma.inode)
			continue;
		origin = source->ranges[0].start + vma.offset;
		*out = (struct gr_lazy_segment){ vma.start, vma.end, origin, i + 1 };
		return origin + (address - vma.start) < source->ranges[0].end;
	}
	return false;
}

/*
 * The kernel reports MADV_DONTNEED, which takes nothing away from shared memory, like MADV_REMOVE, which does. The caller
 * sleeps until its event is taken, so what it called is in /proc until then.
 */
static void note_thread(int pid, int tid, struct gr_lazy_advice *advice)
{
	char path[64], text[256];
	unsigned long number, start, bytes, value;
	GR_CLOSE int fd = -1;
	ssize_t size;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", pid, tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (size <= 0)
		return;
	text[size] = '\0';
	if (sscanf(text, "%lu %lx %lx %lx", &number, &start, &bytes, &value) != 4 || number != SYS_madvise ||
	    advice->nr == GR_LAZY_MAX_ADVICE)
		return;
	advice->calls[advice->nr].start = start;
	advice->calls[advice->nr].end = start + ((bytes + GR_PAGE_BYTES - 1) & ~(GR_PAGE_BYTES - 1));
	advice->calls[advice->nr++].advice = value;
}

static void note_process(int pid, struct gr_lazy_advice *advice)
{
	const struct dirent *entry;
	char path[64];
	DIR *folder;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	folder = opendir(path);
	while (folder && (entry = readdir(folder)))
		if (atoi(entry->d_name) > 0)
			note_thread(pid, atoi(entry->d_name), advice);
	if (folder)
		closedir(folder);
}

void gr_lazy_note_advice(const struct gr_lazy_handler *handler, const struct gr_lazy_mm *mm,
			 struct gr_lazy_advice *advice)
{
	const struct gr_lazy_watched *watched = &handler->shared->watched[mm->number];
	const struct dirent *entry;
	DIR *folder;

	advice->nr = 0;
	if (!mm->source->nr_views || gr_lazy_probe(mm->uffd) != EAGAIN)
		return;
	if (watched->pid) {
		note_process(watched->pid, advice);
		return;
	}
	/* A fork that made no fault yet is somewhere. */
	folder = opendir("/proc");
	while (folder && (entry = readdir(folder)))
		if (atoi(entry->d_name) > 0)
			note_process(atoi(entry->d_name), advice);
	if (folder)
		closedir(folder);
}

/* 1: the range is being emptied, 0: it is not, -ESRCH: nobody was seen. */
static int is_emptied(const struct gr_lazy_advice *advice, uint64_t start, uint64_t end)
{
	int ret = -ESRCH;

	for (uint32_t i = 0; i < advice->nr && ret < 1; i++)
		if (advice->calls[i].start <= start && end <= advice->calls[i].end)
			ret = advice->calls[i].advice == MADV_REMOVE;
	return ret;
}

int gr_lazy_views_removed(struct gr_lazy_handler *handler, struct gr_lazy_mm *mm, const struct gr_lazy_advice *advice,
			  uint64_t start, uint64_t end)
{
	for (uint64_t i = 0; mm->source->nr_views && i < mm->nr_segments; i++) {
		const struct gr_lazy_segment *segment = &mm->segments[i];
		uint64_t from = start > segment->start ? start : segment->start;
		uint64_t to = gr_lazy_at_most(end, segment->end);
		struct gr_lazy_mm *object;
		int ret;

		if (!segment->object || from >= to)
			continue;
		object = handler->objects[segment->object - 1].mm;
		if (object->uffd < 0)
			continue;
		ret = is_emptied(advice, from, to);
		if (ret < 0)
			return ret;
		if (ret)
			gr_lazy_mm_removed(object, segment->origin + (from - segment->start),
					   segment->origin + (to - segment->start));
	}
	return 0;
}
