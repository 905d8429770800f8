"""Plans for credentials, tried for real in forked children where we may, and checked for what they ask."""

from __future__ import annotations

import os

import pytest
from support.selfcalls import execute, in_child

from gpurestore.capabilities import CAP
from gpurestore.images import pb
from gpurestore.tasks import credentials, procfs
from gpurestore.tasks.credentials import Credentials

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others: run the tests as root")


def _own():
    return credentials.from_status(procfs.status(os.getpid()), 0)


def _bits(*names):
    return sum(1 << CAP[n] for n in names)


def _wanted():
    own = _own()
    user = own._replace(uids=(1000,) * 4, gids=(1001,) * 4, permitted=0, effective=0, groups=(4, 7))
    return {
        "a user": user,
        "a user with ids that differ": user._replace(uids=(1000, 1002, 1003, 1003), gids=(1, 2, 3, 4)),
        "a user with capabilities": user._replace(permitted=_bits("NET_RAW", "KILL"), effective=_bits("KILL")),
        "a user with ambient capabilities": user._replace(
            permitted=_bits("NET_RAW"),
            effective=_bits("NET_RAW"),
            inheritable=_bits("NET_RAW"),
            ambient=_bits("NET_RAW"),
        ),
        "a user who gave up capabilities": user._replace(bounding=_bits("KILL"), no_new_privs=True),
        "root without capabilities": own._replace(permitted=0, effective=0),
        "root with a smaller bounding set": own._replace(bounding=own.bounding & ~_bits("SYS_ADMIN", "NET_RAW")),
        "root with locked securebits": own._replace(securebits=0b101111),
        "securebits that forbid ambient ones": own._replace(
            inheritable=_bits("KILL"), ambient=_bits("KILL"), securebits=0b1000000
        ),
        "a user who keeps capabilities": user._replace(securebits=0b10000),
    }


@needs_root
@pytest.mark.parametrize("name", _wanted() if os.geteuid() == 0 else [])
def test_a_thread_gets_the_credentials_that_were_planned(name):
    want = _wanted()[name]

    def work():
        execute(credentials.plan(want, _own()))
        answers = dict(zip(credentials.questions(), execute(list(credentials.questions().values())), strict=True))
        return credentials.collect(procfs.status(os.getpid()), answers)

    assert credentials.check(want, _own(), "here") == []
    assert in_child(work) == want


def test_nothing_is_set_that_is_there_already():
    have = Credentials((5,) * 4, (6,) * 4, (1, 2), bounding=_bits("KILL"))
    assert all(call.may_fail or "check" in call.what for call in credentials.plan(have, have))


def test_what_an_ordinary_user_cannot_become_is_found():
    have = Credentials((1000,) * 4, (1000,) * 4, (1000,), bounding=_bits("KILL"))
    want = Credentials((0,) * 4, (0,) * 4, (), permitted=_bits("KILL"), bounding=_bits("KILL", "CHOWN"))
    found = [str(f) for f in credentials.check(want, have, "pid 7")]
    assert len(found) == 5
    assert any("CAP_SETUID" in f for f in found)
    assert any("CAP_CHOWN" in f and "exec" in f for f in found)


def test_groups_are_left_alone_where_setgroups_is_denied():
    have = Credentials((0,) * 4, (0,) * 4, (65534,), effective=_bits("SETGID"))
    assert credentials.check(have, have, "pid 7", setgroups_allowed=False) == []
    other = have._replace(groups=(1,))
    (found,) = credentials.check(other, have, "pid 7", setgroups_allowed=False)
    assert "denies setgroups" in str(found)


def test_credentials_survive_the_image():
    creds = Credentials((1, 2, 3, 4), (5, 6, 7, 8), (9,), 1 << 40, 2, 3, (1 << 41) - 1, 5, 0b10000, True)
    entry = pb.creds_entry()
    credentials.fill(entry, creds)
    assert credentials.from_message(entry) == creds
    assert len(entry.cap_bnd) == 2
