"""The software accelerator: a stand-in for hardware, not a GPU.

A server process (``python -m gpurestore.devplugins.softaccel``) owns the memory of some devices. Clients open contexts
on them, copy data in and out, and queue kernels, as they would with a real accelerator; when a client is gone, so is
everything it had there, and only a checkpoint brings it back. It exists so that the device side of a dump and a restore
can be run, measured and tested on machines without an accelerator. Its kernels are slow and its timing is simulated:
copies sleep as long as a DMA engine of the configured bandwidth would work.

    protocol.py    messages and the doorbell page, as they lie in memory
    client.py      the client library (softaccel.h and softaccel.c are the same for C)
    server.py      connections;  context.py: what a client has on a device, made of memory.py and streams.py;
                   device.py, kernels.py: what moves and what computes
    control.py     the door for tools: hold, checkpoint, restore, inject faults;  image.py: the file format
    plugin.py      the device plugin of gpurestore
"""

from __future__ import annotations

import os

# "@" stands for the abstract namespace, as in ss and systemd.
DEFAULT_SOCKET = "@softaccel"
SOCKET_VARIABLE = "SOFTACCEL_SOCKET"
PAGE_NAME = "softaccel-doorbell-"  # of the doorbell page's memfd; then the context in 16 hexadecimal digits


def address(wanted: str | None = None) -> str:
    """Where the server listens: what was asked for, else what the environment says, else the default."""
    return wanted or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET


def for_kernel(name: str) -> str:
    """The address as bind and connect take it."""
    return "\0" + name[1:] if name.startswith("@") else name
