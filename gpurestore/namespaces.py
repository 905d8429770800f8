"""A user and pid namespace of one's own: how an ordinary user gets the rights that a restore needs.

    python -m gpurestore.namespaces -- COMMAND [ARGUMENT...]

runs COMMAND where it may choose pids (``clone3`` with ``set_tid``) and holds every capability over what is inside:
the same numeric user and group, a pid namespace with a small init as pid 1, and a fresh /proc. Dump and restore in
there work on the caller's own trees. Who has these rights already (root) runs COMMAND directly.

When COMMAND ends, whatever it left behind ends with the namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from gpurestore import capabilities
from gpurestore.errors import GpurestoreError, PrivilegeError

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_PR_SET_PDEATHSIG = 1
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_NR_CAPGET, _NR_CAPSET = 125, 126
_CAP_VERSION_3 = 0x20080522


# Sent by people, schedulers and shells. Those that stop and continue a job act on each process by themselves.
_FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
_SI_KERNEL = 0x80


def may_restore() -> bool:
    """Whether this process holds a capability with which a restore can give tasks their old pids."""
    return capabilities.holds("SYS_ADMIN", "CHECKPOINT_RESTORE")


def require_restore_rights() -> None:
    """Raise PrivilegeError, which says what to do, unless this process may restore."""
    if not may_restore():
        raise PrivilegeError(
            "no right to restore: giving tasks their old pids needs CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN); run as "
            "root, or run the job, its dump and its restore inside 'python -m gpurestore.namespaces -- COMMAND'"
        )


def run(command: Sequence[str]) -> int:
    """Run ``command`` in namespaces of its own and return its exit code (128 + n when signal n ended it).

    Raises PrivilegeError, with the caller as it was, where that is not allowed. For the main thread: signals to the
    caller are passed on meanwhile. If the caller is killed, everything inside ends.
    """
    reports, report = os.pipe()  # what went wrong inside; empty when nothing did
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    caller = os.getpid()
    try:
        # A process in between moves into the namespaces, so that the caller stays where it is.
        mover = os.fork()
        if mover == 0:
            _leave_with(report, lambda: _move_and_start(command, report, before, caller))
        os.close(report)
        code = _wait_and_forward(mover)
        complaint = os.read(reports, 4096).decode()
    finally:
        os.close(reports)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if complaint:
        raise PrivilegeError(complaint)
    return code


def _leave_with(report: int, work: Callable[[], int]) -> NoReturn:
    """End this forked process with the code that ``work`` returns, or report what hinders it."""
    code = 1
    try:
        code = work()
    except GpurestoreError as error:
        os.write(report, str(error).encode()[:4096])
    except OSError as error:
        os.write(report, f"no namespace for an ordinary user: {error}; {_remedy()}, or run as root".encode()[:4096])
    finally:
        os._exit(code)


def _move_and_start(command: Sequence[str], report: int, mask: Iterable[int], caller: int) -> int:
    """The process in between: enter the namespaces, start pid 1 there, wait for it."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != caller:  # it died before we asked to be told
        return 1
    init = os.fork()
    if init == 0:
        _leave_with(report, lambda: _be_init(command, report, mask))
    os.close(report)
    return _wait_and_forward(init)


def _be_init(command: Sequence[str], report: int, mask: Iterable[int]) -> int:
    """Pid 1: prepare what is ours alone, start the command, reap until it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _fresh_proc()
    _keep_capabilities()
    child = os.fork()
    if child == 0:
        _exec(command, mask)
    os.close(report)
    return _wait_and_forward(child)


def _exec(command: Sequence[str], mask: Iterable[int]) -> NoReturn:
    """Become the command; the codes 127 and 126 as shells have them."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"gpurestore: cannot run {command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(127 if error.errno == errno.ENOENT else 126)
    finally:
        os._exit(126)


def _wait_and_forward(child: int) -> int:
    """Reap everything and pass signals on until ``child`` ends; its exit code. The signals are blocked."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid:
            continue
        info = signal.sigwaitinfo({*_FORWARDED, signal.SIGCHLD})
        # What the terminal sends (Ctrl-C) goes to every process of the job anyway.
        if info.si_signo != signal.SIGCHLD and info.si_code != _SI_KERNEL:
            os.kill(child, info.si_signo)


def _fresh_proc() -> None:
    libc = _libc()
    if libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        raise PrivilegeError(f"no mounts of one's own in a user namespace: {_last_error()}; {_remedy()}")
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if libc.mount(b"proc", b"/proc", b"proc", flags, None) != 0:
        raise PrivilegeError(
            f"cannot mount /proc in a user namespace: {_last_error()}; this container hides parts of /proc: start it "
            "with 'podman run --security-opt unmask=ALL' or 'docker run --security-opt systempaths=unconfined', "
            "or run as root with CAP_SYS_ADMIN"
        )


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _keep_capabilities() -> None:
    """Make all capabilities ambient, so that they survive exec although the user is not root."""
    libc = _libc()
    header = _CapHeader(_CAP_VERSION_3, 0)
    data = (_CapData * 2)()
    if libc.syscall(_NR_CAPGET, ctypes.byref(header), data) != 0:
        raise PrivilegeError(f"cannot read capabilities: {_last_error()}")
    for word in data:
        word.inheritable = word.permitted
    if libc.syscall(_NR_CAPSET, ctypes.byref(header), data) != 0:
        raise PrivilegeError(f"cannot keep capabilities over exec: {_last_error()}")
    permitted = data[0].permitted | data[1].permitted << 32
    for capability in range(permitted.bit_length()):
        if permitted >> capability & 1:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def _unshare(flags: int) -> None:
    if _libc().unshare(flags) == 0:
        return
    raise PrivilegeError(f"no user namespace for an ordinary user: {_last_error()}; {_remedy()}, or run as root")


def _remedy() -> str:
    """Which switch of this machine forbids user namespaces, and how root turns it."""
    for name, bad in (
        ("kernel.unprivileged_userns_clone", "0"),
        ("user.max_user_namespaces", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            value = Path("/proc/sys", *name.split(".")).read_text().strip()
        except OSError:
            continue
        if value == bad:
            good = {"kernel.unprivileged_userns_clone": "1", "user.max_user_namespaces": "15000"}.get(name, "0")
            return f"{name} is {value}: as root, 'sysctl -w {name}={good}'"
    return "a container's seccomp or security policy forbids it: allow unshare(CLONE_NEWUSER) there"


def _prctl(option: int, *args: int) -> None:
    words = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    if _libc().prctl(option, *words) != 0:
        raise PrivilegeError(f"prctl {option}: {_last_error()}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())


def main(argv: Sequence[str]) -> int:
    """The command line of this module."""
    command = list(argv[1:] if argv[:1] == ["--"] else argv)
    if not command or command[0] in ("-h", "--help"):
        sys.stderr.write("usage: python -m gpurestore.namespaces -- COMMAND [ARGUMENT...]\n")
        return 0 if command else 2
    try:
        if may_restore():
            os.execvp(command[0], command)
        return run(command)
    except GpurestoreError as error:
        sys.stderr.write(f"gpurestore: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"gpurestore: cannot run {command[0]}: {error.strerror}\n")
        return 127 if error.errno == errno.ENOENT else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
