"""Memory that a benchmark holds, so that a hypervisor does not take away what the measurement is about to use."""

from __future__ import annotations

import subprocess
from pathlib import Path

from measure import GIB, Broken

_BLOCK_BYTES = GIB  # per process, so that letting go of some is quick
_BALLOON, _REPORTING_BIT = 5, 5  # virtio's device number, and VIRTIO_BALLOON_F_REPORTING (linux/virtio_balloon.h)


def is_needed(devices: Path = Path("/sys/bus/virtio/devices")) -> bool:
    """Whether free memory goes back to a hypervisor: a balloon does free page reporting."""
    for device in devices.glob("*"):
        if int((device / "device").read_text(), 16) == _BALLOON:
            return (device / "features").read_text()[_REPORTING_BIT] == "1"
    return False


class Ballast:
    """All memory but what a case needs, where that helps.

    The kernel reports a share of what is free every two seconds (mm/page_reporting.c): the less is free, the more of it
    is still there after it was touched.
    """

    def __init__(self, program: Path) -> None:
        self._command = [str(program), "hold", "--memory", "huge", "--threads", "2", "--bytes", str(_BLOCK_BYTES)]
        self._blocks: list[subprocess.Popen[str]] = []
        self.is_needed = is_needed()

    @property
    def pids(self) -> list[int]:
        """Who holds it."""
        return [block.pid for block in self._blocks]

    @property
    def nr_bytes(self) -> int:
        """What is held. The kernel takes it away first when memory is short."""
        self._blocks = [block for block in self._blocks if block.poll() is None]
        return len(self._blocks) * _BLOCK_BYTES

    def leave(self, there: int, need: int) -> None:
        """Hold what is ``there``, with what is held already, but for ``need`` bytes."""
        wanted = max(0, there - need) // _BLOCK_BYTES if self.is_needed else 0
        while len(self._blocks) > wanted:
            self._drop()
        while len(self._blocks) < wanted:
            self._take()

    def _take(self) -> None:
        block = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._blocks.append(block)
        assert block.stdout
        if not block.stdout.readline():
            raise Broken(f"the program that holds memory ended with {block.wait()}")

    def _drop(self) -> None:
        self._blocks.pop().communicate()  # it ends at the end of its input
