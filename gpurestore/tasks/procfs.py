"""Parsers and readers for /proc: what the outside can tell about a task.

Parsers take text and are pure. Readers take a pid and raise NoSuchTaskError when the task is gone and PrivilegeError
when the kernel does not let us look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from typing import NamedTuple

from gpurestore.errors import NoSuchTaskError, PrivilegeError

UNLIMITED = (1 << 64) - 1
NR_LIMITS = 16

PF_EXITING = 0x00000004
PF_MEMALLOC_NOIO = 0x00080000
PF_LOCAL_THROTTLE = 0x00100000
PF_KTHREAD = 0x00200000


class Stat(NamedTuple):
    """/proc/PID/stat, the fields that anybody needs. ``exit_code`` reads 0 without the right to trace the task."""

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgid: int
    sid: int
    tty: int
    flags: int
    nice: int
    nr_threads: int
    start_time: int
    exit_signal: int
    exit_code: int


class Status(NamedTuple):
    """/proc/PID/status: ids are (real, effective, saved, file system) as seen from our user namespace."""

    state: str
    tgid: int
    pid: int
    ppid: int
    tracer: int
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    ns_pids: tuple[int, ...]
    nr_threads: int
    sig_blocked: int
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp: int
    umask: int
    cpus_allowed: str
    features: tuple[str, ...]
    untag_mask: int
    kernel_thread: bool


class TimerLine(NamedTuple):
    """One POSIX timer out of /proc/PID/timers. ``notify`` is the SIGEV_ value; ``target`` the pid or tid told."""

    timer_id: int
    signal: int
    value: int
    notify: int
    target: int
    to_thread: bool
    clock: int


def read_bytes(path: str) -> bytes:
    """A whole file of /proc."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchTaskError(f"{path}: the task is gone") from error
    except PermissionError as error:
        raise PrivilegeError(f"{path}: not permitted to look at this task") from error


def read_text(path: str) -> str:
    """The same as text; bytes that are none become surrogates."""
    return read_bytes(path).decode("utf-8", "surrogateescape")


def task_dir(pid: int, tid: int | None = None) -> str:
    """The folder of a process, or of one of its threads."""
    return f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"


def parse_stat(raw: bytes) -> Stat:
    """``/proc/PID/stat``."""
    # The name stands in brackets and may hold anything, brackets too: the last one ends it.
    opening, closing = raw.index(b"("), raw.rindex(b")")
    fields = raw[closing + 2 :].split()
    number = [0, *(int(f) for f in fields[1:])]
    return Stat(
        pid=int(raw[:opening]),
        comm=raw[opening + 1 : closing],
        state=fields[0].decode(),
        ppid=number[1],
        pgid=number[2],
        sid=number[3],
        tty=number[4],
        flags=number[6],
        nice=number[16],
        nr_threads=number[17],
        start_time=number[19],
        exit_signal=number[35],
        exit_code=number[49] if len(number) > 49 else 0,
    )


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in lines}


def _ids(text: str) -> tuple[int, int, int, int]:
    real, effective, saved, filesystem = map(int, text.split())
    return real, effective, saved, filesystem


def parse_status(text: str) -> Status:
    field = _fields(text)
    return Status(
        state=field["State"][:1],
        tgid=int(field["Tgid"]),
        pid=int(field["Pid"]),
        ppid=int(field["PPid"]),
        tracer=int(field["TracerPid"]),
        uids=_ids(field["Uid"]),
        gids=_ids(field["Gid"]),
        groups=tuple(map(int, field["Groups"].split())),
        ns_pids=tuple(map(int, field.get("NSpid", field["Pid"]).split())),
        nr_threads=int(field["Threads"]),
        sig_blocked=int(field["SigBlk"], 16),
        cap_inheritable=int(field["CapInh"], 16),
        cap_permitted=int(field["CapPrm"], 16),
        cap_effective=int(field["CapEff"], 16),
        cap_bounding=int(field["CapBnd"], 16),
        cap_ambient=int(field.get("CapAmb", "0"), 16),
        no_new_privs=field.get("NoNewPrivs", "0") != "0",
        seccomp=int(field.get("Seccomp", "0")),
        umask=int(field.get("Umask", "22"), 8),
        cpus_allowed=field.get("Cpus_allowed_list", ""),
        features=tuple(field.get("x86_Thread_features", "").split()),
        untag_mask=int(field.get("untag_mask", hex(UNLIMITED)), 16),
        kernel_thread=field.get("Kthread", "0") == "1",
    )


def parse_limits(text: str) -> list[tuple[int, int]]:
    """(soft, hard) in the order of the RLIMIT_ numbers, which is the order of the lines."""
    limits = []
    for line in text.splitlines()[1:]:
        soft, hard = line[26:].split()[:2]
        limits.append((_limit(soft), _limit(hard)))
    return limits


def _limit(word: str) -> int:
    return UNLIMITED if word == "unlimited" else int(word)


_NOTIFY = {"signal": 0, "none": 1, "thread": 2}


def parse_timers(text: str) -> list[TimerLine]:
    """Timers in ascending order of their ids."""
    timers = []
    blocks = text.split("ID: ")  # "ClockID: " ends a block and contains the separator as well
    for block in _timer_blocks(blocks):
        field = _fields("ID: " + block)
        signal, _, value = field["signal"].partition("/")
        notify, _, target = field["notify"].partition("/")
        kind, _, number = target.partition(".")
        timers.append(
            TimerLine(
                timer_id=int(field["ID"]),
                signal=int(signal),
                value=int(value, 16),
                notify=_NOTIFY[notify],
                target=int(number),
                to_thread=kind == "tid",
                clock=int(field["ClockID"]),
            )
        )
    return sorted(timers, key=lambda t: t.timer_id)


def _timer_blocks(pieces: list[str]) -> Iterator[str]:
    for body, clock in zip(pieces[1::2], pieces[2::2], strict=False):
        yield body + "ID: " + clock


def parse_cpu_list(text: str) -> frozenset[int]:
    """``0-3,8`` as numbers; also the format of NUMA node lists."""
    cpus: set[int] = set()
    for piece in filter(None, text.strip().split(",")):
        first, _, last = piece.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def format_cpu_list(cpus: frozenset[int]) -> str:
    """The inverse of :func:`parse_cpu_list`."""
    pieces: list[list[int]] = []
    for cpu in sorted(cpus):
        if pieces and pieces[-1][1] == cpu - 1:
            pieces[-1][1] = cpu
        else:
            pieces.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pieces)


def stat(pid: int, tid: int | None = None) -> Stat:
    """Of a process, or of one of its threads."""
    return parse_stat(read_bytes(f"{task_dir(pid, tid)}/stat"))


def status(pid: int, tid: int | None = None) -> Status:
    """Of a process, or of one of its threads."""
    return parse_status(read_text(f"{task_dir(pid, tid)}/status"))


def comm(pid: int, tid: int | None = None) -> bytes:
    """The raw name, which need not be valid text."""
    return read_bytes(f"{task_dir(pid, tid)}/comm")[:-1]


def threads(pid: int) -> list[int]:
    """Thread ids, the leader first."""
    try:
        tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchTaskError(f"pid {pid}: no such process") from error
    return [pid, *(t for t in tids if t != pid)] if pid in tids else tids


def children(pid: int) -> list[int]:
    """Pids of the children of every thread; complete only while the task is frozen."""
    found: set[int] = set()
    for tid in threads(pid):
        try:
            found.update(map(int, read_bytes(f"/proc/{pid}/task/{tid}/children").split()))
        except NoSuchTaskError:
            continue  # a thread that ended handed its children to another thread, which we also visit
    return sorted(found)


def limits(pid: int) -> list[tuple[int, int]]:
    """(soft, hard) by RLIMIT_ number."""
    return parse_limits(read_text(f"/proc/{pid}/limits"))


def timers(pid: int) -> list[TimerLine]:
    """The POSIX timers of a process, by id."""
    return parse_timers(read_text(f"/proc/{pid}/timers"))


def personality(pid: int, tid: int | None = None) -> int:
    """What personality(2) set."""
    return int(read_bytes(f"{task_dir(pid, tid)}/personality"), 16)


def oom_score_adj(pid: int) -> int:
    """-1000 to 1000."""
    return int(read_bytes(f"/proc/{pid}/oom_score_adj"))


def coredump_filter(pid: int) -> int | None:
    """None for a kernel without core dumps."""
    try:
        raw = read_bytes(f"/proc/{pid}/coredump_filter").strip()
    except NoSuchTaskError:
        return None
    return int(raw, 16) if raw else None


def merges_all_pages(pid: int) -> bool:
    """Whether PR_SET_MEMORY_MERGE is on; asking the task itself would need a right."""
    try:
        return b"ksm_merge_any: yes" in read_bytes(f"/proc/{pid}/ksm_stat")
    except NoSuchTaskError:
        return False  # a kernel without KSM


def security_label(pid: int, tid: int | None = None) -> str:
    """The LSM's label; empty where no LSM gives one."""
    try:
        with open(f"{task_dir(pid, tid)}/attr/current", "rb") as file:
            return file.read().rstrip(b"\0\n").decode("utf-8", "replace")
    except OSError:
        return ""


def all_pids() -> Iterator[int]:
    """Every process of our pid namespace, as far as we may know of it."""
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def processes_named(numbers: Set[int]) -> Iterator[Stat]:
    """Every process that we can see whose pid, group or session is in ``numbers``; one that ends meanwhile is left out.

    Asks with system calls first: a file of /proc costs the kernel ten times as much, for every process of the machine.
    """
    for pid in all_pids():
        try:
            if not numbers.isdisjoint((pid, os.getpgid(pid), os.getsid(pid))):
                yield stat(pid)
        except (ProcessLookupError, PermissionError, NoSuchTaskError, PrivilegeError):
            continue


def online_cpus() -> frozenset[int]:
    """The CPUs of the machine that run."""
    return parse_cpu_list(read_text("/sys/devices/system/cpu/online"))
