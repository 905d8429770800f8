"""The fake CUDA driver (tests/devices/fake_libcuda), programs that use it, and a fake NVML."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.processes import become_subreaper, wait_until
from support.tool import Tool

SOURCES = Path(__file__).parent.parent / "devices"
GPU_A = "GPU-aaaaaaaa-0000-1111-2222-333333333333"
GPU_B = "GPU-bbbbbbbb-0000-1111-2222-333333333333"
GPU_C = "GPU-cccccccc-0000-1111-2222-333333333333"


def plain(uuid: str) -> str:
    """A UUID as the fake writes it."""
    return uuid.removeprefix("GPU-").replace("-", "")


def build(folder: Path, version: int = 13000) -> Path:
    """The fake driver of one CUDA version, and beside it the program ``victim`` that uses it."""
    folder = folder / f"cuda-{version}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True)
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-mno-red-zone"]
        shared = [*flags, "-shared", "-fPIC", "-fvisibility=hidden", f"-DVERSION={version}"]
        _compile([*shared, "-o", library, *sorted((SOURCES / "fake_libcuda").glob("*.c"))])
        program = [SOURCES / "cuda_victim.c", library, f"-Wl,-rpath,{folder}"]
        _compile([*flags, "-o", folder / "victim", *program])
    return library


def _compile(arguments: list[Any]) -> None:
    result = subprocess.run(["gcc", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@dataclass
class FakeCuda:
    """A machine with the fake driver: its folder of state, and the processes on it."""

    library: Path
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, *, gpu: str = GPU_A, steps: int = 1_000_000, ms: int = 1, out: Path | None = None, wait: bool = False
    ) -> int:
        """A process that computes; its pid, once the driver knows it. ``wait``: half-way it waits for :func:`go`."""
        out = out or self.folder / f"result-{len(self.processes)}"
        if not wait:
            go(out)
        pid = self._popen([str(self.library.parent / "victim"), plain(gpu), str(steps), str(ms), str(out)])
        wait_until(lambda: (self.folder / f"{pid}.state").exists(), "the driver knows the process")
        return pid

    def start_tree(self, *outs: Path, steps: int) -> int:
        """A shell, which does not use CUDA, with a process that does for each of ``outs``; the shell's pid."""
        victim = self.library.parent / "victim"
        parts = [f"{victim} {plain(GPU_A)} {steps} 1 {out} &" for out in outs]
        pid = self._popen(["sh", "-c", " ".join([*parts, "wait"])])
        wait_until(lambda: len(list(self.folder.glob("*.state"))) >= len(outs), "the driver knows all processes")
        return pid

    def _popen(self, command: list[str]) -> int:
        process = subprocess.Popen(
            command,
            env={**os.environ, "FAKE_CUDA_DIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process.pid

    def state(self, pid: int) -> str:
        """The state as the process publishes it: a number."""
        return (self.folder / f"{pid}.state").read_text().split()[0]

    def thread(self, pid: int) -> int:
        """Its restore thread."""
        return int((self.folder / f"{pid}.state").read_text().split()[1])

    def gpu(self, pid: int) -> str:
        """The GPU (plain) that the process has."""
        return (self.folder / f"{pid}.state").read_text().split()[2]

    def set_busy(self, pid: int, *, busy: bool = True) -> None:
        """Whether its work comes to rest."""
        path = self.folder / f"{pid}.busy"
        path.touch() if busy else path.unlink()

    def calls(self, *names: str) -> list[tuple[str, int, int]]:
        """(name, pid, result) of all calls that changed something, in order."""
        return [(line[0], int(line[1]), int(line[2])) for line in self.lines() if not names or line[0] in names]

    def lines(self) -> list[list[str]]:
        """The record of calls, split."""
        path = self.folder / "calls"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def end(self) -> None:
        """Kill and reap what was started."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def driver_of(tool: Tool, library: Path, folder: Path) -> Iterator[FakeCuda]:
    """The fake driver for what ``tool`` dumps and restores; whoever computes is ended."""
    become_subreaper()
    folder.mkdir()
    tool.env = {"FAKE_CUDA_DIR": str(folder), "GPURESTORE_LIBCUDA": str(library)}
    machine = FakeCuda(library, folder)
    yield machine
    machine.end()


def go(out: Path) -> None:
    """Let the process whose result goes to ``out`` compute its second half."""
    out.with_name(f"{out.name}.go").touch()


class FakeNvmlError(Exception):
    """What pynvml raises."""


@dataclass
class FakeGpu:
    """One GPU that the fake NVML shows."""

    uuid: str
    model: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 << 30
    free: int = 79 << 30
    minor: int = 0
    capability: tuple[int, int] = (9, 0)
    mig: bool = False
    processes: list[Any] = field(default_factory=list)
    mps: list[Any] = field(default_factory=list)


def process(pid: int, used: int | None = 1 << 30, instance: int = 0xFFFFFFFF) -> Any:
    """A process in NVML's words."""
    return SimpleNamespace(pid=pid, usedGpuMemory=used, gpuInstanceId=instance)


class FakeNvml:
    """The part of pynvml that is used. ``silent`` names facts that are not told."""

    NVMLError = FakeNvmlError

    def __init__(self, *gpus: FakeGpu, silent: tuple[str, ...] = (), topology: int = 20) -> None:
        self.gpus, self.silent, self.topology, self.open = gpus, silent, topology, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "silent"):
            return self._refuse
        return object.__getattribute__(self, name)

    @staticmethod
    def _refuse(*_: Any) -> Any:
        raise FakeNvmlError("Not Supported")

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(total=gpu.total, free=gpu.free)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId=b"00000000:01:00.0")

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        return [int(gpu.mig), int(gpu.mig)]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.model

    def nvmlDeviceGetMinorNumber(self, gpu: FakeGpu) -> int:
        return gpu.minor

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return gpu.processes

    def nvmlDeviceGetMPSComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return gpu.mps

    def nvmlDeviceGetTopologyCommonAncestor(self, first: FakeGpu, second: FakeGpu) -> int:
        return self.topology
