"""What images want of the software accelerator (a stand-in for hardware), and whether a server has it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpurestore.devplugins.softaccel import image
from gpurestore.errors import HookError, ImageError

log = logging.getLogger("gpurestore.plugin.softaccel")
_UID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One context in the images. ``fd`` is its image, the holder's to close."""

    fd: int
    uid: str
    pid: int
    device: int
    memory_bytes: int
    server: str


def read_wanted(open_image: Callable[[str], int], name: str) -> Wanted:
    """Read an image's state. Raises ImageError."""
    fd = open_image(name)
    try:
        state = image.read_state(fd, name)
        list(image.chunks(state, name))
        wanted = Wanted(
            fd,
            str(state["uid"]),
            int(state["pid"]),
            int(state["device"]),
            int(state["memory_bytes"]),
            str(state["server"]),
        )
        if not _UID.fullmatch(wanted.uid) or wanted.memory_bytes < 0:
            raise ValueError("its name or its size")
        return wanted
    except image.BadImageError as error:
        os.close(fd)
        raise ImageError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        os.close(fd)
        raise ImageError(f"{name}: the state is damaged: {error!r}") from error


def parse_map(text: str | None) -> dict[int, int]:
    """Devices by their number at dump: "0=1,1=0"."""
    if not text:
        return {}
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(old.isdigit() and new.isdigit() for old, _, new in pairs):
        why = f"device-map={text!r}: OLD=NEW pairs of device numbers are wanted, as 0=1,1=0"
        raise HookError("softaccel", "RESTORE_INIT", None, why)
    return {int(old): int(new) for old, _, new in pairs}


def assign(wanted: Sequence[Wanted], there: Sequence[Mapping[str, Any]], mapping: str | None = None) -> dict[int, int]:
    """A device for each device of the images: the one of the user's map, of the same number, or else the emptiest.

    Raises HookError with a table when they do not fit.
    """
    sizes: dict[int, int] = {}
    for want in wanted:
        sizes[want.device] = sizes.get(want.device, 0) + want.memory_bytes
    free = {int(entry["device"]): int(entry["free_bytes"]) for entry in there if not entry["lost"]}
    asked = parse_map(mapping)
    devices: dict[int, int] = {}
    for old, size in sorted(sizes.items(), key=lambda item: (item[0] not in asked, -item[1], item[0])):
        choices = [asked[old]] if old in asked else sorted(free, key=lambda new: (new != old, -free[new], new))
        new = next((new for new in choices if free.get(new, -1) >= size), None)
        if new is None:
            log.error("devices wanted and there:\n%s", table(wanted, sizes, there, asked))
            raise HookError("softaccel", "RESTORE_INIT", None, _sentence(sizes, there))
        devices[old] = new
        free[new] -= size
    return devices


def _sentence(sizes: Mapping[int, int], there: Sequence[Mapping[str, Any]]) -> str:
    wanted = ", ".join(f"{_mib(size)} on device {device}" for device, size in sorted(sizes.items()))
    have = ", ".join(
        f"device {entry['device']}, lost"
        if entry["lost"]
        else f"{_mib(entry['free_bytes'])} of {_mib(entry['memory_bytes'])} free on device {entry['device']}"
        for entry in there
    )
    return f"the software accelerator that is there is too small or lost: wanted: {wanted}; there: {have}"


def table(
    wanted: Sequence[Wanted], sizes: Mapping[int, int], there: Sequence[Mapping[str, Any]], asked: Mapping[int, int]
) -> str:
    """Wanted and there, a line for each device."""
    lines = ["wanted  device  contexts        memory"]
    for device, size in sorted(sizes.items()):
        contexts = sum(want.device == device for want in wanted)
        where = f"  (device-map: {asked[device]})" if device in asked else ""
        lines.append(f"        {device:6}  {contexts:8}  {_mib(size):>12}{where}")
    lines.append("there   device          free        memory")
    for entry in there:
        free, whole = _mib(entry["free_bytes"]), _mib(entry["memory_bytes"])
        lines.append(f"        {entry['device']:6}  {free:>12}  {whole:>12}{'  lost' if entry['lost'] else ''}")
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
