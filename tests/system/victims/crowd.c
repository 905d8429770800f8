/* Many threads in many processes, each with something of its own: argument 2 processes, argument 3 threads in each. */
#include "victim.h"
#include <pthread.h>

static __thread int own;
static int nr_threads;

static void *thread_main(void *argument)
{
	int number = (int)(intptr_t)argument;
	pid_t tid = syscall(SYS_gettid);
	char name[16], now[16] = "";

	own = number * 7;
	snprintf(name, sizeof(name), "t%d", number);
	MUST(!prctl(PR_SET_NAME, name));
	victim_wait_quietly();
	CHECK(own == number * 7, "thread-local word of thread %d is %d", number, own);
	CHECK(syscall(SYS_gettid) == tid, "tid of thread %d changed", number);
	CHECK(!prctl(PR_GET_NAME, now) && !strcmp(name, now), "name of thread %d is %s", number, now);
	return argument;
}

static int process_main(void *unused)
{
	pthread_t *threads = calloc(nr_threads, sizeof(*threads));
	pthread_attr_t attributes;

	(void)unused;
	MUST(threads && !pthread_attr_init(&attributes) && !pthread_attr_setstacksize(&attributes, 65536));
	for (intptr_t i = 0; i < nr_threads; i++)
		MUST(!pthread_create(&threads[i], &attributes, thread_main, (void *)i));
	victim_ready();
	victim_wait_quietly();
	for (intptr_t i = 0; i < nr_threads; i++) {
		void *result = NULL;

		CHECK(!pthread_join(threads[i], &result) && result == (void *)i, "thread %ld cannot be joined", (long)i);
	}
	return 0;
}

int main(int argc, char **argv)
{
	pid_t children[256];
	int nr;

	victim_init(argc, argv);
	MUST(argc > 3);
	nr = atoi(argv[2]);
	nr_threads = atoi(argv[3]);
	MUST(nr <= 256);
	for (int i = 0; i < nr; i++)
		children[i] = victim_child(process_main, NULL);
	victim_ready();
	victim_wait();
	for (int i = 0; i < nr; i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
