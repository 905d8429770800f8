"""What a dump cannot carry ends it before anything is written, and the tree goes on as if nothing had happened."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.tool import Tool
from support.victims import Victims, VictimUnavailable

pytestmark = pytest.mark.usefixtures("rights")

DESCRIPTORS = {
    "tcp-socket": "socket",
    "unix-socket": "socket",
    "netlink-socket": "socket",
    "epoll": "epoll",
    "terminal": "tty|terminal|pts|ptmx",
    "timerfd": "timerfd",
    "signalfd": "signalfd",
    "inotify": "inotify",
    "pidfd": "pidfd",
    "io_uring": "io_uring",
    "userfaultfd": "userfaultfd",
    "perf": "perf",
    "lease": "lease",
}
OTHERS = {
    "seccomp": "seccomp",
    "call-dispatch": "dispatched to user space",
    "ports": "I/O ports",
    "sysv-shm": "sysv|System V|shared memory",
    "net-namespace": "net",
    "mount-namespace": "mnt|mount",
    "uts-namespace": "uts",
    "user-namespace": "user",
    "shared-files": "descriptor|files",
    "shared-fs": "fs|director|root|umask",
    "shared-vm": "memory|address space|vm",
}


@pytest.mark.parametrize("kind", [*DESCRIPTORS, *OTHERS])
def test_an_unsupported_resource_is_named_and_the_tree_goes_on(
    tool: Tool, victims: Victims, folder: Path, kind: str
) -> None:
    try:
        victim = victims.start("unsupported", kind)
    except VictimUnavailable:
        pytest.skip(f"this kernel does not offer {kind} here")
    images = folder / "images"
    outcome = tool.dump(victim.pid, images).expect(1)
    line = outcome.one_line()
    assert re.search({**DESCRIPTORS, **OTHERS}[kind], line, re.IGNORECASE), f"the resource is not named\n{outcome}"
    assert any(re.search(rf"\b{pid}\b", line) for pid in victim.pids), f"no pid of the tree is named\n{outcome}"
    if kind in DESCRIPTORS:
        assert re.search(r"\b77\b", line), f"the descriptor is not named\n{outcome}"
    assert not images.exists()
    assert sorted(path.name for path in folder.iterdir() if "images" in path.name) == []
    victim.expect_running()
    victim.finish()


def test_all_obstacles_of_a_tree_are_named_in_one_line(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("unsupported", "unix-socket")
    outcome = tool.dump(victim.pid, folder / "images").expect(1)
    # Both ends of the socket pair are open: two descriptors, one line.
    assert len(re.findall(r"\bfd \d+", outcome.one_line())) >= 2, str(outcome)
    victim.finish()
