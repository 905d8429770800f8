/* Dies in a hook, in the way that the pid says, or always in the first with -DALWAYS. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include <gpurestore-plugin.h>

static void *volatile nowhere;

static int overflow(int depth)
{
	volatile char block[65536];

	if (depth < 0)
		return 0;
	memset((char *)block, depth, sizeof(block));
	return overflow(depth + 1) + block[depth & 1];
}

static void *in_a_thread(void *argument)
{
	*(volatile int *)nowhere = 1;
	return argument;
}

static int checkpoint_devices(int pid)
{
	pthread_t thread;

#ifdef ALWAYS
	pid = 1;
#endif
	switch (pid) {
	case 1:
		*(volatile int *)nowhere = 1;
		break;
	case 2:
		abort();
	case 3:
		return overflow(0);
	case 4:
		raise(SIGFPE);
		break;
	case 5:
		pthread_create(&thread, NULL, in_a_thread, NULL);
		pthread_join(thread, NULL);
	}
	return 0;
}

CR_PLUGIN_REGISTER_DUMMY("crashing")
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, checkpoint_devices)
