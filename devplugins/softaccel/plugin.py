"""The device plugin of the software accelerator, which is a stand-in for hardware, not a GPU.

Dump. PAUSE_DEVICES finds a task's contexts by the inodes of its sockets and has the server drain and hold them;
CHECKPOINT_DEVICES does the same for those that were opened meanwhile, then lets the server write each context, state
and memory, to an image of its own. That goes on while host memory is written; DUMP_DEVICES_LATE waits for its end.

    softaccel-CONTEXT.img    a context (image.py)
    softaccel-file-ID.img    which context the claimed descriptor ID belongs to

A client's socket is claimed by DUMP_EXT_FILE, its doorbell page by HANDLE_DEVICE_VMA. What is held is held by our
connection to the server: DUMP_FINISH gives it back when the tree is to go on, and so does the end of this process.

Restore. RESTORE_INIT compares what the images want with what the server has and makes all contexts, which reserves
their memory; POST_FORKING fills it, all contexts at once; RESUME_DEVICES_LATE binds a task's contexts to it and lets
them go on.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from gpurestore.devplugins.api import API_VERSION, Declined, DevicePlugin, HookContext, Stage, VmaUpdate
from gpurestore.devplugins.softaccel import PAGE_NAME, SOCKET_VARIABLE, address
from gpurestore.devplugins.softaccel.toolside import ServerError, ServerMissingError, Tool
from gpurestore.errors import GpurestoreError, HookError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gpurestore.devplugins.softaccel.needs import Wanted

_CONTEXT_IMAGE = re.compile(r"softaccel-([0-9a-f]{16})\.img")
_PAGE_PATH = re.compile(rf"/memfd:{PAGE_NAME}([0-9a-f]{{16}})(?: \(deleted\))?")
_SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")
_MAX_INODES = 1000  # a message's worth
_HELLO_WAIT_S, _HELLO_POLL_S = 2.0, 0.005


@dataclass(slots=True)
class _Dumped:
    """A context that was found at dump."""

    uid: str
    pid: int
    page_inode: int
    memory_bytes: int
    written: bool = False
    page_claimed: bool = False


@dataclass(frozen=True, slots=True)
class _Writing:
    """A context that the server writes to an image just now."""

    tool: Tool
    context: _Dumped
    fd: int
    stack: AsyncExitStack
    span: Any


@dataclass(slots=True)
class _Restored:
    """A context that was made at restore."""

    tool: Tool
    uid: str
    pid: int
    socket_fd: int
    page_fd: int
    memory_bytes: int

    def close_fds(self) -> None:
        for fd in (self.socket_fd, self.page_fd):
            if fd >= 0:
                os.close(fd)
        self.socket_fd = self.page_fd = -1


class SoftaccelPlugin(DevicePlugin):
    """See the module."""

    name = "softaccel"
    version = API_VERSION

    def __init__(self) -> None:
        self.used = False
        self._context: HookContext | None = None
        self._tools: list[Tool] = []
        self._of_pid: dict[int, Tool] = {}
        self._dumped: dict[int, _Dumped] = {}  # by the inode of the client's socket
        self._foreign: set[int] = set()
        self._writing: list[_Writing] = []
        self._restored: dict[str, _Restored] = {}  # by the uid at dump

    # ---- life

    def init(self, context: HookContext) -> None:
        """Restores of other images are not our business."""
        self._context = context
        if context.stage is Stage.RESTORE and not self._image_names():
            raise Declined("the images hold nothing of the software accelerator")

    def exit(self, stage: Stage, result: int) -> None:
        """The server gives back what our connections hold, and drops contexts that nobody got."""
        for tool in self._tools:
            tool.close()
        for restored in self._restored.values():
            restored.close_fds()
        self._tools.clear()

    @property
    def _host(self) -> HookContext:
        assert self._context is not None
        return self._context

    def _image_names(self) -> list[str]:
        return sorted(name for name in os.listdir(self._host.images_dir) if _CONTEXT_IMAGE.fullmatch(name))

    def _connect(self, where: str) -> Tool:
        tool = Tool(where)
        self._tools.append(tool)
        return tool

    @asynccontextmanager
    async def _span(self, name: str, pid: int, total: int, done: list[int]) -> AsyncIterator[None]:
        """Show bytes on their way; ``done`` holds the number so far."""
        async with AsyncExitStack() as stack:
            span: Any = None
            if self._host.span is not None:
                scope = self._host.span(name, track=f"plugin {self.name}", total=total, gauge=lambda: done[0], pid=pid)
                span = await stack.enter_async_context(scope)
            yield
            if span is not None:
                span.set(bytes=done[0])

    # ---- dump

    async def pause_devices(self, pid: int) -> None:
        """Drain and hold what the task has by now; it still runs."""
        await self._hold(pid, "PAUSE_DEVICES")

    async def checkpoint_devices(self, pid: int) -> None:
        """Hold what the task opened since, and begin to write all of it to images."""
        with _failures("CHECKPOINT_DEVICES", pid):
            await self._hold(pid, "CHECKPOINT_DEVICES")
            mine = [context for context in self._dumped.values() if context.pid == pid and not context.written]
            async with trio.open_nursery() as nursery:
                for context in mine:
                    self.used = context.written = True
                    nursery.start_soon(self._begin, context)

    async def _hold(self, pid: int, hook: str) -> None:
        inodes = _sockets(pid)
        if not inodes:
            return
        with _failures(hook, pid):
            tool = self._of_pid.get(pid)
            if tool is None:
                try:
                    tool = self._connect(self._address_of(pid))
                except ServerMissingError:
                    return  # then no socket of this task is a client's
                self._of_pid[pid] = tool
            pidfd = os.pidfd_open(pid)
            try:
                for start in range(0, len(inodes), _MAX_INODES):
                    for found in await self._find(tool, pidfd, inodes[start : start + _MAX_INODES], hook):
                        await self._hold_one(tool, pid, found)
            finally:
                os.close(pidfd)

    async def _find(self, tool: Tool, pidfd: int, inodes: list[int], hook: str) -> list[Mapping[str, Any]]:
        """Contexts behind sockets. A client that has just connected is given time to say so, while it still runs."""
        deadline = trio.current_time() + _HELLO_WAIT_S
        while True:
            answer, _ = await tool.call("find", [pidfd], inodes=inodes)
            if not answer["silent"]:
                return list(answer["contexts"])
            if hook != "PAUSE_DEVICES" or trio.current_time() > deadline:
                raise ServerError(
                    errno.EAGAIN, "a client is caught between its connect and its first message; try again"
                )
            await trio.sleep(_HELLO_POLL_S)

    async def _hold_one(self, tool: Tool, pid: int, found: Mapping[str, Any]) -> None:
        inode = int(found["inode"])
        if not found["mine"]:
            self._foreign.add(inode)  # inherited or received: the process that opened it holds it
            return
        await tool.call("hold", uid=found["uid"])
        context = _Dumped(found["uid"], pid, int(found["page_inode"]), int(found["memory_bytes"]))
        known = self._dumped.setdefault(inode, context)
        known.memory_bytes = context.memory_bytes

    def _address_of(self, pid: int) -> str:
        """Where the task's server listens: as we were told, else as the task was."""
        return address(self._host.options.get("socket") or os.environ.get(SOCKET_VARIABLE) or _from_environ(pid))

    async def _begin(self, context: _Dumped) -> None:
        """Let the server begin to write a context. It goes on while the pipeline writes everything else."""
        fd = self._host.open_image(f"softaccel-{context.uid}.img")
        tool = self._connect(self._of_pid[context.pid].address)
        stack, span = AsyncExitStack(), None  # the span ends in another hook than it begins in
        if self._host.span is not None:
            scope = self._host.span("device memory", track=f"plugin {self.name}", pid=context.pid)
            span = await stack.enter_async_context(scope)
        self._writing.append(_Writing(tool, context, fd, stack, span))
        await tool.call("checkpoint", [fd], uid=context.uid, pid=context.pid)

    async def dump_devices_late(self, pid: int) -> None:
        """Wait until all contexts are written."""
        for writing in self._writing:
            with _failures("DUMP_DEVICES_LATE", writing.context.pid):
                await self._end(writing)
                _check_page(writing.context)

    async def _end(self, writing: _Writing) -> None:
        async with writing.stack:
            answer = await writing.tool.finish("checkpoint")
            size = os.fstat(writing.fd).st_size
            if size != answer["file_bytes"]:
                uid, wanted = writing.context.uid, answer["file_bytes"]
                raise ServerError(0, f"the image of context {uid} has {size} bytes, not {wanted}")
            if writing.span is not None:
                writing.span.set(bytes=int(answer["bytes"]))
        if writing.span is not None:  # the server was done before anybody asked
            until_ns = writing.span.start_ns + int(answer["seconds"] * 1e9)
            writing.span.end_ns = min(writing.span.end_ns, until_ns)

    def dump_ext_file(self, fd: int, ident: int) -> None:
        """Claim the socket of a client."""
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode):
            raise Declined
        context = self._dumped.get(found.st_ino)
        if context is None:
            if found.st_ino in self._foreign:
                why = "its context on the software accelerator belongs to a process outside of the tree"
                raise HookError(self.name, "DUMP_EXT_FILE", None, why)
            raise Declined
        data = json.dumps({"context": context.uid}).encode()
        os.write(self._host.open_image(_file_image(ident)), data)

    def handle_device_vma(self, fd: int, found: os.stat_result) -> None:
        """Claim a doorbell page."""
        mine = [context for context in self._dumped.values() if context.page_inode == found.st_ino]
        if not mine or (fd >= 0 and not _PAGE_PATH.fullmatch(os.readlink(f"/proc/self/fd/{fd}"))):
            raise Declined
        mine[0].page_claimed = True

    async def dump_finish(self, result: int) -> None:
        """Give devices back, unless the tree dies anyway."""
        if result == 0 and not self._host.tree_goes_on:
            return
        for tool in self._of_pid.values():
            try:
                await tool.call("release")
            except ServerError:
                tool.close()  # does the same

    # ---- restore

    async def restore_init(self) -> None:
        """Look whether everything is there, and take it."""
        from gpurestore.devplugins.softaccel.needs import assign, read_wanted

        with _failures("RESTORE_INIT", None):
            wanted: list[Wanted] = [read_wanted(self._host.open_image, name) for name in self._image_names()]
            try:
                where = self._host.options.get("socket") or os.environ.get(SOCKET_VARIABLE) or wanted[0].server
                tool = self._connect(address(where))
                answer, _ = await tool.call("info")
                devices = assign(wanted, answer["devices"], self._host.options.get("device-map"))
                async with trio.open_nursery() as nursery:
                    for want in wanted:
                        nursery.start_soon(self._make, tool.address, want, devices[want.device])
            finally:
                for want in wanted:
                    os.close(want.fd)

    async def _make(self, where: str, want: Wanted, device: int) -> None:
        tool = self._connect(where)
        answer, fds = await tool.call("create", [want.fd], device=device)
        self._restored[want.uid] = _Restored(tool, answer["uid"], want.pid, fds[0], fds[1], want.memory_bytes)

    def restore_ext_file(self, ident: int) -> int:
        """The client's end of a restored context's socket."""
        name = _file_image(ident)
        if not os.path.exists(self._host.images_dir / name):
            raise Declined
        fd = self._host.open_image(name)
        try:
            uid = json.loads(os.read(fd, 4096))["context"]
        finally:
            os.close(fd)
        restored = self._restored.get(uid)
        if restored is None:
            why = f"{name} names context {uid}, of which there is no image"
            raise HookError(self.name, "RESTORE_EXT_FILE", None, why)
        return os.dup(restored.socket_fd)

    def update_vma_map(self, path: str, address: int, old_pgoff: int) -> VmaUpdate:
        """The restored doorbell page instead of the old one."""
        match = _PAGE_PATH.fullmatch(path)
        if match is None or match[1] not in self._restored:
            raise Declined
        return VmaUpdate(old_pgoff, os.dup(self._restored[match[1]].page_fd))

    async def post_forking(self) -> None:
        """Fill device memory, while tasks are filled."""
        with _failures("POST_FORKING", None):
            async with trio.open_nursery() as nursery:
                for restored in self._restored.values():
                    nursery.start_soon(self._fill, restored)

    async def _fill(self, restored: _Restored) -> None:
        done = [0]
        async with self._span("device memory", restored.pid, restored.memory_bytes, done):
            answer, _ = await restored.tool.call("fill", (), _into(done), uid=restored.uid)
            done[0] = int(answer["bytes"])

    async def resume_devices_late(self, pid: int) -> None:
        """The task gets its contexts; what they were about to do goes on."""
        mine = [restored for restored in self._restored.values() if restored.pid == pid]
        if not mine:
            raise Declined
        with _failures("RESUME_DEVICES_LATE", pid):
            pidfd = os.pidfd_open(pid)
            try:
                for restored in mine:
                    await restored.tool.call("resume", [pidfd], uid=restored.uid)
                    restored.close_fds()
            finally:
                os.close(pidfd)


@contextmanager
def _failures(hook: str, pid: int | None) -> Iterator[None]:
    """Errors of the server, also out of a nursery, become a failed hook's, of which the first is told."""
    try:
        yield
    except (ServerError, BaseExceptionGroup) as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            rest = first.split(trio.Cancelled)[1]
            if rest is None:
                raise
            first = rest.exceptions[0]
        if isinstance(first, HookError):
            raise first from error
        if isinstance(first, OSError | GpurestoreError):
            why = first.strerror if isinstance(first, OSError) and first.strerror else str(first)
            raise HookError("softaccel", hook, pid, why) from error
        raise
    except GpurestoreError as error:
        if isinstance(error, HookError):
            raise
        raise HookError("softaccel", hook, pid, str(error)) from error


def _check_page(context: _Dumped) -> None:
    """A doorbell page that was dumped as common memory would be a copy that rings nowhere: fail instead."""
    with open(f"/proc/{context.pid}/maps") as maps:
        if not context.page_claimed and f"{PAGE_NAME}{context.uid}" in maps.read():
            raise ServerError(errno.EINVAL, f"the doorbell page of context {context.uid} was not offered to be claimed")


def _into(done: list[int]) -> Callable[[int], None]:
    def note(number: int) -> None:
        done[0] = number

    return note


def _file_image(ident: int) -> str:
    return f"softaccel-file-{ident:x}.img"


def _sockets(pid: int) -> list[int]:
    """Inodes of all sockets that a task has open."""
    found = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    for name in names:
        try:
            match = _SOCKET_LINK.fullmatch(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
        if match is not None:
            found.add(int(match[1]))
    return sorted(found)


def _from_environ(pid: int) -> str | None:
    """The server's address in the environment that a task was started with."""
    start = f"{SOCKET_VARIABLE}=".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    return next((os.fsdecode(entry[len(start) :]) for entry in entries if entry.startswith(start)), None)
