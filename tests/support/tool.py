"""gpurestore as a user runs it: a command. Every run is remembered, so that a failing test can show its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = (sys.executable, "-m", "gpurestore")
TIMEOUT_S = 120.0
_SHOWN_CHARS = 6000


@dataclass(frozen=True)
class Outcome:
    """One run of the tool that has ended."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str
    log: str
    wall_s: float

    def expect(self, code: int) -> Outcome:
        """Demand an exit code."""
        assert self.code == code, f"exit code {self.code}, wanted {code}\n{self}"
        return self

    def one_line(self) -> str:
        """The message on stderr, which must be one line."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, f"wanted one line on stderr\n{self}"
        return lines[0]

    def __str__(self) -> str:
        parts = [f"$ gpurestore {' '.join(self.arguments)}   -> {self.code} after {self.wall_s:.2f} s"]
        for name, text in (("stdout", self.out), ("stderr", self.err), ("log", self.log)):
            if text:
                parts.append(f"--- {name}\n{text[-_SHOWN_CHARS:]}")
        return "\n".join(parts)


@dataclass
class Running:
    """A run of the tool that has not ended yet."""

    tool: Tool
    process: subprocess.Popen[str]
    arguments: tuple[str, ...]
    log_file: Path | None
    started: float

    @property
    def pid(self) -> int:
        """The tool's own pid."""
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal to the tool, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Wait for the end; a tool that hangs is killed and the test fails."""
        hung = False
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            hung = True
        try:
            log = self.log_file.read_text(errors="replace") if self.log_file else ""
        except OSError:
            log = ""
        code = self.process.returncode
        outcome = Outcome(self.arguments, code, out, err, log, time.monotonic() - self.started)
        self.tool.outcomes.append(outcome)
        assert not hung, f"the tool hung for {timeout_s:g} s\n{outcome}"
        return outcome


@dataclass
class Tool:
    """Runs gpurestore. ``prefix`` goes in front of the command (setpriv, ...), ``env`` into its environment."""

    folder: Path
    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def start(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        log: bool = False,
    ) -> Running:
        """Start a run in a process group of its own, as a shell would."""
        log_file = self.folder / f"log.{len(self.outcomes)}" if log else None
        words = tuple(map(str, arguments)) + (("-vv", "-o", str(log_file)) if log_file else ())
        process = subprocess.Popen(
            [*self.prefix, *prefix, *COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **self.env, **(env or {})},
            process_group=0,
        )
        return Running(self, process, words, log_file, time.monotonic())

    def run(self, *arguments: str | Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Outcome:
        """Run to the end, without a log."""
        return self.start(*arguments, env=env, prefix=prefix).wait()

    def dump(self, pid: int, images: Path, *options: str, env: Mapping[str, str] | None = None) -> Outcome:
        """``gpurestore dump -t PID -D IMAGES``."""
        return self.start("dump", "-t", str(pid), "-D", images, *options, env=env, log=True).wait()

    def restore(self, images: Path, *options: str, env: Mapping[str, str] | None = None) -> Outcome:
        """``gpurestore restore -D IMAGES``, detached unless the options say otherwise."""
        return self.start("restore", "-D", images, *(options or ("-d",)), env=env, log=True).wait()

    def report(self) -> str:
        """All runs so far, for the report of a failed test."""
        return "\n\n".join(map(str, self.outcomes))


def interrupt(running: Running) -> None:
    """Ctrl-C."""
    running.signal(signal.SIGINT)
