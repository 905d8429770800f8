/*
 * A tree that is never still: threads start and end, children are forked, exit and are reaped. Whatever moment the dump
 * catches, each child must end with the status that it was made for.
 */
#include "victim.h"
#include <pthread.h>

static volatile int stop;

static void *short_thread(void *argument)
{
	return argument;
}

static void *start_threads(void *unused)
{
	uintptr_t number = 0;

	while (!stop) {
		pthread_t thread;
		void *result = NULL;

		number++;
		CHECK(!pthread_create(&thread, NULL, short_thread, (void *)number), "no thread: %s", strerror(errno));
		CHECK(!pthread_join(thread, &result) && (uintptr_t)result == number, "a thread's result is lost");
		victim_nap(1);
	}
	return unused;
}

static void *start_children(void *unused)
{
	int number = 0;

	while (!stop) {
		pid_t child = fork();

		number = (number + 1) % 100;
		if (!child) {
			victim_nap(number % 3);
			_exit(number);
		}
		CHECK(child > 0, "no child: %s", strerror(errno));
		victim_expect_exit(child, number);
	}
	return unused;
}

int main(int argc, char **argv)
{
	pthread_t threads, children;

	victim_init(argc, argv);
	MUST(!pthread_create(&threads, NULL, start_threads, NULL) && !pthread_create(&children, NULL, start_children, NULL));
	victim_ready();
	victim_wait();
	stop = 1;
	CHECK(!pthread_join(threads, NULL) && !pthread_join(children, NULL), "a thread cannot be joined");
	return victim_done();
}
