"""Faults that the software accelerator (a stand-in for hardware) can be told to have.

lost=DEVICE           the device is lost
hang=AT[:SECONDS]     the next request of a tool at AT hangs: hold, checkpoint, create, fill, resume
partial=AT            the next transfer at AT moves half of a chunk only: h2d, d2h, checkpoint, fill
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

HANG_AT = ("hold", "checkpoint", "create", "fill", "resume")
PARTIAL_AT = ("h2d", "d2h", "checkpoint", "fill")
FOREVER_S = 3600.0


class Faults:
    """What is still to go wrong; each fault happens once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hangs: dict[str, float] = {}
        self._partials: set[str] = set()

    def add(self, spec: str) -> None:
        """Take a fault but ``lost``, which is the server's. Raises ValueError."""
        kind, _, rest = spec.partition("=")
        where, _, seconds = rest.partition(":")
        with self._lock:
            if kind == "hang" and where in HANG_AT:
                self._hangs[where] = float(seconds) if seconds else FOREVER_S
            elif kind == "partial" and where in PARTIAL_AT and not seconds:
                self._partials.add(where)
            else:
                raise ValueError(f"{spec!r} is no fault; known: lost=DEVICE, hang=AT[:SECONDS], partial=AT")

    def hang(self, where: str, stop: Callable[[], bool]) -> None:
        """Hang if that is due, until ``stop``."""
        with self._lock:
            seconds = self._hangs.pop(where, 0.0)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not stop():
            time.sleep(0.01)

    def cut(self, where: str, size: int) -> int:
        """How much of ``size`` bytes is to be moved."""
        with self._lock:
            if where in self._partials:
                self._partials.discard(where)
                return size // 2
        return size
