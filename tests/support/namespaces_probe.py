"""What the kernel lets this process do, as far as tests need to know it."""

from __future__ import annotations

import os

from gpurestore import namespaces
from gpurestore.errors import GpurestoreError


def checkpoint_rights() -> str | None:
    """Why live trees cannot be dumped and restored here, in words; None when they can."""
    try:
        namespaces.require_restore_rights()
    except GpurestoreError as error:
        return str(error)
    return None


def real_root() -> bool:
    """Root of the first user namespace, whose ids are all mapped."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map", encoding="ascii") as file:
        rows = [tuple(map(int, line.split())) for line in file]
    return any(inside == 0 and outside == 0 and count >= 65535 for inside, outside, count in rows)
