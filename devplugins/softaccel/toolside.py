"""A tool's connection to the server of the software accelerator (a stand-in for hardware), for trio. See control.py."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import trio

from gpurestore.devplugins.softaccel import for_kernel

_MAX_MESSAGE_BYTES = 64 << 10
_MAX_FDS = 4


class ServerError(OSError):
    """What the server answered, or that it is gone."""


class ServerMissingError(ServerError):
    """Nobody listens there."""


class Tool:
    """One connection; one request at a time. A request that is cancelled half-way ends the connection."""

    def __init__(self, where: str) -> None:
        """Raises ServerMissingError."""
        self.address = where
        self._turn = trio.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.connect(for_kernel(where))
        except OSError as error:
            self._sock.close()
            number = error.errno or errno.EIO
            raise ServerMissingError(
                number,
                f"no software accelerator listens at {where} ({os.strerror(number)}); start its server with "
                "'python -m gpurestore.devplugins.softaccel', or name another with --plugin-option "
                "softaccel.socket=ADDRESS",
            ) from error
        self._sock.setblocking(False)

    async def call(
        self, op: str, fds: Sequence[int] = (), progress: Callable[[int], None] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer, and descriptors that came along, which are the caller's. Raises ServerError."""
        async with self._turn:
            try:
                await self._send(json.dumps({"op": op, **arguments}).encode(), fds)
                while True:
                    answer, given = await self._receive(op)
                    if "progress" not in answer:
                        break
                    if progress is not None:
                        progress(answer["progress"])
            except BaseException:
                self.close()
                raise
        if not answer.get("ok"):
            raise ServerError(int(answer.get("errno", errno.EIO)), str(answer.get("error")))
        return answer, given

    async def finish(self, op: str) -> dict[str, Any]:
        """The second answer, to a request that was answered with ``begun`` first. Raises ServerError."""
        try:
            answer, _ = await self._receive(op)
        except BaseException:
            self.close()
            raise
        if not answer.get("ok"):
            raise ServerError(int(answer.get("errno", errno.EIO)), str(answer.get("error")))
        return answer

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            while True:
                try:
                    socket.send_fds(self._sock, [data], fds)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
        except (OSError, trio.ClosedResourceError) as error:
            raise _gone(error) from error

    async def _receive(self, op: str) -> tuple[dict[str, Any], list[int]]:
        try:
            await trio.lowlevel.wait_readable(self._sock)
            data, fds, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except (OSError, trio.ClosedResourceError) as error:
            raise _gone(error) from error
        if not data:
            raise ServerError(errno.ECONNRESET, f"the server ended the connection instead of answering {op!r}")
        answer: dict[str, Any] = json.loads(data)
        return answer, fds

    def close(self) -> None:
        """The server gives back what this connection holds."""
        self._sock.close()


def _gone(error: Exception) -> ServerError:
    return ServerError(errno.ECONNRESET, f"the server of the software accelerator is gone ({error})")
