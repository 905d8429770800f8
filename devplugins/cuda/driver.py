"""The driver's checkpoint calls: libcuda.so.1 through cffi's ABI mode, loaded when first needed.

Argument blocks are 64 bytes in every driver version; newer versions give names to bytes that older ones want to be
zero, so one layout - the newest - serves all, as long as nothing is set that the driver in hand does not know.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from gpurestore.errors import CudaError

log = logging.getLogger("gpurestore.cuda")

LIBRARY = "libcuda.so.1"
LIBRARY_VARIABLE = "GPURESTORE_LIBCUDA"
VERSION_FILE = Path("/proc/driver/nvidia/version")
ARGUMENT_BYTES = 64

# Versions as cuDriverGetVersion counts: 1000 * major + 10 * minor. The branch is the driver that brought them.
CHECKPOINT_VERSION, CHECKPOINT_BRANCH = 12080, 570
GPU_PAIRS_VERSION, GPU_PAIRS_BRANCH = 13000, 580
IPC_VERSION, IPC_BRANCH = 13030, 610
CUSTOM_STORAGE_VERSION, CUSTOM_STORAGE_BRANCH = 13040, 615

DECLARATIONS = """
typedef struct { char bytes[16]; } CUuuid;
typedef struct { unsigned int timeoutMs; unsigned int reserved0; uint64_t reserved1[7]; } CUcheckpointLockArgs;
typedef struct { uint64_t reserved[8]; } CUcheckpointUnlockArgs;
typedef struct { CUuuid oldUuid; CUuuid newUuid; } CUcheckpointGpuPair;
typedef struct { uint64_t devPtr; size_t size; void *stream; } CUcheckpointCustomStoragePerDeviceData;
typedef struct {
    void *handle; CUcheckpointCustomStoragePerDeviceData *perDeviceData; unsigned int deviceCount;
} CUcheckpointCustomStorageInfo;
typedef struct { CUcheckpointCustomStorageInfo **customStorageInfo_out; char reserved[56]; } CUcheckpointCheckpointArgs;
typedef struct {
    CUcheckpointGpuPair *gpuPairs; unsigned int gpuPairsCount; unsigned int padding;
    CUcheckpointCustomStorageInfo **customStorageInfo_out; char reserved[40];
} CUcheckpointRestoreArgs;
int cuInit(unsigned int);
int cuDriverGetVersion(int *);
int cuGetErrorName(int, const char **);
int cuGetErrorString(int, const char **);
int cuCheckpointProcessGetState(int, int *);
int cuCheckpointProcessGetRestoreThreadId(int, int *);
int cuCheckpointProcessLock(int, CUcheckpointLockArgs *);
int cuCheckpointProcessCheckpoint(int, CUcheckpointCheckpointArgs *);
int cuCheckpointProcessRestore(int, CUcheckpointRestoreArgs *);
int cuCheckpointProcessUnlock(int, CUcheckpointUnlockArgs *);
int cuCheckpointOperationComplete(void *);
int cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
"""
_ARGUMENTS = ("Lock", "Unlock", "Checkpoint", "Restore")
_CALLS = ("GetState", "GetRestoreThreadId", "Lock", "Checkpoint", "Restore", "Unlock")

# CUresult values that we tell apart or can say more about than the driver does.
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, DEINITIALIZED = 1, 2, 3, 4
NO_DEVICE, INVALID_DEVICE, ILLEGAL_STATE, NOT_READY, NOT_PERMITTED, NOT_SUPPORTED = 100, 101, 401, 600, 800, 801
_ADVICE = {
    OUT_OF_MEMORY: "make room on the GPU, and in host memory for what the driver keeps there",
    NO_DEVICE: "no GPU is visible here; in a container, pass the devices in",
    NOT_PERMITTED: "run as the user of that process or as root",
    NOT_SUPPORTED: "drivers cannot carry managed memory, MIG, MPS, and CUDA IPC (before 610): see docs/cuda.md",
    803: "kernel module and libcuda.so.1 are of different versions: reboot, or mend the container's driver mount",
}


class ProcessState(IntEnum):
    """CUprocessState: where a process stands with its devices."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


def default_library() -> str:
    """The driver's library where nobody names one: what the environment says, for containers that have it elsewhere."""
    return os.environ.get(LIBRARY_VARIABLE) or LIBRARY


@functools.cache
def _ffi() -> Any:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    for name in _ARGUMENTS:
        size = ffi.sizeof(f"CUcheckpoint{name}Args")
        if size != ARGUMENT_BYTES:
            raise AssertionError(f"CUcheckpoint{name}Args has {size} bytes, not {ARGUMENT_BYTES}")
    if ffi.sizeof("CUcheckpointGpuPair") != 32 or ffi.sizeof("CUcheckpointCustomStorageInfo") != 24:
        raise AssertionError("the CUDA structures are not laid out as the driver's")
    return ffi


def ffi_of_driver() -> Any:
    """The cffi object that knows the driver's structures."""
    return _ffi()


class Driver:
    """The function table of one libcuda. Calls block, release the GIL, and may be made from several threads."""

    def __init__(self, library: str) -> None:
        ffi = _ffi()
        try:
            self._lib = ffi.dlopen(library)
        except OSError as error:
            raise CudaError(f"there is no NVIDIA driver here: {error}; install one from 570 on") from error
        self.library = library
        self._init_lock = threading.Lock()
        self._initialised = False
        try:
            self.cuda_version = self._get_version()
        except AttributeError as error:
            raise CudaError(f"{library} is no CUDA driver: {error}") from error
        self.branch = branch()

    # ---- what it can do

    def has(self, name: str) -> bool:
        """Whether the library exports ``name``."""
        try:
            getattr(self._lib, name)
        except AttributeError:
            return False
        return True

    @property
    def can_checkpoint(self) -> bool:
        """The six calls are there: 570 and later."""
        return self.cuda_version >= CHECKPOINT_VERSION and all(self.has(f"cuCheckpointProcess{n}") for n in _CALLS)

    @property
    def can_map_gpus(self) -> bool:
        """A process can come back on other GPUs: 580 and later."""
        return self.can_checkpoint and self.cuda_version >= GPU_PAIRS_VERSION

    @property
    def can_carry_ipc(self) -> bool:
        """Processes started through the driver's launcher may share memory by CUDA IPC: 610 and later."""
        return self.can_checkpoint and self.cuda_version >= IPC_VERSION

    @property
    def can_use_custom_storage(self) -> bool:
        """Device bytes can go straight between GPU and images: 615 and later."""
        known = self.cuda_version >= CUSTOM_STORAGE_VERSION
        return self.can_checkpoint and known and self.has("cuCheckpointOperationComplete")

    def require_checkpoint(self) -> None:
        """Raise unless the driver has the calls."""
        if not self.can_checkpoint:
            raise CudaError(
                f"{self.name} has no checkpoint calls; they came with driver {CHECKPOINT_BRANCH}: install a newer one"
            )

    @property
    def name(self) -> str:
        """``NVIDIA driver 580.65.06 (CUDA 13.0)``."""
        return f"NVIDIA driver {self.branch or 'of unknown version'} (CUDA {version_text(self.cuda_version)})"

    # ---- calls about one process

    def state(self, pid: int) -> ProcessState:
        """Where the process stands. Raises where it does not use CUDA."""
        out = _ffi().new("int *")
        self._call("cuCheckpointProcessGetState", pid, out)
        try:
            return ProcessState(out[0])
        except ValueError as error:
            raise CudaError(f"pid {pid}: {self.name} reports state {out[0]}, which nobody knows here") from error

    def restore_thread(self, pid: int) -> int:
        """The thread of the process that does the driver's part of checkpoint and restore."""
        out = _ffi().new("int *")
        self._call("cuCheckpointProcessGetRestoreThreadId", pid, out)
        return int(out[0])

    def lock(self, pid: int, timeout_ms: int) -> None:
        """RUNNING to LOCKED: wait for what is under way, block new calls. 0 waits for ever."""
        args = _ffi().new("CUcheckpointLockArgs *")
        args.timeoutMs = timeout_ms
        self._call("cuCheckpointProcessLock", pid, args)

    def checkpoint(self, pid: int) -> None:
        """LOCKED to CHECKPOINTED: device content into host memory of the process, devices released."""
        self._call("cuCheckpointProcessCheckpoint", pid, _ffi().new("CUcheckpointCheckpointArgs *"))

    def restore(self, pid: int, pairs: Mapping[str, str] | None = None) -> None:
        """CHECKPOINTED to LOCKED: devices and their content back, on other GPUs where ``pairs`` (old: new) says so."""
        args, keep = _ffi().new("CUcheckpointRestoreArgs *"), self._pairs(pairs or {})
        if keep is not None:
            args.gpuPairs, args.gpuPairsCount = keep, len(keep)
        self._call("cuCheckpointProcessRestore", pid, args)

    def begin_checkpoint(self, pid: int) -> Any:
        """LOCKED to CHECKPOINTING, with custom storage: the driver's CUcheckpointCustomStorageInfo."""
        args, out = _ffi().new("CUcheckpointCheckpointArgs *"), _ffi().new("CUcheckpointCustomStorageInfo **")
        args.customStorageInfo_out = out
        self._call("cuCheckpointProcessCheckpoint", pid, args)
        return self._info(pid, out)

    def begin_restore(self, pid: int, pairs: Mapping[str, str] | None = None) -> Any:
        """CHECKPOINTED to RESTORING, with custom storage: the same."""
        args, keep = _ffi().new("CUcheckpointRestoreArgs *"), self._pairs(pairs or {})
        out = _ffi().new("CUcheckpointCustomStorageInfo **")
        args.customStorageInfo_out = out
        if keep is not None:
            args.gpuPairs, args.gpuPairsCount = keep, len(keep)
        self._call("cuCheckpointProcessRestore", pid, args)
        return self._info(pid, out)

    def complete(self, handle: Any) -> None:
        """To CHECKPOINTED, or LOCKED: ends what one of the two above began."""
        self.check("cuCheckpointOperationComplete", None, self._lib.cuCheckpointOperationComplete(handle))

    def address_of(self, name: str, version: int) -> Any:
        """A function as CUDA ``version`` declares it, as ``void *``."""
        out, status = _ffi().new("void **"), _ffi().new("int *")
        code = self._lib.cuGetProcAddress_v2(name.encode(), out, version, 0, status)
        if code or not out[0]:
            raise CudaError(f"{self.name} has no {name} of CUDA {version_text(version)}", code)
        return out[0]

    def unlock(self, pid: int) -> None:
        """LOCKED to RUNNING. An error after which the process does run is none: the driver reports such."""
        try:
            self._call("cuCheckpointProcessUnlock", pid, _ffi().new("CUcheckpointUnlockArgs *"))
        except CudaError as error:
            try:
                if self.state(pid) is ProcessState.RUNNING:
                    log.warning("%s; it runs all the same", error)
                    return
            except CudaError:
                pass
            raise

    def init(self) -> None:
        """cuInit, once: what a restore wants where persistence mode is off. It can take seconds."""
        with self._init_lock:
            if self._initialised:
                return
            self.check("cuInit", None, self._lib.cuInit(0))
            self._initialised = True

    def check(self, name: str, pid: int | None, code: int) -> None:
        """Raise CudaError unless ``code`` is success."""
        if code:
            raise self._error(name, pid, code)

    # ---- below

    def _info(self, pid: int, out: Any) -> Any:
        if not out[0] or not out[0].handle or (out[0].deviceCount and not out[0].perDeviceData):
            raise CudaError(f"pid {pid}: {self.name} began a custom storage operation and told nothing about it")
        return out[0]

    def _pairs(self, pairs: Mapping[str, str]) -> Any:
        if not pairs:
            return None
        if not self.can_map_gpus:
            raise CudaError(f"{self.name} cannot bring processes back on other GPUs; {GPU_PAIRS_BRANCH} and later can")
        out = _ffi().new("CUcheckpointGpuPair[]", len(pairs))
        for pair, (old, new) in zip(out, pairs.items(), strict=True):
            pair.oldUuid.bytes, pair.newUuid.bytes = uuid_bytes(old), uuid_bytes(new)
        return out

    def _get_version(self) -> int:
        out = _ffi().new("int *")
        self.check("cuDriverGetVersion", None, self._lib.cuDriverGetVersion(out))
        return int(out[0])

    def _call(self, name: str, pid: int, argument: Any) -> None:
        if not self.has(name):
            self.require_checkpoint()
        function = getattr(self._lib, name)
        code = function(pid, argument)
        if code == NOT_INITIALIZED:
            self.init()  # also where another thread did it since this call began
            code = function(pid, argument)
        log.debug("%s(pid %d): %d", name, pid, code)
        self.check(name, pid, code)

    def _error(self, name: str, pid: int | None, code: int) -> CudaError:
        where = "" if pid is None else f"pid {pid}: "
        advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
        return CudaError(f"{where}{name}: {self._describe(code)}{advice}", code)

    def _describe(self, code: int) -> str:
        words = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            out = _ffi().new("const char **")
            if self.has(function) and getattr(self._lib, function)(code, out) == 0 and out[0]:
                words.append(_ffi().string(out[0]).decode(errors="replace"))
        return ": ".join(words) or f"CUDA error {code}"


@functools.lru_cache(maxsize=4)
def load(library: str) -> Driver:
    """The driver, loaded once per process: attaching to it is what takes time."""
    return Driver(library)


def branch(path: Path = VERSION_FILE) -> str:
    """The kernel module's version ("580.65.06"), empty where it is not told."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?\s(\d{3,4}(?:\.\d+){1,2})\b", text, re.MULTILINE)
    return found[1] if found else ""


def version_text(version: int) -> str:
    """13040 is 13.4."""
    return f"{version // 1000}.{version % 1000 // 10}"


def uuid_bytes(text: str) -> bytes:
    """``GPU-01234567-89ab-...`` as the 16 bytes of a CUuuid."""
    return uuid.UUID(text.removeprefix("GPU-")).bytes


def uuid_text(data: bytes) -> str:
    """The other way round."""
    return f"GPU-{uuid.UUID(bytes=data)}"


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What ``gpurestore check`` shows. ``problem`` is None where CUDA trees can be dumped and restored."""

    problem: str | None
    text: str
    branch: str = ""
    cuda_version: int = 0
    checkpoint: bool = False
    gpu_pairs: bool = False
    ipc: bool = False
    custom_storage: bool = False


def describe(library: str | None = None) -> DriverFacts:
    """Load the driver and say what it can do. It is not initialised: no GPU is touched. Never raises."""
    try:
        driver = load(library or default_library())
    except CudaError as error:
        return DriverFacts(str(error), str(error), branch())
    abilities = {
        "checkpoint calls": (driver.can_checkpoint, CHECKPOINT_BRANCH),
        "GPU mapping": (driver.can_map_gpus, GPU_PAIRS_BRANCH),
        "IPC through its launcher": (driver.can_carry_ipc, IPC_BRANCH),
        "custom storage": (driver.can_use_custom_storage, CUSTOM_STORAGE_BRANCH),
    }
    there = ", ".join(name for name, (able, _) in abilities.items() if able) or "nothing that we need"
    missing = "; ".join(f"{name} needs {since}" for name, (able, since) in abilities.items() if not able)
    text = f"{driver.name}: {there}" + (f" ({missing})" if missing else "")
    return DriverFacts(
        problem=None if driver.can_checkpoint else text,
        text=text,
        branch=driver.branch,
        cuda_version=driver.cuda_version,
        checkpoint=driver.can_checkpoint,
        gpu_pairs=driver.can_map_gpus,
        ipc=driver.can_carry_ipc,
        custom_storage=driver.can_use_custom_storage,
    )
