"""Credentials of a thread: ids, groups, capability sets, securebits, no_new_privs.

The kernel ties these together: leaving uid 0 clears capabilities, changing ids clears the parent-death signal, and
nearly every change needs a right that a later change takes away. :func:`plan` orders the calls accordingly and makes
none at all for what the restorer already has, so that an unprivileged user can restore his own tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.batch import Call, Data
from gpurestore.capabilities import CAP, cap_names
from gpurestore.errors import Finding, ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks.calls import Answers, Questions, prctl

if TYPE_CHECKING:
    from gpurestore.images import pb
    from gpurestore.tasks.procfs import Status

PR_SET_KEEPCAPS, PR_CAPBSET_DROP = 8, 24
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 47, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522
_KEEP_CAPS_BIT = 4
_U32 = (1 << 32) - 1


class Credentials(NamedTuple):
    """Ids are (real, effective, saved, file system); capability sets are masks."""

    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...] = ()
    inheritable: int = 0
    permitted: int = 0
    effective: int = 0
    bounding: int = 0
    ambient: int = 0
    securebits: int = 0
    no_new_privs: bool = False

    def has(self, cap: str) -> bool:
        """Whether a capability, as named in :data:`~gpurestore.capabilities.CAP`, is effective."""
        return bool(self.effective >> CAP[cap] & 1)


def from_status(status: Status, securebits: int) -> Credentials:
    """What /proc tells; of securebits it tells nothing."""
    return Credentials(
        status.uids,
        status.gids,
        status.groups,
        status.cap_inheritable,
        status.cap_permitted,
        status.cap_effective,
        status.cap_bounding,
        status.cap_ambient,
        securebits,
        status.no_new_privs,
    )


def from_message(entry: pb.creds_entry) -> Credentials:
    """Out of an image. Raises ImageError where they are impossible."""
    groups = tuple(entry.groups)
    if len(groups) > 65536:
        raise ImageError(f"core image: {len(groups)} groups, the kernel knows 65536")
    return Credentials(
        (entry.uid, entry.euid, entry.suid, entry.fsuid),
        (entry.gid, entry.egid, entry.sgid, entry.fsgid),
        groups,
        _mask(entry.cap_inh),
        _mask(entry.cap_prm),
        _mask(entry.cap_eff),
        _mask(entry.cap_bnd),
        _mask(entry.cap_amb),
        entry.secbits,
        bool(entry.no_new_privs),
    )


def _mask(words: Iterable[int]) -> int:
    low, high, *_ = [*words, 0, 0]
    return low | high << 32


def fill(entry: pb.creds_entry, creds: Credentials) -> None:
    """Into an image."""
    entry.uid, entry.euid, entry.suid, entry.fsuid = creds.uids
    entry.gid, entry.egid, entry.sgid, entry.fsgid = creds.gids
    entry.groups.extend(creds.groups)
    entry.secbits = creds.securebits
    entry.no_new_privs = int(creds.no_new_privs)
    for words, mask in (
        (entry.cap_inh, creds.inheritable),
        (entry.cap_prm, creds.permitted),
        (entry.cap_eff, creds.effective),
        (entry.cap_bnd, creds.bounding),
        (entry.cap_amb, creds.ambient),
    ):
        words.extend((mask & _U32, mask >> 32))


def questions() -> Questions:
    """What every thread is asked."""
    return {"securebits": prctl(PR_GET_SECUREBITS, what="read securebits")}


def collect(status: Status, answers: Answers) -> Credentials:
    """Of one thread."""
    return from_status(status, answers["securebits"].result)


def plan(want: Credentials, have: Credentials) -> list[Call]:
    """Calls that turn ``have`` into ``want``. ``have.securebits`` is not relied on: /proc does not tell it."""
    calls: list[Call] = []
    uids, gids = want.uids != have.uids, want.gids != have.gids
    caps = (want.inheritable, want.permitted, want.effective) != (have.inheritable, have.permitted, have.effective)
    if want.groups != have.groups:
        payload = Data(struct.pack(f"={len(want.groups)}I", *want.groups)) if want.groups else 0
        calls.append(Call(NR.SETGROUPS, (len(want.groups), payload), "set the supplementary groups"))
    drop = have.bounding & ~want.bounding
    if want.inheritable != have.inheritable or (drop and have.effective != have.permitted):
        calls.append(_capset(want.inheritable, have.permitted, have.permitted, "keep rights while credentials change"))
    lenient = want.no_new_privs
    for cap in _bits(drop):
        may_fail = lenient and not want.permitted >> cap & 1
        calls.append(prctl(PR_CAPBSET_DROP, cap, what=f"drop {cap_names(1 << cap)} for good", may_fail=may_fail))
    if uids or gids:
        calls.extend(_plan_ids(want, have, uids, gids))
    calls.extend(_plan_ambient(want, have, uids))
    calls.extend(_plan_securebits(want, uids))
    if caps or uids:
        calls.append(_capset(want.inheritable, want.permitted, want.effective, "set the capabilities"))
    if want.no_new_privs and not have.no_new_privs:
        calls.append(prctl(PR_SET_NO_NEW_PRIVS, 1, what="set no_new_privs"))
    return calls


def _bits(mask: int) -> list[int]:
    return [i for i in range(64) if mask >> i & 1]


def _capset(inheritable: int, permitted: int, effective: int, what: str) -> Call:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    words = []
    for shift in (0, 32):
        words += [effective >> shift & _U32, permitted >> shift & _U32, inheritable >> shift & _U32]
    return Call(NR.CAPSET, (Data(header), Data(struct.pack("=6I", *words))), what)


def _plan_ids(want: Credentials, have: Credentials, uids: bool, gids: bool) -> list[Call]:
    calls = []
    if gids:
        real, effective, saved, filesystem = want.gids
        calls.append(Call(NR.SETRESGID, (real, effective, saved), "set the group ids", want=0))
        if filesystem != effective:
            calls.append(Call(NR.SETFSGID, (filesystem,), "set the file system group id"))
            calls.append(Call(NR.SETFSGID, (-1,), "check the file system group id", want=filesystem))
    if uids:
        real, effective, saved, filesystem = want.uids
        calls.append(prctl(PR_SET_KEEPCAPS, 1, what="keep capabilities over the change of ids", may_fail=True))
        calls.append(Call(NR.SETRESUID, (real, effective, saved), "set the user ids", want=0))
        if filesystem != effective:
            calls.append(Call(NR.SETFSUID, (filesystem,), "set the file system user id"))
            calls.append(Call(NR.SETFSUID, (-1,), "check the file system user id", want=filesystem))
        if have.permitted:  # leaving uid 0 cleared the effective set
            calls.append(_capset(want.inheritable, have.permitted, have.permitted, "take capabilities back"))
    return calls


def _plan_ambient(want: Credentials, have: Credentials, uids: bool) -> list[Call]:
    # Before securebits, which may forbid raising, and before the last capset, which may lower what raising needs.
    if want.ambient == have.ambient and not (uids and want.ambient):
        return []
    calls = [prctl(PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, what="clear ambient capabilities")]
    for cap in _bits(want.ambient):
        calls.append(prctl(PR_CAP_AMBIENT, _AMBIENT_RAISE, cap, what=f"raise ambient {cap_names(1 << cap)}"))
    return calls


def _plan_securebits(want: Credentials, uids: bool) -> list[Call]:
    # /proc does not tell the restorer's own securebits, and setting needs a right even without a change:
    # try, then demand the right value. The keep-caps bit alone can be set by anybody.
    keep = want.securebits >> _KEEP_CAPS_BIT & 1
    calls = [prctl(PR_SET_KEEPCAPS, keep, what="set keepcaps", may_fail=True)] if uids or keep else []
    calls.append(prctl(PR_SET_SECUREBITS, want.securebits, what="set securebits", may_fail=True))
    calls.append(prctl(PR_GET_SECUREBITS, what="check securebits", want=want.securebits))
    return calls


def check(want: Credentials, have: Credentials, where: str, setgroups_allowed: bool = True) -> list[Finding]:
    """What the restorer lacks to give a thread these credentials."""
    found: list[Finding] = []

    def lack(what: str, why: str) -> None:
        found.append(Finding(where, what, why))

    if not set(want.uids) <= set(have.uids) and not have.has("SETUID"):
        lack(f"runs as user {want.uids[1]}", "we do not and lack CAP_SETUID: restore as that user or as root")
    if not set(want.gids) <= set(have.gids) and not have.has("SETGID"):
        lack(f"runs as group {want.gids[1]}", "we do not and lack CAP_SETGID: restore as that user or as root")
    if want.groups != have.groups and not (have.has("SETGID") and setgroups_allowed):
        why = "we lack CAP_SETGID" if setgroups_allowed else "this user namespace denies setgroups"
        lack(f"supplementary groups {list(want.groups)}", f"ours are {list(have.groups)} and {why}")
    if missing := want.permitted & ~have.permitted:
        lack(f"holds {cap_names(missing)}", "we do not hold that ourselves")
    needs_drop = have.bounding & ~want.bounding & (want.permitted if want.no_new_privs else -1)
    if needs_drop and not have.has("SETPCAP"):
        lack(f"has given up {cap_names(needs_drop)}", "giving that up needs CAP_SETPCAP")
    missing = want.bounding & ~have.bounding & ~want.permitted
    if missing and not want.no_new_privs:
        lack(f"may gain {cap_names(missing)} by exec", "our own bounding set lacks that")
    missing = want.inheritable & ~(have.inheritable | have.permitted)
    if missing and not (have.has("SETPCAP") and not missing & ~have.bounding):
        lack(f"can pass on {cap_names(missing)}", "we cannot")
    if have.no_new_privs and not want.no_new_privs:
        lack("has no_new_privs off", "ours is on and cannot be taken back")
    return found
