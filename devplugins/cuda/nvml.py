"""Which GPUs are here and who uses them, told by NVML through nvidia-ml-py (``pip install 'gpurestore[cuda]'``).

NVML is asked once at dump and once at restore, and closed again at once. Facts that a GPU or its driver does not tell
are None; only what everything else rests on (UUID, name, memory) must be there.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpurestore.errors import CudaError

log = logging.getLogger("gpurestore.cuda")

_NO_INSTANCE = 0xFFFFFFFF
_TOPOLOGY = {0: "same board", 10: "one switch", 20: "switches", 30: "host bridge", 40: "same CPU", 50: "across CPUs"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a machine. ``free_bytes`` is as of now, and in no image."""

    index: int
    uuid: str
    model: str
    memory_bytes: int
    minor: int | None = None
    pci: str | None = None
    compute_capability: str | None = None
    mig: bool = False
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """A process on a GPU. ``memory_bytes`` is None where NVML does not tell."""

    uuid: str
    memory_bytes: int | None
    mig: bool = False
    mps: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """How two GPUs (by index) are connected."""

    first: int
    second: int
    kind: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """All GPUs of a machine and the processes on them."""

    driver: str
    gpus: tuple[Gpu, ...]
    topology: tuple[Link, ...] = ()
    uses: dict[int, tuple[Use, ...]] = field(default_factory=dict)  # by pid

    def gpu(self, uuid: str) -> Gpu | None:
        """The GPU of that UUID."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)


def _pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise CudaError("nvidia-ml-py is not installed: pip install 'gpurestore[cuda]'") from error


def read(module: Any = None) -> Inventory:
    """Ask NVML. Raises CudaError where it is not there or does not answer. ``module``: instead of pynvml."""
    if module is None:
        module = _pynvml()
    try:
        module.nvmlInit()
    except module.NVMLError as error:
        raise CudaError(f"NVML cannot be used: {error}") from error
    try:
        return _Reader(module).read()
    except module.NVMLError as error:
        raise CudaError(f"NVML does not answer: {error}") from error
    finally:
        module.nvmlShutdown()


class _Reader:
    """One conversation with NVML."""

    def __init__(self, module: Any) -> None:
        self._nvml = module

    def read(self) -> Inventory:
        nvml = self._nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(self._gpu(index, handle) for index, handle in enumerate(handles))
        uses: dict[int, list[Use]] = {}
        for gpu, handle in zip(gpus, handles, strict=True):
            for pid, use in self._uses(gpu.uuid, handle):
                uses.setdefault(pid, []).append(use)
        links = tuple(
            Link(first, second, kind)
            for first in range(len(handles))
            for second in range(first + 1, len(handles))
            if (kind := self._link(handles[first], handles[second])) is not None
        )
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return Inventory(driver, gpus, links, {pid: tuple(some) for pid, some in uses.items()})

    def _gpu(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        pci = self._ask(nvml.nvmlDeviceGetPciInfo, handle)
        mig = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        return Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            model=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(memory.total),
            minor=self._ask(nvml.nvmlDeviceGetMinorNumber, handle),
            pci=None if pci is None else _text(pci.busId),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            mig=bool(mig and mig[0]),
            free_bytes=int(memory.free),
        )

    def _uses(self, uuid: str, handle: Any) -> list[tuple[int, Use]]:
        nvml, found = self._nvml, []
        through_mps = {p.pid for p in self._ask(nvml.nvmlDeviceGetMPSComputeRunningProcesses, handle) or ()}
        processes = list(self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ())
        known = {p.pid for p in processes}
        processes += [
            p for p in self._ask(nvml.nvmlDeviceGetMPSComputeRunningProcesses, handle) or () if p.pid not in known
        ]
        for process in processes:
            instance = getattr(process, "gpuInstanceId", None)
            in_mig = instance is not None and instance != _NO_INSTANCE
            used = process.usedGpuMemory
            use = Use(uuid, None if used is None else int(used), in_mig, process.pid in through_mps)
            found.append((int(process.pid), use))
        return found

    def _link(self, first: Any, second: Any) -> str | None:
        level = self._ask(self._nvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
        return None if level is None else _TOPOLOGY.get(level, f"level {level}")

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """A fact that not every GPU tells."""
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            log.debug("NVML: %s: %s", getattr(function, "__name__", function), error)
            return None


def _text(value: Any) -> str:
    """Names as printable ASCII, as the image wants them."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
