"""Device plugins for tests: compiled from tests/devices/plugins, or written as Python text."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import trio

import gpurestore
from gpurestore.devplugins.api import HookContext, Stage
from gpurestore.devplugins.host import PluginHost

SOURCES = Path(__file__).parent.parent / "devices" / "plugins"
CFLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
PRELUDE = "from gpurestore.devplugins.api import *\nimport os, time, trio\n"


@dataclass
class PluginFolder:
    """A folder to be given by -L, and what the log said."""

    path: Path
    cache: Path
    records: list[logging.LogRecord] = field(default_factory=list)

    def compile(self, source: str, *flags: str, to: str | None = None) -> Path:
        """Compile ``source``.c into the folder, as ``to``.so."""
        return compile_plugin(source, self.path / f"{to or source}.so", *flags)

    def write(self, name: str, text: str) -> Path:
        """A Python plugin; the interface's names are imported for it."""
        path = self.path / f"{name}.py"
        path.write_text(PRELUDE + text)
        return path

    def messages(self) -> list[str]:
        """What was logged, without tracebacks."""
        return [record.getMessage() for record in self.records]


def compile_plugin(source: str, target: Path, *flags: str) -> Path:
    """Build one of the plugins in tests/devices/plugins, warnings being errors."""
    target.write_bytes(_built(source, flags))
    return target


@cache
def _built(source: str, flags: tuple[str, ...]) -> bytes:
    command = ["gcc", *CFLAGS, f"-I{gpurestore.include_dir()}", f"-I{SOURCES}", *flags, str(SOURCES / f"{source}.c")]
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        result = subprocess.run([*command, "-o", file.name], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"plugin {source} does not compile:\n{result.stderr}"
        return Path(file.name).read_bytes()


@contextmanager
def plugin_folder(path: Path) -> Iterator[PluginFolder]:
    """A folder for plugins, and the log of the host while it is used."""
    lib = path / "lib"
    lib.mkdir()
    folder = PluginFolder(lib, path)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            folder.records.append(record)

    log = logging.getLogger("gpurestore.plugin")
    keep, before = Keep(), log.level
    log.addHandler(keep)
    log.setLevel(logging.DEBUG)
    try:
        yield folder
    finally:
        log.removeHandler(keep)
        log.setLevel(before)


def context_of(images: Path, stage: Stage = Stage.DUMP, **more: Any) -> HookContext:
    """What a pipeline would offer."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_image(name: str) -> int:
        return os.open(images / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    return HookContext(stage=stage, images_dir=images, images_dir_fd=fd, open_image=open_image, **more)


def run_with_host(folder: PluginFolder, use: Callable[[PluginHost], Any], **options: Any) -> Any:
    """The same from outside of trio."""
    return trio.run(partial(with_host, folder, use, **options))


async def with_host(
    folder: PluginFolder,
    use: Callable[[PluginHost], Any],
    *,
    stage: Stage = Stage.DUMP,
    options: Sequence[str] = (),
    needed: Sequence[str] | None = None,
    hook_timeout_s: float | None = None,
    result: int = 0,
    is_named: bool = True,
) -> Any:
    """Start a host on the folder, await ``use(host)``, stop it. With ``is_named`` the folder is given by -L."""
    context = context_of(folder.cache, stage)
    host = PluginHost(folder.path if is_named else None, options, hook_timeout_s)
    try:
        await host.start(context, needed)
        try:
            return await use(host)
        finally:
            await host.stop(result)
    finally:
        os.close(context.images_dir_fd)
