"""A restore through the Python API, as a process of its own: how long it took, and how much memory that needed.

perf/api_restore.py IMAGES
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Restore, and print one JSON object."""
    began = time.perf_counter()
    import gpurestore

    restore = gpurestore.restore_sync
    imported = time.perf_counter()
    restore(Path(sys.argv[1]), detached=True)
    restored = time.perf_counter()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer = {
        "import_s": imported - began,
        "restore_s": restored - imported,
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
