"""What the kernel lets this process do, as far as tests need to know it."""

from __future__ import annotations

import os


def checkpoint_rights() -> str | None:
    """Why live trees cannot be dumped and restored here, in words; None when they can."""
    if os.geteuid() != 0:
        return "needs root, or a user namespace of one's own (make test enters one where the kernel allows it)"
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    needed = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}
    missing = [name for name, bit in needed.items() if not effective >> bit & 1]
    if missing:
        return f"needs {' and '.join(missing)}"
    return None


def real_root() -> bool:
    """Root of the first user namespace, whose ids are all mapped."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map", encoding="ascii") as file:
        rows = [tuple(map(int, line.split())) for line in file]
    return any(inside == 0 and outside == 0 and count >= 65535 for inside, outside, count in rows)
