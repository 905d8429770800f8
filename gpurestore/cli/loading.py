"""Loading the modules of a command, which Ctrl-C must not hit half-way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended.

    protobuf's compiled part dies of a segmentation fault when KeyboardInterrupt is raised while it makes its messages.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
