"""Small tools for lists of calls: questions to a task with named answers, and joining plans that hold references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpurestore.batch import Arg, Call, CallResult, Data, Ref
from gpurestore.syscalls import NR

Questions = dict[str, Call]
Answers = Mapping[str, CallResult]

AT_FDCWD = -100
_O_WRONLY_CLOEXEC = 0o2000001
_PR_SET_NAME = 15


def join(plans: Iterable[list[Call]]) -> list[Call]:
    """One list out of several, with the references of each moved to where its calls now lie."""
    joined: list[Call] = []
    for plan in plans:
        start = len(joined)
        joined += [_moved(call, start) for call in plan] if start else plan
    return joined


def _moved(call: Call, start: int) -> Call:
    for arg in call.args:
        if isinstance(arg, Ref):
            return call._replace(args=tuple(Ref(a.index + start) if isinstance(a, Ref) else a for a in call.args))
    return call


def prctl(option: int, *args: Arg, what: str = "", want: int | None = None, may_fail: bool = False) -> Call:
    """A prctl with its unused arguments zero, which most options insist on."""
    padded = (*args, 0, 0, 0, 0)[:4]
    return Call(NR.PRCTL, (option, *padded), what, want, may_fail)


def set_name(comm: str | bytes) -> Call:
    """Give the thread its name. A message field that is not valid text reads as bytes, whatever its type says."""
    raw = comm if isinstance(comm, bytes) else comm.encode()
    what = f"take the name {raw.decode('utf-8', 'replace')!r}"
    return prctl(_PR_SET_NAME, Data(raw[:15].ljust(16, b"\0")), what=what)


def write_file(path: str, content: str, what: str) -> list[Call]:
    """Write one of the task's own /proc files."""
    payload = content.encode()
    return [
        Call(NR.OPENAT, (AT_FDCWD, Data(path.encode() + b"\0"), _O_WRONLY_CLOEXEC, 0), what),
        Call(NR.WRITE, (Ref(0), Data(payload), len(payload)), what, want=len(payload)),
        Call(NR.CLOSE, (Ref(0),), what),
    ]
