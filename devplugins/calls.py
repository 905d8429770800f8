"""Calling a hook: in a thread or as a coroutine, within its time, with failures told apart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import trio

from gpurestore.devplugins.api import Declined, Hook, RetryLater
from gpurestore.devplugins.loaded import LoadedPlugin, Ticket, pid_of
from gpurestore.errors import CancelledError, GpurestoreError, HookError, HookTimeoutError, NeedsPersonError

log = logging.getLogger("gpurestore.plugin")

# What a hook may raise without having failed in an unknown way.
_ANSWERS = (Declined, RetryLater, HookError, NeedsPersonError, CancelledError)


async def in_thread(plugin: LoadedPlugin, call: Callable[[], Any], is_cancelled: Callable[[], bool]) -> Any:
    """``call`` in a thread, inside the plugin. Cancelled, it is given up at once; ``plugin.busy`` says until when."""
    ticket = Ticket(is_cancelled)
    try:
        return await trio.to_thread.run_sync(plugin.enter, ticket, call, abandon_on_cancel=True, limiter=plugin.threads)
    finally:
        ticket.given_up = True


async def call_hook(
    plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], timeout_s: float | None, is_cancelled: Callable[[], bool]
) -> Any:
    """The hook's value. Raises Declined, RetryLater, and HookError for whatever else went wrong."""
    if plugin.is_async(hook.name.lower()):
        return await _within(plugin, hook, args, timeout_s, lambda: _awaited(plugin, hook, args))
    if not plugin.exclusive:
        return await _within(
            plugin, hook, args, timeout_s, lambda: in_thread(plugin, lambda: _told(plugin, hook, args), is_cancelled)
        )
    async with plugin.turn:  # waiting for it is not the hook's time
        return await _within(
            plugin, hook, args, timeout_s, lambda: in_thread(plugin, lambda: _told(plugin, hook, args), is_cancelled)
        )


async def _within(
    plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], timeout_s: float | None, begin: Callable[[], Any]
) -> Any:
    refuse_if_hung(plugin, hook, args)
    with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
        return await begin()
    raise timed_out(plugin, hook, args, timeout_s)


async def _awaited(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...]) -> Any:
    try:
        return await plugin.call_hook(hook, args)
    except _ANSWERS:
        raise
    except Exception as error:
        raise _failed(plugin, hook, args, error) from error


def _told(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...]) -> Any:
    try:
        return plugin.call_hook(hook, args)
    except _ANSWERS:
        raise
    except Exception as error:
        raise _failed(plugin, hook, args, error) from error


def _failed(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], error: Exception) -> HookError:
    log.error("plugin %s: %s failed", plugin.name, hook.name, exc_info=error)
    why = str(error) if isinstance(error, GpurestoreError) else f"{type(error).__name__}: {error}"
    return HookError(plugin.name, hook.name, pid_of(hook, args), why)


def timed_out(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], timeout_s: float | None) -> HookTimeoutError:
    """The error for a hook that did not come back, noted in its plugin."""
    error = HookTimeoutError(
        plugin.name,
        hook.name,
        pid_of(hook, args),
        f"it did not come back within {timeout_s:g} s (--hook-timeout)",
    )
    plugin.hung = error
    return error


def refuse_if_hung(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...]) -> None:
    """Raise for a plugin that nobody may enter: it is still inside a hook which ran out of time."""
    if plugin.exclusive and plugin.hung is not None and plugin.busy:
        why = f"the plugin has not come back from {plugin.hung.hook}"
        raise HookError(plugin.name, hook.name, pid_of(hook, args), why) from plugin.hung


def call_hook_sync(
    plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], timeout_s: float | None, is_cancelled: Callable[[], bool]
) -> Any:
    """:func:`call_hook` from a worker thread, for hooks that claim."""
    refuse_if_hung(plugin, hook, args)
    if plugin.is_async(hook.name.lower()):
        return trio.from_thread.run(call_hook, plugin, hook, args, timeout_s, is_cancelled)
    ticket = Ticket(is_cancelled)
    if timeout_s is None and not plugin.exclusive:
        return plugin.enter(ticket, lambda: _told(plugin, hook, args))
    return _watched(plugin, hook, args, timeout_s, ticket)


def _watched(plugin: LoadedPlugin, hook: Hook, args: tuple[Any, ...], timeout_s: float | None, ticket: Ticket) -> Any:
    """Run it in a thread of its own, so that this one can stop waiting."""
    outcome: list[Callable[[], Any]] = []
    done = threading.Event()

    def run() -> None:
        try:
            value = plugin.enter(ticket, lambda: _told(plugin, hook, args))
            outcome.append(lambda: value)
        except BaseException as error:
            outcome.append(_raiser(error))
        finally:
            done.set()

    threading.Thread(target=run, name=f"plugin {plugin.name}", daemon=True).start()
    left = timeout_s
    while not done.wait(0.05 if left is None else min(0.05, max(left, 0))):
        try:
            ticket.check()
        except CancelledError:
            ticket.given_up = True
            raise
        if left is not None:
            left -= 0.05
            if left <= 0:
                ticket.given_up = True
                raise timed_out(plugin, hook, args, timeout_s)
    return outcome[0]()


def _raiser(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail
