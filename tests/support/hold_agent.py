"""Freezes a process, brings the agent into every thread, and stays so until it is killed."""

from __future__ import annotations

import signal
import sys

from gpurestore import core
from gpurestore.batch import Call
from gpurestore.syscalls import NR
from gpurestore.tasks.frozen import FrozenTree


def main() -> None:
    """Say what was seen, then wait."""
    # Taken by sigwait: one that comes just before signal.pause would be waited for for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    tracer = core.Tracer()
    tree = FrozenTree(tracer, int(sys.argv[1]), [])
    tree.freeze()
    tree.describe()
    for task in tree:
        for thread in task.threads:
            assert task.ask([Call(NR.GETTID)], thread.tid)[0].result == thread.tid
    print("inside", flush=True)
    signal.sigwait([signal.SIGINT])
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
