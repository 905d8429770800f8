"""Giving processes back what a dump took, and the guard that does it when the dump is killed (SIGKILL, out of memory).

A locked process hangs at its next CUDA call, and nothing in it or in the kernel would ever unlock it. So before the
first lock a small process is started that waits at a pipe: a line names each process before it is locked, and the word
``done`` ends the guard. If the pipe ends without it, the tool is dead, and the guard gives everything back.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable

from gpurestore.devplugins.cuda import recognize
from gpurestore.devplugins.cuda.driver import Driver, ProcessState, load
from gpurestore.errors import CudaError

log = logging.getLogger("gpurestore.cuda")

_DONE = b"done"
# A dead tracer's threads are let go by the kernel; this is how long the guard waits to see it.
PATIENCE_S = 10.0


def give_back(driver: Driver, pid: int, found: ProcessState, restore: Callable[[int], None] | None = None) -> None:
    """From whatever state a process is in to the one that it was found in. ``restore``: not the driver's own."""
    if found is ProcessState.CHECKPOINTED:
        return
    state = driver.state(pid)
    if state is ProcessState.CHECKPOINTED:
        (restore or driver.restore)(pid)
        state = driver.state(pid)
    if state is ProcessState.LOCKED and found is ProcessState.RUNNING:
        driver.unlock(pid)
        state = driver.state(pid)
    if state is not found:
        raise CudaError(f"CUDA is {state.name.lower()}, and was {found.name.lower()} before")
    log.info("pid %d: CUDA is %s again", pid, state.name.lower())


class Guard:
    """The guard of one dump, as the plugin sees it."""

    def __init__(self, library: str) -> None:
        # A session of its own: Ctrl-C at the terminal is for the dump, which then gives back itself.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpurestore.devplugins.cuda.guard", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, pid: int, thread: int, found: ProcessState, *, custom: bool = False) -> None:
        """This process is about to be locked or checkpointed, with ``custom`` storage or without."""
        self._write(b"%d %d %d %d\n" % (pid, thread, found, custom))

    def dismiss(self) -> None:
        """Nothing is left to give back, or everything that could be was."""
        self._write(_DONE + b"\n")
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line)
        except OSError as error:
            log.warning("the guard over locked processes is gone: %s", error)


def _lost(pid: int) -> None:
    """What was mapped into the tool, or only in images that nobody finished, is gone with it."""
    raise CudaError(f"pid {pid}: its device memory was in custom storage when the dump was killed")


def main() -> None:
    """Wait; then give back, or not."""
    library = sys.argv[1]
    lines = sys.stdin.buffer.read().splitlines()
    if not lines or _DONE in lines:
        return
    driver = load(library)
    deadline = time.monotonic() + PATIENCE_S
    for line in lines:
        pid, thread, found, custom = map(int, line.split())
        while recognize.thread_is_stopped(pid, thread) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            give_back(driver, pid, ProcessState(found), _lost if custom else None)
        except CudaError as error:
            log.error("pid %d: %s", pid, error)


if __name__ == "__main__":
    main()
