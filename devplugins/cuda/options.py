"""``--plugin-option cuda.NAME=VALUE``: what can be set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpurestore.devplugins.cuda import gpumap
from gpurestore.devplugins.cuda.driver import LIBRARY, default_library
from gpurestore.errors import UsageError

NAMES = {
    "gpu-map": "OLD=NEW[,OLD=NEW...]: GPUs of the dump and where their content comes back (UUIDs or indices)",
    "lock-timeout": "seconds to wait until a process's CUDA work is at rest (10)",
    "library": f"the driver's library ({LIBRARY})",
    "nvml": "on, or off: do not record and compare GPUs",
    "storage": "where a dump has the driver put device content: driver (its staging in host memory), custom, or auto",
}
_STORAGES = ("driver", "custom", "auto")
_MAX_SECONDS = 86400.0


@dataclass(slots=True)
class Options:
    """The options of one operation."""

    gpu_map: dict[str, str] = field(default_factory=dict)
    lock_timeout_ms: int = 10_000
    library: str = field(default_factory=default_library)
    nvml: bool = True
    storage: str = "driver"

    @classmethod
    def read(cls, given: Mapping[str, str | None]) -> Options:
        """Take what the host hands over; an option that is not ours is an error."""
        result = cls()
        for name, value in given.items():
            if name not in NAMES:
                raise UsageError(f"cuda.{name} is no option of this plugin; there are {', '.join(NAMES)}")
            if not value:
                raise UsageError(f"cuda.{name} needs a value: {NAMES[name]}")
            match name:
                case "gpu-map":
                    result.gpu_map = gpumap.parse(value)
                case "lock-timeout":
                    result.lock_timeout_ms = _milliseconds(value)
                case "library":
                    result.library = value
                case "nvml":
                    if value not in ("on", "off"):
                        raise UsageError(f"cuda.nvml={value}: it is on or off")
                    result.nvml = value == "on"
                case "storage":
                    if value not in _STORAGES:
                        raise UsageError(f"cuda.storage={value}: it is {', '.join(_STORAGES)}")
                    result.storage = value
        return result


def _milliseconds(text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= _MAX_SECONDS:
        raise UsageError(f"cuda.lock-timeout={text}: seconds, above 0 and at most a day")
    return round(seconds * 1000)
