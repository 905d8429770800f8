"""The frame of every operation: progress, trace, blocking calls, and one error instead of a group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from gpurestore.errors import GpurestoreError, leading
from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.trace import Trace

if TYPE_CHECKING:
    from gpurestore.pipeline.progress import Progress


@asynccontextmanager
async def operation(progress: Progress | None, trace: Path | None) -> AsyncIterator[tuple[Blocking, Trace]]:
    """Where a dump or a restore runs. The trace is written however it ends.

    Errors of concurrent stages leave as the one that matters, with all of them as its cause. Cancellation and errors
    that are not ours leave as they are.
    """
    spans = Trace(progress)
    try:
        async with AsyncExitStack() as stack:
            if progress is not None:
                nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(nursery.cancel_scope.cancel)
                nursery.start_soon(progress.run)
            yield Blocking(), spans
    except BaseExceptionGroup as group:
        ours, others = group.split(GpurestoreError)
        if ours is None or others is not None:
            raise
        raise leading(ours) from group
    finally:
        if trace is not None:
            spans.write(trace)
