"""A context of the software accelerator (a stand-in for hardware): memory, streams, events, and their life.

A context lives as long as its client's connection. One lock (``changed``) guards all in it but the memory, which has
its own; commands run outside of it, one thread a stream. While the context is *held* nothing new begins: then all there
is to it can be written down (``state``) and put in place elsewhere (``load_state``). What was asked and not answered is
asked again on release.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable
from typing import Any

from gpurestore.devplugins.softaccel import PAGE_NAME, kernels
from gpurestore.devplugins.softaccel.device import AcceleratorError, Device, StoppedError, read_host, write_host
from gpurestore.devplugins.softaccel.faults import Faults
from gpurestore.devplugins.softaccel.memory import Memory
from gpurestore.devplugins.softaccel.protocol import (
    ALL_STREAMS,
    AT_CONTEXT,
    AT_FENCES,
    AT_LOST,
    AT_MAGIC,
    AT_READY,
    COMMANDS,
    MAX_MESSAGE_BYTES,
    MAX_STREAMS,
    PAGE_BYTES,
    PAGE_MAGIC,
    Op,
    Reply,
    Request,
    unpack_requests,
)
from gpurestore.devplugins.softaccel.streams import Stream

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_WORD = struct.Struct("<Q")
_MAX_UNTAKEN = 64  # one is all that a client should have out


class Context:
    """What one client has on one device."""

    def __init__(self, device: Device, nr_devices: int, faults: Faults, uid: int) -> None:
        self.uid = uid
        self._nr_devices = nr_devices
        self.device = device
        self.changed = threading.Condition(threading.RLock())
        self.pid = 0  # of the client, as this process sees it; 0 until it is bound
        self.owner = -1  # the client's user
        self.inode = 0  # of the client's end of the socket
        self.sock: socket.socket | None = None
        self.held = 0
        self.dead = False
        self.error: tuple[int, str] | None = None
        self._faults = faults
        self.memory = Memory(device)
        self._streams: dict[int, Stream] = {0: Stream(0)}
        self._events: dict[int, tuple[int, int]] = {}  # the stream and the number of the command that does it
        self._next_event = 1
        self._untaken: list[bytes] = []
        self._waiting: Request | None = None
        self._last_reply: tuple[bytes, bool] | None = None  # and whether the doorbell page went along
        self._unread = False
        self._make_page()

    # ---- the doorbell page

    def _make_page(self) -> None:
        fd = os.memfd_create(f"{PAGE_NAME}{self.uid:016x}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        self.page_fd = fd
        self.page_inode = os.fstat(fd).st_ino
        self._page = mmap.mmap(fd, PAGE_BYTES)
        self._set_word(AT_MAGIC, PAGE_MAGIC)
        self._set_word(AT_CONTEXT, self.uid)

    def _set_word(self, offset: int, value: int) -> None:
        _WORD.pack_into(self._page, offset, value)

    # ---- messages

    def attach(self, sock: socket.socket) -> None:
        """The client is at the other end of ``sock``, which does not block."""
        self.sock = sock

    def take(self) -> bool:
        """Take a message from the socket, if there is one; False: the client is gone."""
        with self.changed:
            if self.dead or self.sock is None:
                return not self.dead
            try:
                data = self.sock.recv(MAX_MESSAGE_BYTES + 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data or len(self._untaken) >= _MAX_UNTAKEN:
                return False
            if self.held:
                self._untaken.append(data)
                return True
            return self.handle(data)

    def handle(self, data: bytes) -> bool:
        """Do what a message says and answer; False if it is nonsense."""
        with self.changed:
            try:
                requests = unpack_requests(data)
            except ValueError:
                return False
            last = requests[-1]
            try:
                self.device.check()
                values: tuple[int, ...] | None = ()
                for request in requests:
                    if request is not last and request.op not in COMMANDS:
                        return False
                    values = self._request(request)
            except AcceleratorError as error:
                self.reply(Reply(error.errno, last.seq, (), str(error)))
            else:
                if values is None:
                    self._waiting = last
                    self._answer_waiting()
                else:
                    page = last.op == Op.READY and values == (errno.EAGAIN,)
                    self.reply(Reply(errno.EAGAIN if page else 0, last.seq, () if page else values), page=page)
        return True

    def reply(self, reply: Reply, *, page: bool = False) -> None:
        """Answer the client; with ``page`` the doorbell page goes along."""
        self._last_reply = (reply.pack(), page)
        self._send_last()

    def _send_last(self) -> None:
        if self._last_reply is None or self.sock is None:
            return
        data, page = self._last_reply
        try:
            if page:
                socket.send_fds(self.sock, [data], [self.page_fd])
            else:
                self.sock.send(data)
        except OSError:
            pass  # gone, which the next look at the socket will show

    def _request(self, request: Request) -> tuple[int, ...] | None:
        """Values of the reply, or None: to be answered when what it waits for is done."""
        args = request.args
        if request.op in COMMANDS:
            return (self._enqueue(request),)
        match request.op:
            case Op.READY:
                seen = _WORD.unpack_from(self._page, AT_READY)[0] == args[0]
                return () if seen else (errno.EAGAIN,)
            case Op.INFO:
                return (self._nr_devices, self.device.config.memory_bytes, self.device.free_bytes)
            case Op.ALLOC:
                return (self.memory.alloc(args[0]),)
            case Op.FREE:
                self._free(args[0])
            case Op.STREAM_CREATE:
                return (self._create_stream(),)
            case Op.STREAM_DESTROY:
                self._destroy_stream(args[0])
            case Op.EVENT_CREATE:
                event, self._next_event = self._next_event, self._next_event + 1
                self._events[event] = (0, 0)
                return (event,)
            case Op.EVENT_DESTROY:
                self._event(args[0])
                del self._events[args[0]]
            case Op.EVENT_QUERY:
                return (int(self._is_done(*self._event(args[0]))),)
            case Op.WAIT | Op.EVENT_WAIT:
                self._targets(request)
                return None
            case _:
                raise AcceleratorError(errno.ENOSYS, f"there is no request {request.op}")
        return ()

    # ---- streams and events

    def _free(self, address: int) -> None:
        if not self.memory.has(address):
            raise AcceleratorError(errno.EINVAL, f"no buffer begins at device address {address:#x}")
        if any(stream.queue for stream in self._streams.values()):
            raise AcceleratorError(errno.EBUSY, "commands are queued: wait for the streams before a buffer is freed")
        self.memory.free(address)

    def _stream(self, ident: int) -> Stream:
        stream = self._streams.get(ident)
        if stream is None:
            raise AcceleratorError(errno.EINVAL, f"there is no stream {ident}")
        return stream

    def _event(self, ident: int) -> tuple[int, int]:
        if ident not in self._events:
            raise AcceleratorError(errno.EINVAL, f"there is no event {ident}")
        return self._events[ident]

    def _is_done(self, stream: int, number: int) -> bool:
        return stream not in self._streams or self._streams[stream].completed >= number

    def _create_stream(self) -> int:
        ident = next((i for i in range(MAX_STREAMS) if i not in self._streams), None)
        if ident is None:
            raise AcceleratorError(errno.ENOSPC, f"all {MAX_STREAMS} streams are taken")
        self._streams[ident] = Stream(ident)
        self._set_word(AT_FENCES + 8 * ident, 0)
        return ident

    def _destroy_stream(self, ident: int) -> None:
        stream = self._stream(ident)
        if ident == 0 or stream.queue:
            raise AcceleratorError(errno.EBUSY, f"stream {ident} is in use")
        stream.closed = True
        del self._streams[ident]
        # Events that were recorded there are done, whoever gets the number next.
        self._events = {event: (0, 0) if where[0] == ident else where for event, where in self._events.items()}
        for other in self._streams.values():
            other.forget(ident)
        self.changed.notify_all()

    def _enqueue(self, request: Request) -> int:
        stream = self._stream(request.args[0])
        if request.op == Op.EVENT_AWAIT:
            # What counts is where the event was recorded last by now.
            where = self._event(request.args[1])
            request = Request(request.op, request.seq, (request.args[0], request.args[1], *where, *(0,) * 8))
        stream.submitted += 1
        if request.op == Op.EVENT_RECORD:
            self._event(request.args[1])
            self._events[request.args[1]] = (stream.ident, stream.submitted)
        stream.queue.append((stream.submitted, request))
        self._start(stream)
        return stream.submitted

    def _start(self, stream: Stream) -> None:
        if stream.thread is None:
            name = f"stream {stream.ident} of {self.uid:x}"
            stream.thread = threading.Thread(target=self._work, args=(stream,), name=name, daemon=True)
            stream.thread.start()
        self.changed.notify_all()

    def _ready(self, stream: Stream) -> bool:
        if self.held or not stream.queue:
            return False
        request = stream.queue[0][1]
        return request.op != Op.EVENT_AWAIT or self._is_done(request.args[2], request.args[3])

    def _work(self, stream: Stream) -> None:
        """The thread of a stream."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.dead or stream.closed or self._ready(stream))
                if self.dead or stream.closed:
                    return
                number, request = stream.queue[0]
                stream.running = True
                broken = self.error is not None
            error = None if broken else self._execute(request)
            with self.changed:
                stream.running = False
                stream.queue.popleft()
                stream.completed = number
                if error is not None and self.error is None:
                    self.error = error
                if not self.dead:
                    self._set_word(AT_FENCES + 8 * stream.ident, number)
                    self._answer_waiting()
                self.changed.notify_all()

    def _execute(self, request: Request) -> tuple[int, str] | None:
        """Run one command; None, or what is wrong from now on with this context."""
        _, *args = request.args
        try:
            self.device.check()
            match request.op:
                case Op.COPY_IN:
                    self._copy_host(read_host, args[0], args[1], args[2], "h2d")
                case Op.COPY_OUT:
                    self._copy_host(write_host, args[1], args[0], args[2], "d2h")
                case Op.COPY:
                    to, to_offset = self.memory.find(args[0], args[2])
                    source, offset = self.memory.find(args[1], args[2])
                    ctypes.memmove(to.base + to_offset, source.base + offset, args[2])
                case Op.LAUNCH:
                    kernels.run(self._resolve, args[0], args[1], tuple(args[2:]))
        except AcceleratorError as error:
            return error.errno, str(error)
        except Exception as error:  # whatever it is: the stream goes on, and its client hears of it
            return errno.EIO, f"command {request.op} failed: {error!r}"
        return None

    def _resolve(self, address: int, size: int) -> tuple[Any, int]:
        buffer, offset = self.memory.find(address, size)
        return buffer.memory, offset

    def _copy_host(
        self, transfer: Callable[[int, int, int, int], int], address: int, host: int, size: int, way: str
    ) -> None:
        buffer, offset = self.memory.find(address, size)
        base = buffer.base + offset
        engine = self.device.copy_in if way == "h2d" else self.device.copy_out

        def move(done: int, part: int) -> int:
            self.device.check()
            return transfer(self.pid, host + done, base + done, self._faults.cut(way, part))

        engine.start()
        moved = engine.copy(size, move, lambda: self.dead)
        if moved != size:
            raise AcceleratorError(errno.EIO, f"a copy ended after {moved} of {size} bytes")

    # ---- waiting

    def _targets(self, request: Request) -> list[tuple[int, int]]:
        """What a waiting request waits for; its client sends nothing more meanwhile."""
        if request.op == Op.EVENT_WAIT:
            return [self._event(request.args[0])]
        if request.args[0] == ALL_STREAMS:
            return [(ident, stream.submitted) for ident, stream in self._streams.items()]
        stream = self._stream(request.args[0])
        return [(stream.ident, stream.submitted)]

    def _answer_waiting(self) -> None:
        request = self._waiting
        if request is None:
            return
        try:
            self.device.check()
            if not all(self._is_done(*target) for target in self._targets(request)):
                return
            reply = Reply(self.error[0], request.seq, (), self.error[1]) if self.error else Reply(0, request.seq)
        except AcceleratorError as error:
            reply = Reply(error.errno, request.seq, (), str(error))
        self._waiting = None
        self.reply(reply)

    def lose(self) -> None:
        """The device is lost: say so to whoever looks."""
        with self.changed:
            if self.dead:
                return
            self._set_word(AT_LOST, 1)
            self._answer_waiting()
            self.changed.notify_all()

    # ---- life

    def hold(self, stop: Callable[[], bool]) -> None:
        """Let nothing new begin, and wait for what has begun. Every hold needs its release."""
        with self.changed:
            self.held += 1
            try:
                while any(stream.running for stream in self._streams.values()):
                    if stop() or self.dead:
                        raise StoppedError
                    self.changed.wait(0.02)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Go on, with what was asked meanwhile first."""
        with self.changed:
            self.held -= 1
            if self.held or self.dead:
                return
            untaken, self._untaken = self._untaken, []
            for data in untaken:
                self.handle(data)
            self._answer_waiting()
            for stream in self._streams.values():
                if stream.queue:
                    self._start(stream)
            self.changed.notify_all()

    def resume(self, pid: int) -> None:
        """A restored context gets its client, which waits perhaps for a reply that it had not read."""
        with self.changed:
            self.pid = pid
            if self._unread:
                self._send_last()
            self.release()

    def die(self) -> None:
        """The client is gone: so is everything that it had."""
        with self.changed:
            if self.dead:
                return
            self.dead = True
            self.changed.notify_all()
            self.memory.free_all()
            if self.sock is not None:
                self.sock.close()
                self.sock = None
            os.close(self.page_fd)
            self._page.close()

    # ---- checkpoint

    def state(self) -> dict[str, Any]:
        """All but the content of buffers. The context must be held, and its client frozen."""
        with self.changed:
            if self.dead or not self.held:
                raise AcceleratorError(errno.EINVAL, f"context {self.uid:x} is not held")
            self.device.check()
            before = -1
            while before != len(self._untaken):  # messages that the loop has not come to
                before = len(self._untaken)
                if self.take():
                    continue
                raise AcceleratorError(errno.ECONNRESET, f"the client of context {self.uid:x} is gone")
            data, with_page = self._last_reply or (b"", False)
            return {
                "uid": f"{self.uid:016x}",
                "device": self.device.index,
                "memory_bytes": self.memory.used_bytes,
                "streams": [stream.state() for stream in self._streams.values()],
                "events": [[event, *where] for event, where in self._events.items()],
                "next_event": self._next_event,
                "untaken": [message.hex() for message in self._untaken],
                "waiting": self._waiting.pack().hex() if self._waiting else None,
                "reply": data.hex() if self._reply_unread() else None,
                "reply_page": with_page,
                "error": list(self.error) if self.error else None,
                "page": self._page[:].rstrip(b"\0").hex(),
            }

    def _reply_unread(self) -> bool:
        """Whether something that was sent lies unread in the client's queue."""
        if self.sock is None:
            return False
        left = array.array("i", [0])
        fcntl.ioctl(self.sock, termios.TIOCOUTQ, left)
        return left[0] > 0

    def load_state(self, state: dict[str, Any]) -> None:
        """The opposite: buffers at their addresses, empty; everything else as it was. The context stays held."""
        with self.changed:
            for entry in state["buffers"]:
                self.memory.place(int(entry["address"]), int(entry["bytes"]))
            self._streams = {int(entry["id"]): Stream.from_state(entry) for entry in state["streams"]}
            self._events = {int(event): (int(stream), int(number)) for event, stream, number in state["events"]}
            self._next_event = int(state["next_event"])
            self._untaken = [bytes.fromhex(message) for message in state["untaken"]]
            if state["waiting"] is not None:
                (self._waiting,) = unpack_requests(bytes.fromhex(state["waiting"]))
            if state["reply"] is not None:
                self._unread = True
                self._last_reply = (bytes.fromhex(state["reply"]), bool(state["reply_page"]))
            if state["error"] is not None:
                self.error = (int(state["error"][0]), str(state["error"][1]))
            page = bytes.fromhex(state["page"])
            self._page[: len(page)] = page
            self._set_word(AT_CONTEXT, self.uid)
