"""Training jobs on a real GPU (tests/gpu/train.py)."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from support.processes import wait_until

SCRIPT = Path(__file__).parent.parent / "gpu" / "train.py"
STEPS = 200
PATIENCE_S = 300.0


def missing_gpu() -> str | None:
    """Why nothing can be tried here."""
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA GPU here (no /dev/nvidiactl)"
    from gpurestore.devplugins.cuda.driver import describe

    if problem := describe().problem:
        return problem
    if importlib.util.find_spec("torch") is None and importlib.util.find_spec("cupy") is None:
        return "neither PyTorch nor CuPy is installed"
    return None


def library() -> str:
    """What jobs compute with."""
    return "torch" if importlib.util.find_spec("torch") else "cupy"


@dataclass
class Jobs:
    """Jobs of one test. ``library`` is torch or cupy."""

    folder: Path
    library: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *, gpu: int | None = None, wait: bool = True, ballast_mib: int = 0) -> tuple[int, Path]:
        """A job that has come half-way and waits there (or does not); its pid, and the file for its losses.

        It keeps ``ballast_mib`` of random numbers on the device, and ends badly should they change.
        """
        out = self.folder / name
        if not wait:
            self.go(out)
        env = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})}
        with open(f"{out}.err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(out), str(STEPS), self.library, str(ballast_mib)],
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                start_new_session=True,
                cwd="/",
                env=env,
            )
        self.processes.append(process)
        self.await_file(Path(f"{out}.half"), process)
        return process.pid, out

    def losses(self, out: Path) -> list[str]:
        """All losses, once the job has ended."""
        self.await_file(out)
        return out.read_text().split()

    def reap(self, pid: int) -> None:
        """Forget a job that a dump killed."""
        process = next(process for process in self.processes if process.pid == pid)
        process.wait(30)
        self.processes.remove(process)

    def forget(self, pid: int) -> None:
        """Reap a job that a dump killed, where it is our child, and forget it."""
        for process in [process for process in self.processes if process.pid == pid]:
            self.reap(process.pid)

    @staticmethod
    def go(out: Path) -> None:
        """Let a job compute its second half."""
        Path(f"{out}.go").touch()

    @staticmethod
    def await_file(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
        """Wait until a job has written ``path``."""

        def written() -> bool:
            if process is not None and process.poll() not in (None, 0):
                error = Path(f"{path.with_suffix('')}.err").read_text(errors="replace")
                raise AssertionError(f"the job ended with {process.returncode}:\n{error}")
            return path.exists()

        wait_until(written, f"{path} is written", PATIENCE_S)

    def end(self) -> None:
        """Kill and reap what is left."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
