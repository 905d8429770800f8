"""A server of the software accelerator for a test, and the plugin's hooks driven by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpurestore.devplugins import softaccel
from gpurestore.devplugins.api import HookContext, Stage
from gpurestore.devplugins.softaccel import for_kernel
from gpurestore.devplugins.softaccel.client import Context, Page
from gpurestore.devplugins.softaccel.plugin import SoftaccelPlugin

SOURCES = Path(__file__).parents[1] / "devices"


@dataclass
class RunningServer:
    """A server process."""

    address: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)


@contextmanager
def server(*options: str, address: str | None = None) -> Iterator[RunningServer]:
    """A server of its own; it listens when this returns."""
    where = address or f"@softaccel-test-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "gpurestore.devplugins.softaccel", "--with-parent", "--socket", where, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        assert b"not a GPU" in process.stdout.readline()
        yield RunningServer(where, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Images:
    """An image folder as a host offers it to a plugin."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self._fds: list[int] = []

    def dump_context(self, where: str, *, tree_goes_on: bool = False) -> HookContext:
        return HookContext(Stage.DUMP, self.path, self._create, options={"socket": where}, tree_goes_on=tree_goes_on)

    def restore_context(self, where: str | None, **options: str) -> HookContext:
        given = {"socket": where, **options} if where else {**options}
        return HookContext(Stage.RESTORE, self.path, self._open, options=given)

    def _create(self, name: str) -> int:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        return fd

    def _open(self, name: str) -> int:
        return os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """What a host does with the descriptors that it keeps."""
        while self._fds:
            os.close(self._fds.pop())


async def dump_contexts(plugin: SoftaccelPlugin, contexts: list[Context], pid: int, first_ident: int = 1) -> None:
    """The hooks of a dump up to DUMP_FINISH, for contexts of one process."""
    await plugin.pause_devices(pid)
    await plugin.checkpoint_devices(pid)
    for ident, context in enumerate(contexts, first_ident):
        plugin.dump_ext_file(context._sock.fileno(), ident)
        claim_page(plugin, context)
    await plugin.dump_devices_late(pid)


def claim_page(plugin: SoftaccelPlugin, context: Context) -> None:
    """Offer a context's doorbell page to the plugin."""
    name = page_path(context)
    with open("/proc/self/maps") as maps:
        inode = next(int(line.split()[4]) for line in maps if name in line)
    plugin.handle_device_vma(-1, os.stat_result((0, inode, *(0,) * 8)))


def move(context: Context, plugin: SoftaccelPlugin, ident: int, page_path: str) -> None:
    """Give a client what a restore would: another socket under its number, another page under its address."""
    fd = plugin.restore_ext_file(ident)
    os.dup2(fd, context._sock.fileno(), inheritable=False)
    os.close(fd)
    update: Any = plugin.update_vma_map(page_path, 0, 0)
    try:
        context._page = Page(update.fd)
    finally:
        os.close(update.fd)


def page_path(context: Context) -> str:
    """What the kernel shows as the path of a context's doorbell page."""
    return f"/memfd:softaccel-doorbell-{context.uid:016x} (deleted)"


def compile_with_client(name: str, target: Path) -> Path:
    """Build tests/devices/NAME.c together with the C client, warnings being errors."""
    client = Path(softaccel.__file__).parent
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{client}"]
    sources = [SOURCES / f"{name}.c", client / "softaccel.c"]
    subprocess.run(["gcc", *flags, "-o", target, *sources], check=True)
    return target


def fault(running: RunningServer, spec: str) -> None:
    """Let something go wrong in a server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as tool:
        tool.connect(for_kernel(running.address))
        tool.send(json.dumps({"op": "fault", "spec": spec}).encode())
        assert json.loads(tool.recv(4096))["ok"]
