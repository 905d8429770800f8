"""Run a command under a filter that refuses userfaultfd(2), as the default filters of container engines do."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
NR_USERFAULTFD = 323  # of x86-64
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # linux/seccomp.h
PREFIX = (sys.executable, __file__)


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("nr", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse() -> None:
    """From now on, for this process and all that it starts."""
    steps = (
        (LOAD_WORD, 0, 0, 0),  # the number of the call
        (JUMP_IF_EQUAL, 0, 1, NR_USERFAULTFD),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    )
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(steps), code)
    install = (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    if not libc.prctl(*install):
        return
    # Without CAP_SYS_ADMIN there is no other way; but a tree that had this flag off cannot be restored then.
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(*install):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    refuse()
    os.execvp(sys.argv[1], sys.argv[1:])
