"""Who restores: what the restoring process has and may do. Restored tasks start out with all of it.

Plans depend on it only through this value, so they stay pure; tests make their own.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import NamedTuple

from gpurestore.capabilities import CAP
from gpurestore.tasks import cpu, procfs
from gpurestore.tasks.credentials import Credentials, from_status
from gpurestore.tasks.scheduling import Rights

_NS_GET_USERNS = 0xB701
_RLIMIT_NICE, _RLIMIT_RTPRIO = 13, 14


class Restorer(NamedTuple):
    """See above; :meth:`here` is the real one."""

    credentials: Credentials
    limits: tuple[tuple[int, int], ...]
    nice: int = 0
    oom_score_adj: int = 0
    in_user_namespace: bool = False
    setgroups_allowed: bool = True
    owns_pid_namespace: bool = True
    uid_ranges: tuple[tuple[int, int], ...] = ((0, 1 << 32),)  # (first, count) of the ids that exist here
    gid_ranges: tuple[tuple[int, int], ...] = ((0, 1 << 32),)
    pid_max: int = 1 << 22
    cpus: frozenset[int] = frozenset()
    kernel: tuple[int, int] = (6, 18)

    def may(self, cap: str) -> bool:
        """Whether a capability counts that the kernel wants to see in the first user namespace."""
        return self.credentials.has(cap) and not self.in_user_namespace

    @property
    def may_set_pids(self) -> bool:
        """Whether restored tasks can get their old pids."""
        capable = self.credentials.effective & (1 << CAP["SYS_ADMIN"] | 1 << CAP["CHECKPOINT_RESTORE"])
        return bool(capable) and self.owns_pid_namespace

    @property
    def scheduling(self) -> Rights:
        """What tasks may be given of priorities and CPUs."""
        any_priority = self.may("SYS_NICE")
        return Rights(any_priority, self.limits[_RLIMIT_NICE][0], self.limits[_RLIMIT_RTPRIO][0], self.cpus)

    @property
    def can_choose_timer_ids(self) -> bool:
        """PR_TIMER_CREATE_RESTORE_IDS, Linux 6.16; before, ids are counted up to."""
        return self.kernel >= (6, 16)

    @classmethod
    def here(cls) -> Restorer:
        """This process. Its securebits are not known: plans check them in the task."""
        pid = os.getpid()
        uid_ranges, gid_ranges = _id_map("uid"), _id_map("gid")
        return cls(
            from_status(procfs.status(pid), 0),
            tuple(procfs.limits(pid)),
            os.getpriority(os.PRIO_PROCESS, 0),
            procfs.oom_score_adj(pid),
            uid_ranges != ((0, (1 << 32) - 1),),
            _setgroups_allowed(),
            _owns_pid_namespace(),
            uid_ranges,
            gid_ranges,
            int(procfs.read_bytes("/proc/sys/kernel/pid_max")),
            procfs.online_cpus(),
            cpu.kernel_version(),
        )


def _id_map(kind: str) -> tuple[tuple[int, int], ...]:
    lines = procfs.read_text(f"/proc/self/{kind}_map").splitlines()
    return tuple((int(first), int(count)) for first, _, count in (line.split() for line in lines))


def _setgroups_allowed() -> bool:
    return procfs.read_bytes("/proc/self/setgroups").strip() == b"allow"


def _owns_pid_namespace() -> bool:
    """Pids can be chosen only by who has rights in the user namespace that owns the pid namespace."""
    fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.ioctl(fd, _NS_GET_USERNS))
    except OSError as error:
        return error.errno != errno.EPERM  # EPERM: it belongs to a namespace above ours
    finally:
        os.close(fd)
    return True
