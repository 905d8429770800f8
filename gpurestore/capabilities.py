"""Capabilities (capabilities(7)): their names and numbers, and which of them count for this process right now."""

from __future__ import annotations

_NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
CAPABILITIES = tuple(_NAMES.split())
CAP = {name: number for number, name in enumerate(CAPABILITIES)}


def effective() -> int:
    """The calling thread's effective set, a bit each."""
    with open("/proc/thread-self/status", encoding="utf-8", errors="replace") as file:
        return int(next(line for line in file if line.startswith("CapEff:")).split()[1], 16)


def holds(*names: str) -> bool:
    """Whether any of these is effective, named as in :data:`CAP`."""
    mask = effective()
    return any(mask >> CAP[name] & 1 for name in names)


def cap_names(mask: int) -> str:
    """A set in words, for messages."""
    names = [CAPABILITIES[i] if i < len(CAPABILITIES) else str(i) for i in range(64) if mask >> i & 1]
    return ", ".join(f"CAP_{n}" for n in names)
