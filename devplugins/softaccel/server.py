"""The server of the software accelerator (a stand-in for hardware): connections, and who has what.

One thread takes the clients' messages, which are all quick to serve; streams have threads of their own, and so have
the connections of tools.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import threading
import traceback
from typing import Any

from gpurestore.devplugins.softaccel import for_kernel
from gpurestore.devplugins.softaccel.context import Context
from gpurestore.devplugins.softaccel.control import MAX_FDS, Session, peer
from gpurestore.devplugins.softaccel.device import AcceleratorError, Config, Device
from gpurestore.devplugins.softaccel.faults import Faults
from gpurestore.devplugins.softaccel.protocol import (
    MAX_MESSAGE_BYTES,
    VERSION,
    Op,
    Reply,
    Request,
    unpack_requests,
)


class Server:
    """Devices and everybody's contexts on them."""

    def __init__(self, address: str, configs: list[Config]) -> None:
        self.address = address
        self.devices = [Device(index, config) for index, config in enumerate(configs)]
        self.contexts: dict[int, Context] = {}
        self.faults = Faults()
        self._lock = threading.Lock()
        self._listener = _listen(address)
        self._epoll = select.epoll()
        self._strangers: dict[int, socket.socket] = {}  # connected, and nothing said yet
        self._clients: dict[int, Context] = {}
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake_reader, select.EPOLLIN)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wake_reader:
                    self._close()
                    return
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._strangers:
                    self._meet(fd)
                else:
                    context = self._clients.get(fd)
                    if context is not None and not self._serve(context):
                        self.drop(context)

    @staticmethod
    def _serve(context: Context) -> bool:
        try:
            return context.take()
        except Exception:  # one client's trouble must not become everybody's
            traceback.print_exc()
            return False

    def stop(self) -> None:
        """End :meth:`run`, from any thread or signal handler."""
        os.write(self._wake_writer, b"x")

    def _close(self) -> None:
        for context in list(self.contexts.values()):
            self.drop(context)
        for sock in (*self._strangers.values(), self._listener):
            sock.close()
        self._epoll.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        if not self.address.startswith("@"):
            os.unlink(self.address)

    # ---- connections

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        self._strangers[sock.fileno()] = sock
        self._epoll.register(sock, select.EPOLLIN)

    def _meet(self, fd: int) -> None:
        """The first message of a connection says whether it is a client's or a tool's."""
        sock = self._strangers.pop(fd)
        self._epoll.unregister(fd)
        try:
            data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, fds = b"", []
        if data.startswith(b"{"):
            sock.setblocking(True)
            session = Session(self, sock, (data, fds))
            threading.Thread(target=session.run, name="tool", daemon=True).start()
            return
        for received in fds:
            os.close(received)
        try:
            (request,) = unpack_requests(data)
        except ValueError:
            sock.close()
            return
        self._welcome(sock, request)

    def _welcome(self, sock: socket.socket, request: Request) -> None:
        version, index, inode = request.args[:3]
        try:
            if request.op != Op.HELLO or version != VERSION:
                raise AcceleratorError(errno.EPROTO, f"the server speaks version {VERSION}, the client {version}")
            context = self._make(index)
        except AcceleratorError as error:
            try:
                sock.send(Reply(error.errno, request.seq, (), str(error)).pack())
            except OSError:
                pass
            sock.close()
            return
        context.pid, context.owner = peer(sock)
        context.inode = inode
        context.attach(sock)
        with context.changed:
            self._add(context)
            context.reply(Reply(0, request.seq, (context.uid, context.device.index)), page=True)

    def _make(self, index: int) -> Context:
        if index >= len(self.devices):
            raise AcceleratorError(errno.ENODEV, f"there is no device {index}; there are {len(self.devices)}")
        self.devices[index].check()
        uid = 0
        while uid == 0 or uid in self.contexts:
            uid = int.from_bytes(os.urandom(8), "little")
        return Context(self.devices[index], len(self.devices), self.faults, uid)

    def _add(self, context: Context) -> None:
        assert context.sock is not None
        with self._lock:
            self.contexts[context.uid] = context
            self._clients[context.sock.fileno()] = context
            self._epoll.register(context.sock, select.EPOLLIN)

    def drop(self, context: Context) -> None:
        """A context's client is gone."""
        with self._lock, context.changed:
            if context.sock is not None:
                self._clients.pop(context.sock.fileno(), None)
                try:
                    self._epoll.unregister(context.sock)
                except (OSError, ValueError):
                    pass  # never registered, or the server ends
            self.contexts.pop(context.uid, None)
            context.die()

    # ---- for tools

    def nr_silent(self, pid: int) -> int:
        """How many connections of a process have said nothing yet."""
        nr = 0
        for sock in list(self._strangers.values()):
            try:
                nr += peer(sock)[0] == pid
            except OSError:
                pass  # closed in between
        return nr

    def restore(self, index: int, state: dict[str, Any], owner: int) -> tuple[Context, socket.socket]:
        """A held context as ``state`` describes it, its memory empty yet, and the client's end of its socket."""
        context = self._make(index)
        own, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            own.setblocking(False)
            context.held = 1
            context.attach(own)
            context.owner = owner
            context.inode = os.fstat(client.fileno()).st_ino
            context.load_state(state)
        except BaseException:
            context.die()
            client.close()
            raise
        self._add(context)
        return context, client

    def add_fault(self, spec: str) -> None:
        """Let something go wrong. Raises ValueError for what nobody knows."""
        kind, _, where = spec.partition("=")
        if kind != "lost":
            self.faults.add(spec)
            return
        device = self.devices[int(where)]
        device.lost = True
        for context in list(self.contexts.values()):
            if context.device is device:
                context.lose()


def _listen(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        if not address.startswith("@") and _is_stale(address):
            os.unlink(address)
        sock.bind(for_kernel(address))
        if not address.startswith("@"):
            os.chmod(address, 0o666)
        sock.listen(64)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _is_stale(address: str) -> bool:
    """Whether a dead server left its socket there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False


def describe(server: Server) -> str:
    """One line about a server, JSON."""
    config = server.devices[0].config
    return json.dumps(
        {
            "what": "software accelerator, a stand-in for hardware, not a GPU",
            "address": server.address,
            "devices": len(server.devices),
            "memory_bytes": config.memory_bytes,
            "bandwidth_bytes_per_s": config.bandwidth_bytes_per_s,
            "latency_s": config.latency_s,
        }
    )
