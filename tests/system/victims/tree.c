/*
 * A tree with three sessions and several groups:
 *
 *   root (leader of its own session, as the test starts it)
 *   |- a        in the root's session, leader of group a
 *   |  `- a1    in group a
 *   |- b        called setsid() after it had made b_old: its own session
 *   |  |- b_old older than b's session: still in the root's session and group
 *   |  |- b1    in b's session and group
 *   |  `- b2    in b's session, leader of group b2
 *   |- c        session of its own, whose leader has a stopped child
 *   |  `- stopped (SIGSTOP): goes on after SIGCONT
 *   |- zombie exited with 7, zombie killed by SIGKILL, zombie killed by SIGTERM
 *   `- group d: its leader is a zombie, a member lives
 */
#include "victim.h"

struct identity {
	pid_t pid, parent, group, session;
};

static struct identity who(void)
{
	return (struct identity){ getpid(), getppid(), getpgid(0), getsid(0) };
}

static void compare(const char *name, struct identity was)
{
	struct identity is = who();

	CHECK(was.pid == is.pid, "%s: pid %d became %d", name, was.pid, is.pid);
	CHECK(was.parent == is.parent, "%s: parent %d became %d", name, was.parent, is.parent);
	CHECK(was.group == is.group, "%s: group %d became %d", name, was.group, is.group);
	CHECK(was.session == is.session, "%s: session %d became %d", name, was.session, is.session);
	CHECK((pid_t)syscall(SYS_gettid) == is.pid, "%s: tid is not pid", name);
}

static int leaf(void *name)
{
	struct identity me;

	me = who();
	victim_ready();
	victim_wait_quietly();
	compare(name, me);
	return 0;
}

/* A member of a group whose leader is dead already. */
static int d_member_main(void *group)
{
	MUST(!setpgid(0, (pid_t)(intptr_t)group));
	return leaf("d_member");
}

static int group_leaf(void *name)
{
	MUST(!setpgid(0, 0));
	return leaf(name);
}

static int a_main(void *name)
{
	struct identity me;
	pid_t child;

	MUST(!setpgid(0, 0));
	child = victim_child(leaf, "a1");
	me = who();
	victim_ready();
	victim_wait_quietly();
	compare(name, me);
	victim_expect_exit(child, 0);
	return 10;
}

static int b_main(void *name)
{
	pid_t old = victim_child(leaf, "b_old"), b1, b2;
	struct identity me;

	MUST(setsid() == getpid());
	b1 = victim_child(leaf, "b1");
	b2 = victim_child(group_leaf, "b2");
	me = who();
	victim_ready();
	victim_wait_quietly();
	compare(name, me);
	victim_expect_exit(old, 0);
	victim_expect_exit(b1, 0);
	victim_expect_exit(b2, 0);
	return 11;
}

static int stopped_main(void *name)
{
	struct identity me = who();

	victim_ready();
	raise(SIGSTOP);
	compare(name, me);
	return 12;
}

/* Wait until `pid` is in one of `states` of /proc/PID/stat; checked, not slept for. */
static char state_of(pid_t pid)
{
	char path[64], text[512];
	char *end;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (!file)
		return '?';
	text[fread(text, 1, sizeof(text) - 1, file)] = 0;
	fclose(file);
	end = strrchr(text, ')');
	return end ? end[2] : '?';
}

static void until_state(pid_t pid, char state)
{
	for (int i = 0; i < 5000 && state_of(pid) != state; i++)
		victim_nap(1);
	MUST(state_of(pid) == state);
}

static int c_main(void *name)
{
	pid_t child;
	struct identity me;
	int status = 0;

	MUST(setsid() == getpid());
	child = victim_child(stopped_main, "stopped");
	until_state(child, 'T');
	me = who();
	victim_ready();
	victim_wait_quietly();
	compare(name, me);
	CHECK(state_of(child) == 'T', "stopped child is in state %c", state_of(child));
	MUST(!kill(child, SIGCONT));
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 12,
	      "stopped child: wait status %#x after SIGCONT", status);
	return 13;
}

static int die(void *how)
{
	int signal_number = (int)(intptr_t)how;

	victim_ready();
	if (signal_number < 0)
		return -signal_number;
	kill(getpid(), signal_number);
	pause();
	return 98;
}

static int group_leader_zombie(void *unused)
{
	(void)unused;
	MUST(!setpgid(0, 0));
	victim_ready();
	return 5;
}

static void expect_killed(pid_t pid, int signal_number)
{
	int status = 0;

	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == signal_number,
	      "zombie %d: wait status %#x, wanted death by signal %d", pid, status, signal_number);
}

int main(int argc, char **argv)
{
	pid_t a, b, c, exited, killed, terminated, d, d_member;
	struct identity me;

	victim_init(argc, argv);
	a = victim_child(a_main, "a");
	b = victim_child(b_main, "b");
	c = victim_child(c_main, "c");
	exited = victim_child(die, (void *)-7l);
	killed = victim_child(die, (void *)(long)SIGKILL);
	terminated = victim_child(die, (void *)(long)SIGTERM);
	d = victim_child(group_leader_zombie, NULL);
	d_member = victim_child(d_member_main, (void *)(intptr_t)d);
	until_state(exited, 'Z');
	until_state(killed, 'Z');
	until_state(terminated, 'Z');
	until_state(d, 'Z');
	me = who();
	victim_ready();
	victim_wait();
	compare("root", me);
	victim_expect_exit(exited, 7);
	expect_killed(killed, SIGKILL);
	expect_killed(terminated, SIGTERM);
	CHECK(getpgid(d) == d, "group of zombie %d is %d", d, getpgid(d));
	victim_expect_exit(d, 5);
	victim_expect_exit(d_member, 0);
	victim_expect_exit(a, 10);
	victim_expect_exit(b, 11);
	victim_expect_exit(c, 13);
	CHECK(wait(NULL) == -1 && errno == ECHILD, "a child too many");
	return victim_done();
}
