"""gpurestore and CRIU as contenders: commands that are timed, and what they say about themselves."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import GPURESTORE, Broken, timed

# Fields of dump_stats_entry and restore_stats_entry of CRIU's stats files; microseconds.
_FROZEN_TIME, _RESTORE_TIME = 2, 4
_STATS_HEAD_BYTES = 12  # two magics, and the size of the only record


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a tool: seconds by clock ("command", "engine", stages), and other facts."""

    seconds: dict[str, float]
    facts: dict[str, Any]


@dataclass
class Gpurestore:
    """Our command line."""

    helps: dict[str, str] = field(default_factory=dict)

    def has(self, command: str, option: str) -> bool:
        """Whether ``gpurestore COMMAND`` knows ``option``."""
        if command not in self.helps:
            self.helps[command] = timed([*GPURESTORE, command, "--help"])[1]
        words = self.helps[command].replace("=", " ").replace(",", " ").replace("[", " ").replace("]", " ").split()
        return option in words

    def dump(self, pid: int, images: Path, *options: str) -> Run:
        """``gpurestore dump``."""
        return self._run("dump", "-t", str(pid), "-D", str(images), *options)

    def restore(self, images: Path, *options: str) -> Run:
        """``gpurestore restore``, detached."""
        return self._run("restore", "-d", "-D", str(images), *options)

    def _run(self, *arguments: str) -> Run:
        seconds, out = timed([*GPURESTORE, *arguments, "--json"])
        facts: dict[str, Any] = json.loads(out)
        stages = {str(name): float(wall_s) for name, wall_s, _ in facts["stages"]}
        clocks = {"command": seconds, "engine": float(facts["total_s"])}
        memory_s = sum(stages.get(name, 0.0) for name in ("memory", "shared memory"))
        if memory_s:
            clocks["memory"] = memory_s
        if "frozen_s" in facts:
            clocks["frozen"] = float(facts["frozen_s"])
        return Run(clocks, facts)


@dataclass(frozen=True)
class Criu:
    """The reference."""

    program: str

    @classmethod
    def named(cls) -> Criu | None:
        """What ``CRIU=`` names; None where nothing is named. Raises Broken where that does not run."""
        program = os.environ.get("CRIU")
        if not program:
            return None
        timed([program, "check"])
        return cls(program)

    @property
    def version(self) -> str:
        """As it says."""
        out = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False).stdout
        return " ".join(out.split()).replace("Version: ", "")

    def dump(self, pid: int, images: Path, *options: str) -> Run:
        """``criu dump`` into a new folder."""
        images.mkdir()
        seconds = self._timed("dump", images, ["-t", str(pid), *options])
        frozen_us = read_stats(images / "stats-dump").get(_FROZEN_TIME, 0)
        return Run({"command": seconds, "frozen": frozen_us / 1e6}, {"image_bytes": folder_bytes(images)})

    def restore(self, images: Path, *options: str) -> Run:
        """``criu restore``, detached."""
        seconds = self._timed("restore", images, ["-d", *options])
        restored_us = read_stats(images / "stats-restore").get(_RESTORE_TIME, 0)
        return Run({"command": seconds, "engine": restored_us / 1e6}, {})

    @contextmanager
    def restored_lazily(self, images: Path, wait_s: float = 60) -> Iterator[None]:
        """``criu restore --lazy-pages``, detached, with a daemon that brings the pages in.

        Left without an error it waits for the daemon, which has to end by itself; the daemon never outlives it.
        """
        socket = images / "lazy-pages.socket"
        socket.unlink(missing_ok=True)
        command: list[str | Path] = [self.program, "lazy-pages", "-D", images, "-o", "lazy-pages.log"]
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not socket.exists() and daemon.poll() is None:
                time.sleep(0.001)  # its start is measured: no longer than that
            self._timed("restore", images, ["-d", "--lazy-pages"])
            yield
            if code := daemon.wait(wait_s):
                raise Broken(f"criu lazy-pages ended with {code}")
        except subprocess.TimeoutExpired:
            raise Broken(f"criu lazy-pages has not ended {wait_s:g} s after its tree") from None
        finally:
            daemon.kill()
            daemon.wait()

    def _timed(self, command: str, images: Path, options: Sequence[str]) -> float:
        log = images / f"{command}.log"
        try:
            return timed([self.program, command, "-D", images, "-o", log.name, *options])[0]
        except Broken as error:
            last = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line][-3:]
            raise Broken(f"{error} {' / '.join(last)}") from None


def folder_bytes(folder: Path) -> int:
    """All files of a dump together."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def read_stats(file: Path) -> dict[int, int]:
    """Numbers of the one message in a stats file of CRIU, by field number."""
    data = file.read_bytes()[_STATS_HEAD_BYTES:]
    # The record holds one message, field 1 or 2, and that holds nothing but numbers.
    at = _varint(data, _varint(data, 0)[1])[1]
    found: dict[int, int] = {}
    while at < len(data):
        key, at = _varint(data, at)
        found[key >> 3], at = _varint(data, at)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
