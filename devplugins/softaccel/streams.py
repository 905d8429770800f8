"""Streams of the software accelerator (a stand-in for hardware): queues of commands that run one after another."""

from __future__ import annotations

import errno
import threading
from collections import deque
from typing import Any

from gpurestore.devplugins.softaccel.device import AcceleratorError
from gpurestore.devplugins.softaccel.protocol import MAX_STREAMS, Op, Request, unpack_requests


class Stream:
    """One of them. Guarded by the lock of its context."""

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.queue: deque[tuple[int, Request]] = deque()
        self.submitted = 0
        self.completed = 0
        self.running = False
        self.closed = False
        self.thread: threading.Thread | None = None

    def forget(self, other: int) -> None:
        """No command waits for stream ``other`` any more, which is gone."""
        self.queue = deque((number, _without_wait(request, other)) for number, request in self.queue)

    def state(self) -> dict[str, Any]:
        """As a checkpoint has it."""
        return {
            "id": self.ident,
            "submitted": self.submitted,
            "completed": self.completed,
            "queue": [[number, request.pack().hex()] for number, request in self.queue],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Stream:
        """The opposite; nothing runs yet."""
        stream = cls(int(state["id"]))
        if not 0 <= stream.ident < MAX_STREAMS:
            raise AcceleratorError(errno.EINVAL, f"a stream of number {stream.ident}")
        stream.submitted, stream.completed = int(state["submitted"]), int(state["completed"])
        for number, data in state["queue"]:
            (request,) = unpack_requests(bytes.fromhex(data))
            stream.queue.append((int(number), request))
        return stream


def _without_wait(request: Request, stream: int) -> Request:
    if request.op != Op.EVENT_AWAIT or request.args[2] != stream:
        return request
    return Request(request.op, request.seq, (*request.args[:2], *(0,) * 10))
