"""The handler of a lazy restore: a process that serves the page faults of tasks and fills the rest of their memory.

What comes lazily is decided in :mod:`gpurestore.tasks.lazy`.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gpurestore.batch import Call, Ref
from gpurestore.core import Cancel, check, ffi, lib, new_error
from gpurestore.errors import CoreError, Finding, GpurestoreError
from gpurestore.tasks.memory import userfaultfd
from gpurestore.tasks.memory.runs import default_jobs, u64

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder

Span = tuple[int, int]  # addresses [start, end)

# While faults are recorded the fill would hide them: it begins when there were none for so long.
_RECORD_QUIET_MS: Final = 1000

_FEATURES: Final = (
    userfaultfd.EVENT_FORK
    | userfaultfd.EVENT_REMAP
    | userfaultfd.EVENT_REMOVE
    | userfaultfd.MISSING_SHMEM
    | userfaultfd.EVENT_UNMAP
    | userfaultfd.THREAD_ID
)


class LazyView(NamedTuple):
    """A mapping that shows shared memory which comes late, from ``offset`` on."""

    start: int
    end: int
    shmid: int
    offset: int


@dataclass(frozen=True, slots=True)
class LazyPlan:
    """What of a task's memory comes late; or, with ``pid`` 0, an object of shared memory, whose addresses are offsets.

    Run i: ``nr_pages[i]`` at ``vaddrs[i]``, from page ``page_offsets[i]`` of file ``files[file_of[i]]`` on.
    """

    pid: int
    ranges: tuple[Span, ...]  # the mappings that pages are brought to, ascending
    order: tuple[Span, ...]  # of first need; the first ``nr_hot`` are in place before the task runs
    nr_hot: int
    files: tuple[str, ...]
    vaddrs: array[int]  # 'Q'
    nr_pages: array[int]  # 'Q'
    page_offsets: array[int]  # 'Q'
    file_of: array[int]  # 'I'
    total_bytes: int
    views: tuple[LazyView, ...] = ()
    shmid: int = 0

    @property
    def watched(self) -> list[Span]:
        """The mappings in which the task's missing pages are to be reported."""
        return sorted([*self.ranges, *((view.start, view.end) for view in self.views)])


@dataclass(frozen=True, slots=True)
class LazyStatus:
    """How far the handler is. Times are CLOCK_MONOTONIC in nanoseconds, 0 for what has not been."""

    done_bytes: int
    total_bytes: int
    lost_bytes: int  # of those done: nobody was there any more who wanted them
    nr_faults: int
    released_ns: int
    filled_ns: int
    ended: bool
    message: str  # what went wrong; the tree was killed then
    handler_pid: int
    keeper_pid: int


# ---- before anything is created


def obstacle() -> Finding | None:
    """Why this process may not restore lazily, if so. Forks can be followed only with a right over all processes."""
    err = new_error()
    if lib.gr_lazy_check(err) >= 0:
        return None
    if err.code == errno.EPERM:
        why = "it needs CAP_SYS_PTRACE in the first user namespace (run as root), or leave out --lazy"
    elif err.code == errno.ENOSYS:
        why = "this kernel was built without userfaultfd (CONFIG_USERFAULTFD); leave out --lazy"
    else:
        why = f"{ffi.string(err.context).decode()}: {os.strerror(err.code)}; leave out --lazy"
    return Finding("lazy restore", "page faults cannot be served", why)


# ---- in the task


def plan_userfaultfd() -> list[Call]:
    """Make a userfaultfd; the first result is its descriptor. Faults of the kernel are reported, too."""
    return [*userfaultfd.plan_open(os.O_NONBLOCK | os.O_CLOEXEC), *userfaultfd.plan_api(Ref(0), _FEATURES)]


def plan_register(uffd: int, ranges: Sequence[Span]) -> list[Call]:
    """Have missing pages of ``ranges`` reported. Nothing may have touched them before."""
    return userfaultfd.plan_register(uffd, ranges, userfaultfd.MISSING)


# ---- the handler


class LazyHandler:
    """The process that serves page faults and fills memory, as the one that started it sees it. Any thread may call."""

    def __init__(
        self,
        folder: ImageFolder,
        plans: Sequence[LazyPlan],
        addresses: Mapping[int, int] | None = None,
        *,
        jobs: int | None = None,
        report_fds: Sequence[int] = (),
        log_fd: int = -1,
        record_fd: int = -1,
    ) -> None:
        """Fork it. ``report_fds`` take the line that says why a tree was killed, ``log_fd`` the one of a good end.

        ``addresses``: where this process has mapped objects of shared memory, by shmid. They stay empty until then.
        """
        err, out = new_error(), ffi.new("struct gr_lazy **")
        with ExitStack() as stack:
            keep: list[Any] = []
            places = _Places(addresses or {}, {plan.shmid: i for i, plan in enumerate(plans) if not plan.pid})
            tasks = ffi.new("struct gr_lazy_task[]", [_task(folder, plan, places, stack, keep) for plan in plans])
            reports = ffi.new("int[]", list(report_fds))
            options = {
                "nr_threads": max(2, jobs or default_jobs()),
                "wait_for_ms": _RECORD_QUIET_MS if record_fd >= 0 else 0,
                "report_fds": reports,
                "nr_report_fds": len(report_fds),
                "log_fd": log_fd,
                "record_fd": record_fd,
            }
            c_options = ffi.new("struct gr_lazy_options *", options)
            check(lib.gr_lazy_start(tasks, len(plans), c_options, out, err), err)
        self._handle: Any = ffi.gc(out[0], lib.gr_lazy_destroy)

    def add(self, pid: int, uffd: int, cancel: Cancel | None = None) -> None:
        """Hand over a task's userfaultfd, a descriptor of ours; returns when its first pages are there. Blocks."""
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        self._check(lib.gr_lazy_add(self._handle, pid, uffd, flag, err), err)

    def release(self) -> None:
        """The tree runs: from now on the handler fills, and lives on without us. Blocks for a moment."""
        err = new_error()
        self._check(lib.gr_lazy_release(self._handle, err), err)

    def _check(self, result: int, err: Any) -> None:
        try:
            check(result, err)
        except CoreError as error:
            if error.errno == errno.EPIPE:
                raise GpurestoreError(error.context) from error
            raise

    def fileno(self) -> int:
        """A descriptor that becomes readable when the handler has ended."""
        return int(lib.gr_lazy_fd(self._handle))

    @property
    def status(self) -> LazyStatus:
        """How far it is."""
        raw = ffi.new("struct gr_lazy_status *")
        lib.gr_lazy_read(self._handle, raw)
        failed = raw.state == lib.GR_LAZY_FAILED
        return LazyStatus(
            done_bytes=raw.done_bytes,
            total_bytes=raw.total_bytes,
            lost_bytes=raw.lost_bytes,
            nr_faults=raw.nr_faults,
            released_ns=raw.released_ns,
            filled_ns=raw.filled_ns,
            ended=raw.state in (lib.GR_LAZY_FILLED, lib.GR_LAZY_ENDED, lib.GR_LAZY_FAILED),
            message=ffi.string(raw.message).decode(errors="replace") if failed else "",
            handler_pid=raw.handler_pid,
            keeper_pid=raw.keeper_pid,
        )

    def close(self) -> None:
        """Let go of it. Before the release it ends, with its tasks; afterwards it goes on."""
        ffi.release(self._handle)


class _Places(NamedTuple):
    """Objects of shared memory, by shmid: where they are mapped, and which of the tasks they are to the handler."""

    addresses: Mapping[int, int]
    numbers: Mapping[int, int]


def _task(folder: ImageFolder, plan: LazyPlan, places: _Places, stack: ExitStack, keep: list[Any]) -> Mapping[str, Any]:
    base = 0 if plan.pid else places.addresses[plan.shmid]
    fds = []
    for name in plan.files:
        fds.append(folder.open_raw(name))
        stack.callback(os.close, fds[-1])
    arrays = {
        "fds": ffi.new("int[]", fds),
        "vaddrs": u64(array("Q", [base + vaddr for vaddr in plan.vaddrs]) if base else plan.vaddrs),
        "nr_pages": u64(plan.nr_pages),
        "page_offsets": u64(plan.page_offsets),
        "files": ffi.from_buffer("uint32_t[]", plan.file_of),
        "ranges": ffi.new("struct gr_lazy_span[]", [(base + start, base + end) for start, end in plan.ranges]),
        "order": ffi.new("struct gr_lazy_span[]", [(base + start, base + end) for start, end in plan.order]),
        "views": ffi.new(
            "struct gr_lazy_view[]",
            [
                (view.start, view.end, places.addresses[view.shmid] + view.offset, places.numbers[view.shmid])
                for view in plan.views
            ],
        ),
    }
    keep.append(arrays)
    return {
        **arrays,
        "pid": plan.pid,
        "shmid": plan.shmid,
        "nr_views": len(plan.views),
        "nr_fds": len(fds),
        "nr_entries": len(plan.vaddrs),
        "nr_ranges": len(plan.ranges),
        "nr_order": len(plan.order),
        "nr_hot": plan.nr_hot,
    }
