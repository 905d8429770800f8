"""Numbers as people read them: times, sizes in binary units, speeds in decimal ones."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """``12.3 ms``, ``1.23 s``, ``2 min 03 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def format_bytes(nr_bytes: float) -> str:
    """``512 B``, ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nr_bytes < 1024:
            return f"{nr_bytes:.0f} B" if unit == "B" else f"{nr_bytes:.1f} {unit}"
        nr_bytes /= 1024
    return f"{nr_bytes:.1f} TiB"


def size_and_speed(nr_bytes: int, seconds: float) -> tuple[str, str]:
    """``1.5 GiB`` and ``2.10 GB/s``; what cannot be said is empty."""
    if not nr_bytes:
        return "", ""
    return format_bytes(nr_bytes), f"{nr_bytes / seconds / 1e9:.2f} GB/s" if seconds > 0 else ""
