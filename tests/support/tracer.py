"""A tracer as a debugger would be: seizes a process and holds it until its standard input ends."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PTRACE_SEIZE = 0x4206


@contextmanager
def traced(pid: int) -> Iterator[int]:
    """While the context lasts, another process traces ``pid``; its pid is given."""
    process = subprocess.Popen([sys.executable, __file__, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"seized\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def main() -> None:
    """Seize, say so, and stay."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print("seized", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
