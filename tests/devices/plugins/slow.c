/*
 * Sleeps pid (or -DALWAYS=) milliseconds in a hook, says "in" before and "out" after that, and finds out whether two
 * threads were ever in it at the same time.
 */
#include <pthread.h>
#include <unistd.h>

#include <gpurestore-plugin.h>

#ifndef NAME
#define NAME "slow"
#endif

static int inside, met;

static int wait_in_hook(int milliseconds)
{
#ifdef ALWAYS
	milliseconds = ALWAYS;
#endif
	if (__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) > 1)
		met = 1;
	print_on_level(4, "in\n");
	usleep((useconds_t)milliseconds * 1000);
	print_on_level(4, "out\n");
	__atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
	return 0;
}

static int pause_devices(int pid)
{
	return wait_in_hook(pid);
}

static int checkpoint_devices(int pid)
{
	return wait_in_hook(pid);
}

static int dump_ext_file(int fd, int id)
{
	(void)fd;
	return wait_in_hook(id);
}

static void *talk(void *argument)
{
	print_on_level(2, "from a thread\n");
	return argument;
}

static void end(int stage, int ret)
{
	pthread_t thread;

	pthread_create(&thread, NULL, talk, NULL);
	pthread_join(thread, NULL);
	print_on_level(2, "exit %d %d, met %d, inside %d\n", stage, ret, met, inside);
}

CR_PLUGIN_REGISTER(NAME, NULL, end)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__PAUSE_DEVICES, pause_devices)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, checkpoint_devices)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_ext_file)
