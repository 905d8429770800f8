"""A system call that Python's os module lacks. ctypes is imported only when it is called."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from gpurestore.syscalls import NR

if TYPE_CHECKING:
    import ctypes

SPLICE_F_NONBLOCK = 2


@cache
def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = [ctypes.c_long] * 7
    return libc


def _call(nr: NR, *args: int) -> int:
    import ctypes

    result: int = _libc().syscall(int(nr), *args, *[0] * (6 - len(args)))
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{nr.name.lower()}: {os.strerror(errno)}")
    return result


def tee(source: int, target: int, size: int) -> int:
    """Duplicate up to ``size`` bytes of pipe ``source`` into pipe ``target``; nothing is consumed."""
    return _call(NR.TEE, source, target, size, SPLICE_F_NONBLOCK)
