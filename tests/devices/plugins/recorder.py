"""A device plugin that writes down what it sees, and fails, hangs or claims where the environment says so.

RECORD: file for one JSON object per call. FAIL, HANG: names of hooks. CLAIM: whether to claim.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from typing import Any

from gpurestore.devplugins.api import Declined, DevicePlugin, HookContext, Stage, VmaUpdate


def heap_digest(pid: int) -> str:
    """A checksum of the task's heap; none where it comes lazily, which nobody can read from outside."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            if line.rstrip().endswith("[heap]"):
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                memory.seek(start)
                try:
                    return hashlib.sha256(memory.read(end - start)).hexdigest()
                except OSError:
                    return "lazy"
    return "none"


class Recorder(DevicePlugin):
    """Sees every hook."""

    name = "recorder"

    def __init__(self) -> None:
        self.keep: list[Any] = []  # the other ends of what was given back

    def _note(self, hook: str, **facts: Any) -> None:
        with open(os.environ["RECORD"], "a") as file:
            file.write(json.dumps({"plugin": self.name, "hook": hook, **facts}) + "\n")
        if os.environ.get("HANG") == hook:
            time.sleep(60)
        if os.environ.get("FAIL") == hook:
            raise RuntimeError(f"{hook} was told to fail")

    def _task(self, hook: str, pid: int) -> None:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        self._note(hook, pid=pid, state=state, heap=heap_digest(pid) if state == "t" else "")

    def init(self, context: HookContext) -> None:
        self.stage = context.stage
        self._note("INIT", stage=int(context.stage), goes_on=context.tree_goes_on)

    def exit(self, stage: Stage, result: int) -> None:
        self._note("EXIT", stage=int(stage), result=result)

    def pause_devices(self, pid: int) -> None:
        self.used = True
        self._task("PAUSE_DEVICES", pid)

    def checkpoint_devices(self, pid: int) -> None:
        self._task("CHECKPOINT_DEVICES", pid)

    def dump_devices_late(self, pid: int) -> None:
        self._task("DUMP_DEVICES_LATE", pid)

    def dump_finish(self, result: int) -> None:
        self._note("DUMP_FINISH", result=result)

    def restore_init(self) -> None:
        self._note("RESTORE_INIT")

    def post_forking(self) -> None:
        self._note("POST_FORKING")

    def resume_devices_late(self, pid: int) -> None:
        self._task("RESUME_DEVICES_LATE", pid)

    # ---- claims

    def dump_ext_file(self, fd: int, ident: int) -> None:
        self._claim("DUMP_EXT_FILE", ident=ident, link=os.readlink(f"/proc/self/fd/{fd}").split(":")[0])

    def handle_device_vma(self, fd: int, stat: os.stat_result) -> None:
        self._claim("HANDLE_DEVICE_VMA", size=stat.st_size)

    def _claim(self, hook: str, **facts: Any) -> None:
        if not os.environ.get("CLAIM"):
            raise Declined
        self._note(hook, **facts)

    def restore_ext_file(self, ident: int) -> int:
        self._note("RESTORE_EXT_FILE", ident=ident)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.send(b"given back")
        self.keep.append(ours)
        return theirs.detach()

    def update_vma_map(self, path: str, address: int, old_pgoff: int) -> VmaUpdate:
        self._note("UPDATE_VMA_MAP", path=path, old_pgoff=old_pgoff)
        fd = os.memfd_create("new-page")
        os.truncate(fd, 4096)
        os.pwrite(fd, b"given back", 0)
        return VmaUpdate(0, fd)
