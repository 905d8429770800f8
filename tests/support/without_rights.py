"""Run a command without capabilities: what the kernel grants an ordinary user, also where root started it.

Another user id would do too, but often may not read the checkout or the Python that the tests run with.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
CAP_SETFCAP = 31  # does no harm here, and uid 0 may not be mapped into a new user namespace without it
PREFIX = (sys.executable, __file__)


def main() -> None:
    """Drop capabilities from the bounding set: executing the command then takes them away."""
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if capability != CAP_SETFCAP and libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        capability += 1
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
