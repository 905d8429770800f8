"""The process tree: who is whose child, in which session and process group, and how to make it again.

A session cannot be joined, only inherited or founded. So a child whose session is older than the one its parent leads
is born before the parent founds it, and a tree in which that is not possible is refused at dump. A group can be joined
as long as somebody is in it: for a group whose leader is gone a helper takes the leader's pid for a moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.batch import Call, Data, Out
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import procfs, signals
from gpurestore.tasks.calls import prctl, set_name

if TYPE_CHECKING:
    from gpurestore.tasks.frozen import FrozenTree

OUTSIDE = 0  # stands for whatever session or group the restorer is in
_PR_SET_DUMPABLE = 4
_WALL = 0x40000000
_SIG_UNBLOCK = 1
_RLIMIT_CORE = 4
# Signals whose default action does not end a process: nobody can have died of them.
_HARMLESS = frozenset({17, 18, 19, 20, 21, 22, 23, 28})
_CORE_DUMPED = 0x80
_PID_LIMIT = 1 << 22
TASK_ALIVE, TASK_DEAD, TASK_STOPPED = 1, 2, 3
DEAD = (TASK_DEAD, 6)  # 6: CRIU's name for a zombie that it still looks at


class Birth(NamedTuple):
    """``parent``'s agent clones ``pid``; None: the main process forks it. A helper is no task of the images."""

    pid: int
    parent: int | None
    exit_signal: int = signals.SIGCHLD
    helper: bool = False


class Run(NamedTuple):
    """``pid`` runs ``calls`` in its leader. With ``exits`` the last call does not return: wait until it is a zombie."""

    pid: int
    calls: tuple[Call, ...]
    exits: bool = False


@dataclass(slots=True)
class TreePlan:
    """``tree``: births and sessions. ``groups``: process groups, once all are born. ``zombies`` die when the rest is
    done. All of that comes before the tasks' late plans (which throw the resulting SIGCHLD away); see
    :mod:`gpurestore.tasks.births` for when each step is done."""

    tree: list[Birth | Run] = field(default_factory=list)
    groups: list[Birth | Run] = field(default_factory=list)
    zombies: list[Run] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def steps(self) -> list[Birth | Run]:
        """All but the deaths of zombies, in an order that works."""
        return [*self.tree, *self.groups]

    @property
    def births(self) -> list[Birth]:
        """Those of :attr:`steps` that make a task."""
        return [step for step in self.steps if isinstance(step, Birth)]


class Taken(NamedTuple):
    """A pid that the images need and somebody has. ``of`` is the parent's pid where ``is_zombie``."""

    pid: int
    description: str
    is_zombie: bool
    of: int


# ---- dump ----


def collect(tree: FrozenTree, shell_job: bool = False) -> list[pb.pstree_entry]:
    """One entry per task, parents first. What cannot be made again is added to ``tree.findings``."""
    entries = []
    for task in tree.tasks.values():
        tids = [thread.tid for thread in task.threads] or [task.pid]
        ppid = task.ppid if task.ppid in tree.tasks else 0
        entries.append(pb.pstree_entry(pid=task.pid, ppid=ppid, pgid=task.pgid, sid=task.sid, threads=tids))
    root = entries[0]
    pids = {e.pid for e in entries}
    if not shell_job and (root.sid not in pids or root.pgid not in pids):
        what = f"session {root.sid}, group {root.pgid}" if root.pgid not in pids else f"session {root.sid}"
        why = "the leader is outside the tree; -j (--shell-job) lets the restored tree join the restorer's"
        tree.findings.append(Finding(f"pid {root.pid}", what, why))
    dead = {t.pid: t.exit_code for t in tree.tasks.values() if t.zombie}
    tree.findings.extend(_plan_tree(entries, {}).findings)
    for pid, status in dead.items():
        if status & _CORE_DUMPED:
            what = "a zombie that dumped core"
            tree.findings.append(Finding(f"pid {pid}", what, "that status cannot be given to a restored zombie"))
    return entries


# ---- restore ----


def checked(entries: Sequence[pb.pstree_entry]) -> list[pb.pstree_entry]:
    """The entries as our own dumps write them: a leader is first of its threads, and a zombie its only one (CRIU
    writes any number there). Raises ImageError for what is no tree: entries come from a file."""
    if not entries:
        raise ImageError("pstree.img: no task in it")
    seen: set[int] = set()
    tids: set[int] = set()
    result = []
    for number, entry in enumerate(entries):
        if not 0 < entry.pid < _PID_LIMIT or entry.pid in seen:
            raise ImageError(f"pstree.img: pid {entry.pid} is impossible or there twice")
        if (entry.ppid in seen) == (number == 0):
            raise ImageError(f"pstree.img: pid {entry.pid} has parent {entry.ppid}, which is not before it")
        own = [t for t in entry.threads if t != entry.pid] if entry.pid in entry.threads else []
        if tids & {entry.pid, *own} or len(own) != len(set(own)) or any(not 0 < t < _PID_LIMIT for t in own):
            raise ImageError(f"pstree.img: thread ids of pid {entry.pid} are impossible or there twice")
        if entry.sid >= _PID_LIMIT or entry.pgid >= _PID_LIMIT:
            raise ImageError(f"pstree.img: session or group of pid {entry.pid} is impossible")
        seen.add(entry.pid)
        tids.update((entry.pid, *own))
        result.append(
            pb.pstree_entry(pid=entry.pid, ppid=entry.ppid, pgid=entry.pgid, sid=entry.sid, threads=[entry.pid, *own])
        )
    return result


def plan(
    entries: Sequence[pb.pstree_entry],
    cores: Mapping[int, pb.core_entry],
    exit_signals: Mapping[int, int] | None = None,
) -> TreePlan:
    """How to make the tree. ``cores`` are those of the leaders; ``exit_signals`` those that are not SIGCHLD."""
    entries = checked(entries)
    planned = _plan_tree(entries, exit_signals or {})
    for entry in entries:
        tc = cores[entry.pid].tc
        if tc.task_state in DEAD:
            planned.zombies.append(Run(entry.pid, tuple(_plan_death(entry.pid, tc)), exits=True))
    return planned


def _plan_death(pid: int, tc: pb.task_core_entry) -> list[Call]:
    calls = [set_name(tc.comm)]
    signal = tc.exit_code & 0x7F
    if not signal:
        return [*calls, Call(NR.EXIT_GROUP, (tc.exit_code >> 8 & 0xFF,), f"end with status {tc.exit_code >> 8 & 0xFF}")]
    if signal in _HARMLESS or signal > signals.NR_SIGNALS:
        raise ImageError(f"core-{pid}.img: a zombie killed by signal {signal}, which kills nobody")
    calls.append(prctl(_PR_SET_DUMPABLE, 0, what="leave no core dump"))
    calls.append(Call(NR.PRLIMIT64, (0, _RLIMIT_CORE, Data(bytes(16)), 0), "leave no core dump"))
    if signal != signals.SIGKILL:
        calls.append(signals.default_action(signal))
    calls.append(Call(NR.KILL, (pid, signal), f"die of signal {signal}"))
    if signal != signals.SIGKILL:
        mask = Data((1 << signal - 1).to_bytes(8, "little"))
        calls.append(Call(NR.RT_SIGPROCMASK, (_SIG_UNBLOCK, mask, 0, 8), f"let signal {signal} in"))
    return calls


class _Tree:
    """The entries with sessions and groups outside of the tree folded into OUTSIDE."""

    def __init__(self, entries: Sequence[pb.pstree_entry]) -> None:
        self.order = [e.pid for e in entries]
        self.parent = {e.pid: e.ppid for e in entries}
        self.children: dict[int, list[int]] = {e.pid: [] for e in entries}
        for entry in entries[1:]:
            if entry.ppid in self.children:
                self.children[entry.ppid].append(entry.pid)
        root = entries[0]
        self.root = root.pid
        outside_sid = root.sid if root.sid not in self.children else OUTSIDE
        outside_pgid = root.pgid if root.pgid not in self.children else OUTSIDE
        self.session = {e.pid: OUTSIDE if e.sid == outside_sid else e.sid for e in entries}
        self.group = {e.pid: OUTSIDE if e.pgid == outside_pgid else e.pgid for e in entries}
        self.findings: list[Finding] = []
        self.born_in = self._birth_sessions()

    def leads_session(self, pid: int) -> bool:
        return self.session[pid] == pid

    def _birth_sessions(self) -> dict[int, int | None]:
        """The session that each task must find at its birth; None: any."""
        needed: dict[int, int | None] = {}
        for pid in reversed(self.order):
            if not self.leads_session(pid):
                needed[pid] = self.session[pid]
                self._refuse(pid, [c for c in self.children[pid] if needed[c] not in (None, self.session[pid])], needed)
                continue
            older = [c for c in self.children[pid] if needed[c] not in (None, pid)]
            needed[pid] = needed[older[0]] if older else None
            self._refuse(pid, [c for c in older if needed[c] != needed[pid]], needed)
        if needed[self.root] not in (None, OUTSIDE):
            self._refuse(self.root, [self.root], needed)
        return needed

    def _refuse(self, parent: int, children: Iterable[int], needed: Mapping[int, int | None]) -> None:
        for child in children:
            what = f"session {needed[child]}"
            why = f"it cannot have inherited that from its parent {parent}: it was adopted, or the leader is gone"
            self.findings.append(Finding(f"pid {child}", what, why))


def _plan_tree(entries: Sequence[pb.pstree_entry], exit_signals: Mapping[int, int]) -> TreePlan:
    tree = _Tree(entries)
    planned = TreePlan(findings=tree.findings)
    if planned.findings:
        return planned
    planned.tree.append(Birth(tree.root, None))
    waiting = [tree.root]
    for pid in waiting:
        children = tree.children[pid]
        early = [c for c in children if tree.leads_session(pid) and tree.born_in[c] not in (None, pid)]
        for child in early:
            planned.tree.append(Birth(child, pid, exit_signals.get(child, signals.SIGCHLD)))
        if tree.leads_session(pid):
            planned.tree.append(Run(pid, (Call(NR.SETSID, (), f"found session {pid}", want=pid),)))
        late = [c for c in children if c not in set(early)]
        for child in late:
            planned.tree.append(Birth(child, pid, exit_signals.get(child, signals.SIGCHLD)))
        waiting += [*early, *late]
    _plan_groups(tree, planned)
    return planned


def _inherited_groups(planned: TreePlan) -> dict[int, int]:
    """The group that each task is in once all are born: its parent's at that time, or that of the session it leads."""
    groups: dict[int, int] = {}
    for step in planned.tree:
        if isinstance(step, Birth):
            groups[step.pid] = OUTSIDE if step.parent is None else groups[step.parent]
        else:
            groups[step.pid] = step.pid
    return groups


def _plan_groups(tree: _Tree, planned: TreePlan) -> None:
    """Leaders found their groups first, then the others join, then helpers go. Who was born into its group is there."""
    pids = set(tree.order)
    born_into = _inherited_groups(planned)
    founders = [p for p in tree.order if tree.group[p] == p and not tree.leads_session(p)]
    planned.groups.extend(_set_group(p, p) for p in founders)
    helpers: dict[int, int] = {}
    for pid in tree.order:
        group = tree.group[pid]
        if group not in pids and group != OUTSIDE and group not in helpers:
            session = tree.session[pid]
            helpers[group] = session if session != OUTSIDE else tree.root
            if session not in pids and tree.leads_session(tree.root):
                planned.findings.append(Finding(f"pid {pid}", f"group {group}", "its session is not in the tree"))
    for helper, parent in helpers.items():
        planned.groups += [Birth(helper, parent, exit_signal=0, helper=True), _set_group(helper, helper)]
    for pid in tree.order:
        group = tree.group[pid]
        if group in pids and tree.session[group] != tree.session[pid]:
            planned.findings.append(Finding(f"pid {pid}", f"group {group}", "its leader is in another session"))
        elif group not in (pid, OUTSIDE, born_into[pid]) and not tree.leads_session(pid):
            planned.groups.append(_set_group(pid, group))
    for helper, parent in helpers.items():
        planned.groups.append(Run(helper, (Call(NR.EXIT_GROUP, (0,), "helper ends"),), exits=True))
        reap = Call(NR.WAIT4, (helper, Out(8), _WALL, 0), f"reap helper {helper}", want=helper)
        planned.groups.append(Run(parent, (reap,)))


def _set_group(pid: int, group: int) -> Run:
    what = f"found group {group}" if pid == group else f"join group {group}"
    return Run(pid, (Call(NR.SETPGID, (0, 0 if pid == group else group), what, want=0),))


# ---- are the pids free? ----


def taken(entries: Sequence[pb.pstree_entry]) -> list[Taken]:
    """Who has the pids that the images need: as a process, a thread, or the name of a group or session."""
    entries = checked(entries)
    pids = {e.pid for e in entries}
    needed = pids | {tid for e in entries for tid in e.threads}
    needed |= {step.pid for step in _plan_tree(entries, {}).births}
    found: dict[int, Taken] = {}
    for stat in procfs.processes_named(needed):
        name = stat.comm.decode("utf-8", "replace")
        if stat.pid in needed:
            zombie = stat.state == "Z"
            text = f"zombie of pid {stat.ppid}{_name_of(stat.ppid)}" if zombie else f"process {name!r}"
            found[stat.pid] = Taken(stat.pid, text, zombie, stat.ppid)
        for number, kind in ((stat.pgid, "group"), (stat.sid, "session")):
            if number in needed and number not in found:
                zombie = stat.state == "Z"
                text = f"{kind} of {'zombie' if zombie else 'process'} {stat.pid} {name!r}"
                found[number] = Taken(number, text, zombie, stat.ppid)
    for number in needed - found.keys():
        if os.path.exists(f"/proc/{number}"):  # threads are not listed, but can be looked up
            found[number] = Taken(number, "a thread of another process", False, 0)
    return sorted(found.values())


def _name_of(pid: int) -> str:
    try:
        return f" {procfs.comm(pid).decode('utf-8', 'replace')!r}"
    except Exception:  # it ended meanwhile, or is none of our business; the pid says enough
        return ""
