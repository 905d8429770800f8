"""Looking at, waiting for and ending processes. Nothing here trusts a parent-child relation that it can check."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable

PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.003


def become_subreaper() -> None:
    """Orphans of dumped and restored trees come to this process, which can then reap them at once.

    Otherwise they would go to pid 1, which may reap late; until then their pids stay taken.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait for a state, not for a time; the limit only ends a test that would hang."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)


def stat_fields(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the state on (field 3), or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def state(pid: int) -> str | None:
    """One letter as in ``ps``; None when there is no such process."""
    fields = stat_fields(pid)
    return fields[0] if fields else None


def parent(pid: int) -> int | None:
    """The parent's pid."""
    fields = stat_fields(pid)
    return int(fields[1]) if fields else None


def alive(pid: int) -> bool:
    """There is such a process and it is not a zombie."""
    return state(pid) not in (None, "Z", "X")


def all_pids() -> list[int]:
    """Every process that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def tree(root: int) -> list[int]:
    """``root`` and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        above = parent(pid)
        if above is not None:
            children.setdefault(above, []).append(pid)
    found = [root]
    for pid in found:
        found.extend(sorted(children.get(pid, ())))
    return found


def tracer(pid: int) -> int:
    """Who traces ``pid``: 0 when nobody does or it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("TracerPid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def reap(pid: int) -> int | None:
    """Wait status of ``pid`` when it is our dead child; else None."""
    try:
        got, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return status if got == pid else None


def wait_gone(pids: Iterable[int], timeout_s: float = 20.0) -> None:
    """Wait until none of ``pids`` is taken, reaping those that came to this process."""
    left = set(pids)

    def gone() -> bool:
        for pid in list(left):
            reap(pid)
            if state(pid) is None:
                left.discard(pid)
        return not left

    wait_until(gone, f"gone: {sorted(pids)}", timeout_s)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL every one of ``pids`` that is there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def end_all_below(keep: Iterable[int] = ()) -> list[int]:
    """End every descendant of this process except ``keep``; returns those that were there, zombies included."""
    kept = {os.getpid(), *keep}
    leftovers = [pid for pid in tree(os.getpid()) if pid not in kept]
    remaining = leftovers
    while remaining:
        kill(remaining)
        for pid in remaining:
            reap(pid)
        remaining = [pid for pid in tree(os.getpid()) if pid not in kept]
        if remaining:
            time.sleep(_POLL_S)
    return leftovers
