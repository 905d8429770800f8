/*
 * As root: children with credentials of their own kinds, each of which must come back exactly: real, effective, saved and
 * filesystem ids, groups, capability sets (effective, permitted, inheritable, bounding, ambient), securebits, keep-caps,
 * no_new_privs; and one chrooted. A child prints its /proc/self/status lines before and after and compares.
 */
#include "victim.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/fsuid.h>

static int in_chroot;

static void read_status(char *out, size_t size)
{
	static const char *const wanted[] = { "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:",
					      "NoNewPrivs:" };
	char line[1024];
	FILE *file = fopen("/proc/self/status", "re");

	out[0] = 0;
	while (file && fgets(line, sizeof(line), file))
		for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
			if (!strncmp(line, wanted[i], strlen(wanted[i])))
				snprintf(out + strlen(out), size - strlen(out), "%s", line);
	if (file)
		fclose(file);
	snprintf(out + strlen(out), size - strlen(out), "securebits %#x keepcaps %d dumpable %d pdeathsig ",
		 prctl(PR_GET_SECUREBITS), prctl(PR_GET_KEEPCAPS), prctl(PR_GET_DUMPABLE));
	int signal_number = 0;
	prctl(PR_GET_PDEATHSIG, &signal_number);
	snprintf(out + strlen(out), size - strlen(out), "%d umask ", signal_number);
	mode_t mask = umask(0);
	umask(mask);
	snprintf(out + strlen(out), size - strlen(out), "%o", mask);
}

static void set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = {
		{ (uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable },
		{ effective >> 32, permitted >> 32, inheritable >> 32 },
	};

	MUST(!syscall(SYS_capset, &header, data));
}

static void plain_user(void)
{
	gid_t groups[] = { 65534, 100, 4242 };

	MUST(!setgroups(3, groups) && !setresgid(65534, 65534, 65534) && !setresuid(65534, 65534, 65534));
}

static void mixed_ids(void)
{
	gid_t groups[] = { 7 };

	MUST(!setgroups(1, groups) && !setresgid(101, 102, 103) && !setresuid(0, 1001, 1002));
	setfsuid(1001);
}

static void user_with_capability(void)
{
	uint64_t bind = 1ull << CAP_NET_BIND_SERVICE, chown_bit = 1ull << CAP_CHOWN;

	MUST(!prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT) && !prctl(PR_CAPBSET_DROP, CAP_MKNOD));
	MUST(!prctl(PR_SET_KEEPCAPS, 1) && !setgroups(0, NULL) && !setresgid(5000, 5000, 5000) && !setresuid(5000, 5000, 5000));
	set_capabilities(bind, bind | chown_bit, bind);
	MUST(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
	MUST(!prctl(PR_SET_DUMPABLE, 1) && !prctl(PR_SET_PDEATHSIG, SIGCONT));
}

static void locked_down_root(void)
{
	MUST(!prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP));
	MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	set_capabilities(1ull << CAP_DAC_OVERRIDE, (1ull << CAP_DAC_OVERRIDE) | (1ull << CAP_KILL), 0);
	umask(077);
}

static void chrooted(void)
{
	/* The folder itself becomes the root; there is no /proc in it, so only what prctl tells is compared. */
	MUST(!chroot(victim_folder) && !chdir("/below"));
	in_chroot = 1;
	strcpy(victim_folder, "/");
}

static int child_main(void *set_up)
{
	char before[4096], after[4096], cwd[PATH_MAX] = "";
	const char *wanted_cwd = set_up == (void *)chrooted ? "/below" : NULL;

	((void (*)(void))set_up)();
	read_status(before, sizeof(before));
	victim_ready();
	victim_wait_quietly();
	read_status(after, sizeof(after));
	CHECK(!strcmp(before, after), "credentials changed from\n%s\nto\n%s", before, after);
	if (wanted_cwd) {
		CHECK(getcwd(cwd, sizeof(cwd)) && !strcmp(cwd, wanted_cwd), "cwd in the chroot is '%s'", cwd);
		CHECK(access("/etc", F_OK) && !access("/ready", F_OK), "root is not the chroot any more");
	}
	return 0;
}

int main(int argc, char **argv)
{
	void (*const kinds[])(void) = { plain_user, mixed_ids, user_with_capability, locked_down_root, chrooted };
	pid_t children[sizeof(kinds) / sizeof(*kinds)];

	victim_init(argc, argv);
	umask(0);
	MUST(!chmod(victim_folder, 0777) && (!mkdir(victim_path("below"), 0777) || errno == EEXIST));
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		children[i] = victim_child(child_main, (void *)kinds[i]);
	victim_ready();
	victim_wait();
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		victim_expect_exit(children[i], 0);
	return victim_done();
}
