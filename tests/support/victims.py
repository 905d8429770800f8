"""Victims: programs that prepare state, wait, and verify themselves. The protocol is described in ``victim.h``."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support import processes

SOURCES = Path(__file__).parent.parent / "system" / "victims"
CFLAGS = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-mno-red-zone", "-pthread")
UNAVAILABLE = 77
NOBODY = 65534


@dataclass
class Compiler:
    """Compiles a victim once for all tests of a run."""

    folder: Path
    done: dict[str, Path] = field(default_factory=dict)

    def program(self, name: str) -> list[str]:
        """The command for victim ``name``: a C program or a Python script."""
        script = SOURCES / f"{name}.py"
        if script.exists():
            return [sys.executable, str(script)]
        if name not in self.done:
            target = self.folder / name
            source = str(SOURCES / f"{name}.c")
            result = subprocess.run(["gcc", *CFLAGS, "-o", target, source], capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"victim {name} does not compile:\n{result.stderr}"
            self.done[name] = target
        return [str(self.done[name])]


class VictimUnavailable(Exception):  # noqa: N818 - not an error: the test is skipped
    """This kernel does not offer what the victim is about."""


@dataclass
class Victim:
    """A tree that was started for a test, and what became of it."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None
    pid: int
    pids: list[int] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        command: list[str],
        folder: Path,
        *arguments: str,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Victim:
        """Start it detached (session of its own, standard streams in files) and wait until it is ready."""
        folder.mkdir()
        if user is not None:
            os.chown(folder, user, user)
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            process = subprocess.Popen(
                [*command, str(folder), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
                cwd="/",
                env={**os.environ, **(env or {})},
            )
        victim = cls(Path(command[-1]).stem, folder, process, process.pid)
        victim._wait_ready()
        victim.pids = processes.tree(process.pid)
        return victim

    def _wait_ready(self) -> None:
        assert self.process is not None
        process = self.process
        processes.wait_until(
            lambda: (self.folder / "ready").exists() or process.poll() is not None, f"victim {self.name} is ready"
        )
        if not (self.folder / "ready").exists():
            if process.returncode == UNAVAILABLE:
                raise VictimUnavailable(self.name)
            raise AssertionError(
                f"victim {self.name} ended with {process.returncode} before it was ready: {self.said()}"
            )

    def said(self) -> str:
        """What it wrote to its standard streams."""
        return "".join((self.folder / name).read_text(errors="replace") for name in ("out", "err"))

    def beats(self) -> int:
        """The counter that the victim increases as long as it runs."""
        raw = (self.folder / "beats").read_bytes() if (self.folder / "beats").exists() else b""
        return int(struct.unpack("=Q", raw)[0]) if len(raw) == 8 else 0

    def expect_running(self) -> None:
        """Its own counter shows that it goes on, and nobody traces or stops it."""
        before = self.beats()
        processes.wait_until(lambda: self.beats() > before + 1, f"victim {self.name} goes on ({self.describe()})")
        for pid in self.pids:
            assert processes.tracer(pid) == 0, f"task {pid} is still traced by {processes.tracer(pid)}"

    def describe(self) -> str:
        """The states of its tasks."""
        return ", ".join(f"{pid}: {processes.state(pid)}" for pid in self.pids)

    def expect_gone(self) -> None:
        """No task of it is left, not even a zombie."""
        if self.process is not None:
            self.process.wait(timeout=20)
            self.process = None
        processes.wait_gone(self.pids)

    def go(self) -> None:
        """Let it check itself."""
        (self.folder / "go").touch()

    def finish(self, code: int = 0) -> None:
        """Let it check itself, demand the verdict ``ok``, and wait for its exit status."""
        self.go()
        verdict = self.folder / "verdict"
        processes.wait_until(
            lambda: verdict.exists() or not processes.alive(self.pid), f"a verdict of {self.name} ({self.describe()})"
        )
        status = self._exit_status()
        text = verdict.read_text(errors="replace") if verdict.exists() else f"none; it ended with status {status}\n"
        assert text == "ok\n", f"verdict of victim {self.name}: {text}{self.said()}"
        assert status in (code, None), f"victim {self.name} ended with {status}, wanted {code}"
        processes.wait_gone(self.pids)

    def _exit_status(self) -> int | None:
        """Its exit status as a shell gives it; None when it is not a child of this process."""
        if self.process is not None:
            code = self.process.wait(timeout=60)
            self.process = None
            return code
        statuses: list[int] = []

        def ended() -> bool:
            status = processes.reap(self.pid)
            if status is not None:
                statuses.append(os.waitstatus_to_exitcode(status))
            return processes.state(self.pid) is None

        processes.wait_until(ended, f"victim {self.name} ends")
        return statuses[0] if statuses else None


@dataclass
class Victims:
    """Starts victims, each in a folder of its own below ``folder``."""

    compiler: Compiler
    folder: Path
    started: list[Victim] = field(default_factory=list)

    def start(
        self, name: str, *arguments: str, user: int | None = None, env: Mapping[str, str] | None = None
    ) -> Victim:
        """Start a victim and wait until its state stands."""
        folder = self.folder / f"{name}.{len(self.started)}"
        victim = Victim.start(self.compiler.program(name), folder, *arguments, user=user, env=env)
        self.started.append(victim)
        return victim

    def end(self) -> None:
        """End whatever is left of all of them."""
        processes.end_all_below()
        for path in Path("/dev/shm").glob(f"{self.folder.name}-*"):
            path.unlink()
        for victim in self.started:
            if victim.process is not None:
                # The status may have been reaped already; this only lets subprocess know.
                victim.process.poll()


def have_compiler() -> bool:
    """Victims are C programs."""
    return shutil.which("gcc") is not None
