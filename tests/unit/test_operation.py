"""The frame of an operation: one error instead of a group, and calls into C that end when anything fails."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import trio

from gpurestore.core import Cancel
from gpurestore.errors import CancelledError, GpurestoreError, NeedsPersonError
from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.operation import operation


def until_cancelled(cancel: Cancel, started: threading.Event) -> None:
    """As a call into C that polls its flag. Should nobody set it, the deadline of the test ends it."""
    started.set()
    while not cancel.is_set:
        pass
    raise CancelledError("told to end")


def fail(error: Exception) -> None:
    raise error


async def fail_once_started(blocking: Blocking, started: threading.Event, error: Exception) -> None:
    await trio.to_thread.run_sync(started.wait)
    await blocking.run(fail, error)


def run_with_a_busy_call(error: Exception) -> None:
    """An operation in which one stage fails with ``error`` while another is busy in C."""

    async def main() -> None:
        started = threading.Event()
        with trio.fail_after(30):
            async with operation(None, None) as (blocking, _), trio.open_nursery() as nursery:
                nursery.start_soon(blocking.run, partial(until_cancelled, blocking.cancel, started))
                nursery.start_soon(fail_once_started, blocking, started, error)

    trio.run(main)


def test_a_failure_in_one_stage_ends_a_busy_call_in_another_and_is_what_is_told() -> None:
    with pytest.raises(GpurestoreError, match="disk full"):
        run_with_a_busy_call(GpurestoreError("disk full"))


def test_what_needs_a_person_goes_first() -> None:
    async def main() -> None:
        async with operation(None, None), trio.open_nursery() as nursery:
            for error in (CancelledError("echo"), GpurestoreError("cause"), NeedsPersonError("left over")):
                nursery.start_soon(trio.to_thread.run_sync, fail, error)

    with pytest.raises(NeedsPersonError, match="left over"):
        trio.run(main)


def test_an_error_that_is_not_ours_is_not_hidden() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        run_with_a_busy_call(ZeroDivisionError("a bug"))
    assert caught.group_contains(ZeroDivisionError)


def test_cancelling_an_operation_ends_its_busy_calls() -> None:
    async def main() -> None:
        started = threading.Event()
        blocking = Blocking()
        with trio.fail_after(30), trio.CancelScope() as scope:
            async with operation(None, None), trio.open_nursery() as nursery:
                nursery.start_soon(blocking.run, partial(until_cancelled, blocking.cancel, started))
                await trio.to_thread.run_sync(started.wait)
                scope.cancel()
        assert scope.cancelled_caught
        assert blocking.cancel.is_set

    trio.run(main)


def test_the_result_of_a_call_comes_back_and_its_failure_as_it_was() -> None:
    async def main() -> None:
        blocking = Blocking()
        assert await blocking.run(pow, 2, 5) == 32
        with pytest.raises(OSError, match="no"):
            await blocking.run(fail, OSError("no"))
        assert not blocking.cancel.is_set

    trio.run(main)


def test_the_trace_is_written_although_the_operation_fails(tmp_path: Path) -> None:
    async def main() -> None:
        async with operation(None, tmp_path / "trace.json") as (_, spans):
            with spans.span("stage"):
                raise GpurestoreError("failed")

    with pytest.raises(GpurestoreError, match="failed"):
        trio.run(main)
    assert '"stage"' in (tmp_path / "trace.json").read_text()


def test_a_thread_is_named_after_what_it_runs() -> None:
    def own_name() -> str:
        return Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()

    async def ask() -> list[str]:
        return [await Blocking().run(own_name), await Blocking().run(partial(own_name))]

    assert trio.run(ask) == ["gr-own_name", "gr-own_name"]
