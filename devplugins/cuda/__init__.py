"""CUDA: the NVIDIA driver's own checkpoint calls, made from here without a helper program. See docs/cuda.md.

Nothing below loads the driver, or costs more than a look at /dev, unless a tree uses CUDA.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpurestore.devplugins.api import Declined, DevicePlugin

IMAGE = "cuda.json"
_SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia-uvm")


def probe(images_dir: Path | None = None) -> bool:
    """Whether this plugin can matter: there is such a device or driver, or the images hold something of ours."""
    if images_dir is not None and os.path.exists(images_dir / IMAGE):
        return True
    return any(os.path.exists(sign) for sign in _SIGNS) or "GPURESTORE_LIBCUDA" in os.environ


def make() -> DevicePlugin:
    """The plugin, for the host (entry point ``cuda``). Raises Declined where there is no NVIDIA device."""
    if not probe():
        raise Declined("there is no NVIDIA device here (no /dev/nvidiactl)")
    from gpurestore.devplugins.cuda.plugin import CudaPlugin

    return CudaPlugin()
