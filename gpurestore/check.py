"""What this machine allows: each thing that a dump or a restore needs is tried, not looked up.

Every check is a function that returns None when all is well or says what is missing; :data:`CHECKS` names it, says how
to mend it and whether anything works without.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import signal
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gpurestore import capabilities
from gpurestore.syscalls import NR
from gpurestore.tasks.maps import PAGE_BYTES

_PTRACE_SEIZE, _PTRACE_DETACH = 0x4206, 17
# linux/userfaultfd.h and linux/fs.h
_PAGEMAP_SCAN = 0xC0606610
_KCMP_FILE = 0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the report. ``required``: no dump or restore works without."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Check:
    """What is tried, what it is needed for, and what to do when it is missing."""

    name: str
    probe: Callable[[], str | None]
    purpose: str
    remedy: str
    required: bool = True
    facts: Callable[[], str] | None = None  # what is there, where more can be said than that it is


def check_all() -> list[CheckResult]:
    """Try everything; takes a few milliseconds and changes nothing."""
    return [_run(check) for check in CHECKS]


def _run(check: Check) -> CheckResult:
    try:
        missing = check.probe()
    except OSError as error:
        missing = os.strerror(error.errno) if error.errno else str(error)
    if missing is None:
        detail = check.facts() if check.facts else check.purpose
        return CheckResult(check.name, True, check.required, detail, "")
    return CheckResult(check.name, False, check.required, f"{missing}; {check.purpose}", check.remedy)


def format_report(results: Iterable[CheckResult]) -> str:
    """The report as text, one line each, with the remedy below what is missing."""
    results = list(results)
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        state = "ok" if result.ok else "MISSING" if result.required else "missing"
        lines.append(f"{state:<8}{result.name:<{width}}  {result.detail}")
        if not result.ok:
            lines.append(f"{'':<{width + 10}}-> {result.remedy}")
    needed = [result.name for result in results if not result.ok and result.required]
    lines.append(f"\nnot ready: {', '.join(needed)}" if needed else "\nready to dump and restore")
    return "\n".join(lines) + "\n"


def _syscall(number: NR, *args: object) -> int:
    """The raw call; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = int(libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, os.strerror(number_of_error))
    return result


class _Child:
    """A child that does nothing, to try things on."""

    def __enter__(self) -> int:
        self.pid = os.fork()
        if self.pid == 0:
            while True:
                signal.pause()
        return self.pid

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _machine() -> str | None:
    return None if platform.machine() == "x86_64" else f"this is {platform.machine()}"


def _kernel() -> str | None:
    release = platform.release()
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    return None if (major, minor) >= (5, 14) else f"this is {release}"


def _ptrace() -> str | None:
    with _Child() as pid:
        _syscall(NR.PTRACE, _PTRACE_SEIZE, pid, 0, 0)
    return None


def _yama() -> str | None:
    """0 or absent: any own process; 1: own descendants, or with the capability; 2: capability; 3: nobody."""
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except FileNotFoundError:
        return None
    if scope == 0 or (scope < 3 and capabilities.holds("SYS_PTRACE")):
        return None
    return f"kernel.yama.ptrace_scope is {scope}"


def _choose_pid() -> str | None:
    # Pid 1 is taken in every namespace: EEXIST shows that we were allowed to ask for it.
    pids = (ctypes.c_int * 1)(1)
    fields = [0] * 11
    fields[4] = signal.SIGCHLD
    fields[8], fields[9] = ctypes.addressof(pids), 1
    args = struct.pack("=11Q", *fields)
    try:
        pid = _syscall(NR.CLONE3, ctypes.c_char_p(args), len(args))
    except OSError as error:
        if error.errno == errno.EEXIST:
            return None
        return "not permitted" if error.errno == errno.EPERM else os.strerror(error.errno or 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return None


def _checkpoint_feature() -> str | None:
    """What only a kernel with CONFIG_CHECKPOINT_RESTORE has: the files of mappings, and comparing descriptors."""
    if not Path("/proc/self/task", str(os.getpid()), "children").exists():
        return "the kernel was built without CONFIG_CHECKPOINT_RESTORE or CONFIG_PROC_CHILDREN"
    os.listdir("/proc/self/map_files")
    return None


def _kcmp() -> str | None:
    with _Child() as pid:
        if _syscall(NR.KCMP, os.getpid(), pid, _KCMP_FILE, 0, 0) != 0:
            return "it does not see that two processes share a description"
    return None


def _pidfd_getfd() -> str | None:
    with _Child() as pid:
        pidfd = os.pidfd_open(pid)
        try:
            os.close(_syscall(NR.PIDFD_GETFD, pidfd, 0, 0))
        except OSError as error:
            if error.errno != errno.EBADF:  # descriptor 0 may be closed; being told so is permission enough
                raise
        finally:
            os.close(pidfd)
    return None


def _pagemap_scan() -> str | None:
    region = ctypes.create_string_buffer(64)
    start = ctypes.addressof(region) & ~(PAGE_BYTES - 1)
    # struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, 4 category masks
    argument = bytearray(struct.pack("=12Q", 96, 0, start, start + PAGE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0))
    with open("/proc/self/pagemap", "rb") as pagemap:
        fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
    return None


def _cachestat() -> str | None:
    # struct cachestat_range: offset, length; struct cachestat: five counters
    with open("/proc/self/exe", "rb") as file:
        _syscall(NR.CACHESTAT, file.fileno(), struct.pack("=2Q", 0, 0), ctypes.create_string_buffer(40), 0)
    return None


def _move_pages() -> str | None:
    from gpurestore.tasks.memory import userfaultfd

    fd = _syscall(NR.USERFAULTFD, os.O_CLOEXEC | userfaultfd.USER_MODE_ONLY)
    try:
        fcntl.ioctl(fd, userfaultfd.UFFDIO_API, bytearray(userfaultfd.api(userfaultfd.MOVE)))
    finally:
        os.close(fd)
    return None


def _lazy() -> str | None:
    from gpurestore.tasks.memory.lazy import obstacle

    found = obstacle()
    return None if found is None else found.what


def _huge_pages() -> str | None:
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return "they are switched off" if "[never]" in text else None


def _locked_memory() -> str | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= 64 << 10 or capabilities.holds("SYS_RESOURCE"):
        return None
    return f"RLIMIT_MEMLOCK is {soft} bytes"


def _capability(name: str) -> Callable[[], str | None]:
    return lambda: None if capabilities.holds(name) else "we do not hold it"


def _user_namespace() -> str | None:
    """Whether an ordinary user could make a namespace; tried in a child that ends at once."""
    pid = os.fork()
    if pid == 0:
        code = errno.EPERM
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            code = 0 if libc.unshare(0x10000000 | 0x20000000) == 0 else ctypes.get_errno()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else os.strerror(code)


def _nvidia() -> str | None:
    from gpurestore.devplugins import cuda

    if not cuda.probe():
        return "no NVIDIA device"
    from gpurestore.devplugins.cuda.driver import describe

    return describe().problem


def _nvidia_driver() -> str:
    from gpurestore.devplugins.cuda.driver import describe

    return describe().text


_AS_ROOT = "run as root, or inside 'python -m gpurestore.namespaces -- COMMAND'"
_POLICY = "a container's seccomp profile forbids it: allow this system call there"

CHECKS = (
    Check("x86-64", _machine, "the agent and the register images are of this architecture", "use an x86-64 machine"),
    Check("kernel", _kernel, "5.14 or later", "install a kernel from 5.14 on"),
    Check("ptrace", _ptrace, "seizing the tasks of a tree", f"{_POLICY} (docker: --cap-add=SYS_PTRACE)"),
    Check(
        "yama",
        _yama,
        "tracing processes that are not our children",
        "as root: sysctl -w kernel.yama.ptrace_scope=0, or give CAP_SYS_PTRACE",
        required=False,
    ),
    Check("clone3 set_tid", _choose_pid, "giving restored tasks their old pids", _AS_ROOT),
    Check("CAP_CHECKPOINT_RESTORE", _capability("CHECKPOINT_RESTORE"), "choosing pids, exe links", _AS_ROOT, False),
    Check("CAP_SYS_ADMIN", _capability("SYS_ADMIN"), "covers the above", _AS_ROOT, False),
    Check("CAP_SYS_PTRACE", _capability("SYS_PTRACE"), "dumping the trees of other users", _AS_ROOT, False),
    Check(
        "CAP_SYS_RESOURCE",
        _capability("SYS_RESOURCE"),
        "raising hard limits, lowering oom_score_adj",
        "not needed as long as the tree has no limit above ours; as root: outside of a restricted container",
        required=False,
    ),
    Check(
        "user namespaces",
        _user_namespace,
        "how ordinary users restore",
        "as root: sysctl -w user.max_user_namespaces=15000 (Debian: kernel.unprivileged_userns_clone=1)",
        required=False,
    ),
    Check(
        "checkpoint support",
        _checkpoint_feature,
        "lists of children and the files behind mappings",
        "use a kernel with CONFIG_CHECKPOINT_RESTORE=y (all distributions have it)",
    ),
    Check("kcmp", _kcmp, "finding out which descriptors are shared", f"CONFIG_KCMP=y; {_POLICY}"),
    Check("pidfd_getfd", _pidfd_getfd, "looking at the tasks' descriptors", _POLICY),
    Check(
        "PAGEMAP_SCAN",
        _pagemap_scan,
        "finding used pages quickly; /proc/PID/pagemap is read otherwise",
        "install a kernel from 6.7 on",
        required=False,
    ),
    Check(
        "cachestat",
        _cachestat,
        "seeing which images are not in the page cache, to read them past it",
        "install a kernel from 6.5 on",
        required=False,
    ),
    Check(
        "lazy restore",
        _lazy,
        "restore --lazy: letting a tree run before its memory is there",
        "as root, outside of a container; a kernel with CONFIG_USERFAULTFD=y",
        required=False,
    ),
    Check(
        "UFFDIO_MOVE",
        _move_pages,
        "bringing memory back in huge pages",
        "install a kernel from 6.8 on with CONFIG_USERFAULTFD=y",
        required=False,
    ),
    Check(
        "huge pages",
        _huge_pages,
        "filling big memory several times faster",
        "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        required=False,
    ),
    Check("locked memory", _locked_memory, "trees that lock memory", "ulimit -l unlimited", required=False),
    Check(
        "NVIDIA GPU",
        _nvidia,
        "trees that compute there",
        "install the driver from 570 on",
        required=False,
        facts=_nvidia_driver,
    ),
)
