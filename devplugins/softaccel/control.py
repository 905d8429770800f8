"""The door of the software accelerator (a stand-in for hardware) for tools: hold, checkpoint, restore, inject faults.

A tool sends JSON objects over a connection of its own to the same address; descriptors go along (SCM_RIGHTS). Each
gets one reply, ``{"ok": true, ...}`` or ``{"error": text, "errno": number}``, before it perhaps some
``{"progress": bytes}``.
Whatever a tool held, or made and did not hand over, is given back when its connection ends, however it ends.

    info                            -> devices
    find      inodes, pidfd?        -> contexts whose clients' sockets these are; "mine": of the process of the pidfd;
                                    "silent": how many connections of that process have not said what they are
    hold      uid                   drain the context and let nothing new begin
    release                         let everything go on that this connection holds
    checkpoint uid, pid + file      {"begun": true} when the state is taken, then -> bytes, seconds: it is written
    create    device + file         -> uid; the client's socket and the doorbell page of a restored, held context
    fill      uid                   its memory, from the file of ``create``
    resume    uid + pidfd           its client is that process; it goes on
    fault     spec                  see faults.py
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpurestore.devplugins.softaccel import image
from gpurestore.devplugins.softaccel.context import Context
from gpurestore.devplugins.softaccel.device import AcceleratorError, StoppedError
from gpurestore.devplugins.softaccel.memory import Buffer

if TYPE_CHECKING:
    from gpurestore.devplugins.softaccel.server import Server

MAX_MESSAGE_BYTES = 64 << 10
MAX_FDS = 4
_PROGRESS_S = 0.1
_CREDENTIALS = struct.Struct("=iII")

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and user of whoever connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def pid_of(pidfd: int) -> int:
    """The pid that a pidfd stands for, as this process sees it."""
    with open(f"/proc/self/fdinfo/{pidfd}") as info:
        for line in info:
            if line.startswith("Pid:"):
                pid = int(line.split()[1])
                if pid > 0:
                    return pid
                raise AcceleratorError(errno.ESRCH, "the client is gone, or in a pid namespace out of sight")
    raise AcceleratorError(errno.EBADF, "not a pidfd")


class Session:
    """One tool's connection, served by a thread of its own."""

    def __init__(self, server: Server, sock: socket.socket, first: tuple[bytes, list[int]]) -> None:
        self._server = server
        self._sock = sock
        self._first: tuple[bytes, list[int]] | None = first
        _, self._user = peer(sock)
        self._handed_over: socket.socket | None = None
        self._held: list[Context] = []
        self._made: dict[int, tuple[Context, int, dict[str, Any]]] = {}  # and the image, opened, with its state

    def run(self) -> None:
        """Serve the tool until it is gone."""
        try:
            while True:
                if self._first is not None:
                    (data, fds), self._first = self._first, None
                else:
                    data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    return
                try:
                    self._serve(data, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except OSError:
            pass  # gone in the middle of an answer
        finally:
            self._end()

    def _end(self) -> None:
        for context in self._held:
            context.release()
        for context, fd, _ in self._made.values():
            os.close(fd)
            self._server.drop(context)
        self._sock.close()

    def _gone(self) -> bool:
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _send(self, answer: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        data = json.dumps(answer).encode()
        if fds:
            socket.send_fds(self._sock, [data], fds)
        else:
            self._sock.send(data)

    def _serve(self, data: bytes, fds: list[int]) -> None:
        given: tuple[int, ...] = ()
        try:
            request = json.loads(data)
            name = request["op"]
            self._server.faults.hang(name, self._gone)
            answer, given = getattr(self, f"_do_{name}")(request, fds)
        except AcceleratorError as error:
            answer = {"error": str(error), "errno": error.errno}
        except OSError as error:
            answer = {"error": error.strerror or str(error), "errno": error.errno or errno.EIO}
        except image.BadImageError as error:
            answer = {"error": str(error), "errno": errno.EBADMSG}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            answer = {"error": f"not understood: {error!r}", "errno": errno.EINVAL}
        try:
            self._send({"ok": "error" not in answer, **answer}, given)
        finally:
            if self._handed_over is not None:
                self._handed_over.close()
                self._handed_over = None

    def _context(self, request: dict[str, Any]) -> Context:
        context = self._server.contexts.get(int(request["uid"], 16))
        if context is None:
            raise AcceleratorError(errno.ENOENT, f"there is no context {request['uid']}; its client is gone")
        if not self._may(context):
            raise AcceleratorError(errno.EPERM, f"context {request['uid']} belongs to user {context.owner}")
        return context

    def _may(self, context: Context) -> bool:
        return self._user in (0, os.geteuid(), context.owner)

    # ---- what a tool may ask for: (request, descriptors) -> (answer, descriptors)

    def _do_info(self, _: dict[str, Any], __: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        devices = [
            {
                "device": device.index,
                "memory_bytes": device.config.memory_bytes,
                "free_bytes": device.free_bytes,
                "bandwidth_bytes_per_s": device.config.bandwidth_bytes_per_s,
                "latency_s": device.config.latency_s,
                "lost": device.lost,
            }
            for device in self._server.devices
        ]
        return {"what": image.STAND_IN, "devices": devices, "contexts": len(self._server.contexts)}, ()

    def _do_find(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        pid = pid_of(fds[0]) if fds else 0
        wanted = set(request["inodes"])
        found = [
            {
                "uid": f"{context.uid:016x}",
                "inode": context.inode,
                "page_inode": context.page_inode,
                "device": context.device.index,
                "memory_bytes": context.memory.used_bytes,
                "mine": context.pid == pid,
            }
            for context in list(self._server.contexts.values())
            if context.inode in wanted and self._may(context)
        ]
        return {"contexts": found, "silent": self._server.nr_silent(pid)}, ()

    def _do_hold(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        context = self._context(request)
        if context not in self._held:
            context.hold(self._gone)
            self._held.append(context)
        return {}, ()

    def _do_release(self, _: dict[str, Any], __: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        while self._held:
            self._held.pop().release()
        return {}, ()

    def _do_checkpoint(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        context = self._context(request)
        state = {"version": 1, "what": image.STAND_IN, "pid": int(request["pid"]), **context.state()}
        state["devices"] = len(self._server.devices)
        state["server"] = self._server.address
        self._send({"ok": True, "begun": True})
        clock = time.monotonic()
        offset, done, stored = image.DATA_OFFSET, 0, []
        context.device.copy_out.start()
        for buffer in context.memory.buffers():
            chunks: list[tuple[int, int, str]] = []
            offset = self._save(context, buffer, fds[0], offset, chunks)
            done += buffer.size
            stored.append({"address": buffer.address, "bytes": buffer.size, "chunks": chunks})
        context.device.check()
        state["buffers"] = stored
        file_bytes = image.write_state(fds[0], state, offset)
        return {"bytes": done, "file_bytes": file_bytes, "seconds": time.monotonic() - clock}, ()

    def _save(self, context: Context, buffer: Buffer, fd: int, offset: int, chunks: list[tuple[int, int, str]]) -> int:
        """Write a buffer's content at ``offset`` of the image, zeros left out; where the next one may begin."""
        faults = self._server.faults
        view = memoryview(buffer.memory)

        def move(done: int, size: int) -> int:
            nonlocal offset
            context.device.check()
            if context.dead:
                raise StoppedError
            part = view[done : done + faults.cut("checkpoint", size)]
            if _is_zero(buffer.base + done, len(part)):
                chunks.append((-1, len(part), ""))
            else:
                image.write_all(fd, part, offset)
                chunks.append((offset, len(part), image.digest(part)))
                offset += len(part)
            return len(part)

        moved = context.device.copy_out.copy(buffer.size, move, self._gone)
        if moved != buffer.size:
            raise AcceleratorError(errno.EIO, f"device memory ended after {moved} of {buffer.size} bytes of a buffer")
        return -(-offset // 4096) * 4096

    def _progress(self) -> Callable[[int], None]:
        due = time.monotonic() + _PROGRESS_S

        def report(done: int) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + _PROGRESS_S
                self._send({"progress": done})

        return report

    def _do_create(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        state = image.read_state(fds[0], "image")
        list(image.chunks(state, "image"))
        context, client = self._server.restore(int(request["device"]), state, self._user)
        self._handed_over = client
        self._made[context.uid] = (context, os.dup(fds[0]), state)
        answer = {"uid": f"{context.uid:016x}", "inode": context.inode, "page_inode": context.page_inode}
        return answer, (client.fileno(), context.page_fd)

    def _do_fill(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        context, fd, state = self._made[int(request["uid"], 16)]
        progress = self._progress()
        done = 0
        context.device.copy_in.start()
        for address, offset, size, checksum in image.chunks(state, "image"):
            buffer, at = context.memory.find(address, size)
            view = memoryview(buffer.memory)[at : at + size]
            self._load(context, view, fd, offset)
            if offset != -1 and image.digest(view) != checksum:
                raise image.BadImageError(f"device memory at {address:#x}: {size} bytes are damaged")
            done += size
            progress(done)
        return {"bytes": done}, ()

    def _load(self, context: Context, view: memoryview, fd: int, offset: int) -> None:
        def move(done: int, size: int) -> int:
            context.device.check()
            size = self._server.faults.cut("fill", size)
            return size if offset == -1 else os.preadv(fd, [view[done : done + size]], offset + done)

        moved = context.device.copy_in.copy(len(view), move, self._gone)
        if moved != len(view):
            raise AcceleratorError(errno.EIO, f"a copy to the device ended after {moved} of {len(view)} bytes")

    def _do_resume(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        uid = int(request["uid"], 16)
        context, fd, _ = self._made[uid]
        context.device.check()
        context.resume(pid_of(fds[0]))
        del self._made[uid]
        os.close(fd)
        return {}, ()

    def _do_fault(self, request: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], tuple[int, ...]]:
        self._server.add_fault(request["spec"])
        return {}, ()


def _is_zero(base: int, size: int) -> bool:
    """Whether memory holds nothing but zeros: the first byte is one, and every byte is like the one before."""
    first: int = ctypes.c_ubyte.from_address(base).value if size else 0
    return first == 0 and (size < 2 or _libc.memcmp(base, base + 1, size - 1) == 0)
