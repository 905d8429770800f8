"""The software accelerator's plugin, its hooks driven by hand: what a dump carries, what a restore brings back."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.processes import wait_until
from support.softaccel import Images, RunningServer, dump_contexts, fault, move, page_path, server

from gpurestore.devplugins.api import Declined, Stage
from gpurestore.devplugins.softaccel.client import Context, SoftaccelError
from gpurestore.devplugins.softaccel.plugin import SoftaccelPlugin
from gpurestore.devplugins.softaccel.protocol import ALL_STREAMS, Kernel, Op, Request, Type
from gpurestore.errors import HookError

MIB = 1 << 20
OWN_PID = os.getpid()


@pytest.fixture
def first() -> Iterator[RunningServer]:
    with server("--memory", "64M") as running:
        yield running


@pytest.fixture
def second() -> Iterator[RunningServer]:
    with server("--memory", "64M", "--devices", "2") as running:
        yield running


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    made = Images(tmp_path / "images")
    yield made
    made.close()


def begin_dump(images: Images, running: RunningServer, *, tree_goes_on: bool = False) -> SoftaccelPlugin:
    plugin = SoftaccelPlugin()
    plugin.init(images.dump_context(running.address, tree_goes_on=tree_goes_on))
    return plugin


async def dump(images: Images, running: RunningServer, contexts: list[Context], result: int = 0) -> None:
    """A whole dump after which the contexts go on."""
    plugin = begin_dump(images, running, tree_goes_on=True)
    try:
        await dump_contexts(plugin, contexts, OWN_PID)
        await plugin.dump_finish(result)
    finally:
        plugin.exit(Stage.DUMP, result)


async def begin_restore(images: Images, where: str | None, **options: str) -> SoftaccelPlugin:
    plugin = SoftaccelPlugin()
    plugin.init(images.restore_context(where, **options))
    try:
        await plugin.restore_init()
    except BaseException:
        plugin.exit(Stage.RESTORE, -errno.EIO)
        raise
    return plugin


async def restore(images: Images, running: RunningServer, contexts: list[Context]) -> None:
    """A whole restore: the contexts here become those of the images, in the order in which they were dumped."""
    paths = [page_path(context) for context in contexts]
    plugin = await begin_restore(images, running.address)
    for ident, (context, path) in enumerate(zip(contexts, paths, strict=True), 1):
        move(context, plugin, ident, path)
    await plugin.post_forking()
    await plugin.resume_devices_late(OWN_PID)
    plugin.exit(Stage.RESTORE, 0)


def test_contexts_come_back_on_another_server_at_the_same_addresses(
    first: RunningServer, second: RunningServer, images: Images
) -> None:
    data = [os.urandom(5 * MIB + 3), bytes(MIB), b"x" * 10]
    contexts = [Context(server=first.address) for _ in range(3)]
    buffers = [[context.upload(part + bytes([n])) for part in data] for n, context in enumerate(contexts)]
    trio.run(dump, images, first, contexts)
    first.stop()
    trio.run(restore, images, second, contexts)
    for n, context in enumerate(contexts):
        assert [bytes(buffer.read()) for buffer in buffers[n]] == [part + bytes([n]) for part in data]
        fresh = context.alloc(10)
        assert fresh.address not in {buffer.address for buffer in buffers[n]}
        context.close()


def test_zeros_take_no_room_in_the_image(first: RunningServer, images: Images) -> None:
    with Context(server=first.address) as context:
        context.alloc(40 * MIB)
        trio.run(dump, images, first, [context])
    assert sum(file.stat().st_size for file in images.path.iterdir()) < 64 << 10


def test_queued_commands_events_and_streams_go_on_where_they_were(
    first: RunningServer, second: RunningServer, images: Images
) -> None:
    pytest.importorskip("numpy")
    context = Context(server=first.address)
    x = context.upload(array("d", [1.0]))
    stream, event = context.create_stream(), context.create_event()
    context.stream.launch(Kernel.BUSY, Type.FLOAT64, 100_000_000)
    for _ in range(3):
        context.stream.launch(Kernel.SCALE, Type.FLOAT64, x, x, 1, 2.0)
    number = context.stream.record(event)
    stream.wait(event)
    stream.launch(Kernel.AXPY, Type.FLOAT64, x, x, 1, 1.0)
    trio.run(dump, images, first, [context])
    first.stop()
    trio.run(restore, images, second, [context])
    context.stream.spin(number, timeout_s=20)
    context.synchronize()
    assert x.download("d")[0] == 16.0
    assert event.query()
    assert context.stream.launch(Kernel.BUSY, Type.FLOAT64, 0) == number + 2  # the download was one, too
    context.close()


@pytest.mark.parametrize("moment", ["before the server takes it", "while it waits", "when it is answered"])
def test_a_client_inside_a_request_gets_its_answer_after_the_restore(
    first: RunningServer, second: RunningServer, images: Images, moment: str
) -> None:
    context = Context(server=first.address)
    context.stream.launch(Kernel.BUSY, Type.FLOAT64, 0 if "answered" in moment else 300_000_000)
    wait = Request(Op.WAIT, context._next(), (ALL_STREAMS,)).pack()

    async def dump_inside() -> None:
        plugin = begin_dump(images, first)
        if "before" in moment:
            await plugin.pause_devices(OWN_PID)
        context._send(wait)
        if "answered" in moment:
            wait_until(lambda: _readable(context), "the reply is there", 10)
        await dump_contexts(plugin, [context], OWN_PID)
        await plugin.dump_finish(0)
        first.stop()
        plugin.exit(Stage.DUMP, 0)

    trio.run(dump_inside)
    trio.run(restore, images, second, [context])
    reply, _ = context._receive()
    assert (reply.errno, reply.seq) == (0, context._seq)
    assert context.stream.completed == 1
    context.close()


def _readable(context: Context) -> bool:
    try:
        return bool(context._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def test_an_error_of_a_context_is_still_its_error_after_the_restore(
    first: RunningServer, second: RunningServer, images: Images
) -> None:
    context = Context(server=first.address)
    context.stream.copy(5, 6, 7)
    with pytest.raises(SoftaccelError, match="lie in no buffer"):
        context.synchronize()
    trio.run(dump, images, first, [context])
    trio.run(restore, images, second, [context])
    with pytest.raises(SoftaccelError, match="lie in no buffer"):
        context.synchronize()
    context.close()


def test_a_context_that_was_opened_after_the_pause_is_carried_too_and_a_page_that_nobody_offers_is_noticed(
    first: RunningServer, second: RunningServer, images: Images
) -> None:
    async def dump_both() -> Context:
        plugin = begin_dump(images, first)
        await plugin.pause_devices(OWN_PID)
        context = Context(server=first.address)
        context.upload(b"late")
        await plugin.checkpoint_devices(OWN_PID)
        plugin.dump_ext_file(context._sock.fileno(), 1)
        with pytest.raises(HookError, match=r"the doorbell page of context .* was not offered"):
            await plugin.dump_devices_late(OWN_PID)
        assert plugin.used
        plugin.exit(Stage.DUMP, 0)
        return context

    context = trio.run(dump_both)
    trio.run(restore, images, second, [context])
    assert context.info()[2] == 64 * MIB - 4096
    context.close()


@pytest.mark.parametrize("how", ["dump_finish", "exit"])
def test_a_dump_that_fails_gives_the_queues_back(first: RunningServer, images: Images, how: str) -> None:
    async def fail(context: Context) -> None:
        plugin = begin_dump(images, first)
        await plugin.pause_devices(OWN_PID)
        launch = threading.Thread(target=lambda: done.append(context.stream.launch(Kernel.BUSY, Type.FLOAT64, 0)))
        launch.start()
        await trio.sleep(0.05)
        assert done == []  # held: it gets no answer
        if how == "exit":
            plugin.exit(Stage.DUMP, -errno.EIO)
        else:
            await plugin.dump_finish(-errno.EIO)
        wait_until(lambda: done == [1] and context.stream.completed == 1, "the held command is done", 10)
        launch.join()
        plugin.exit(Stage.DUMP, -errno.EIO)

    done: list[int] = []
    with Context(server=first.address) as context:
        trio.run(fail, context)


def test_a_dump_of_a_tree_without_clients_does_nothing(first: RunningServer, images: Images) -> None:
    async def look(where: str) -> None:
        plugin = SoftaccelPlugin()
        plugin.init(images.dump_context(where))
        await plugin.pause_devices(OWN_PID)
        await plugin.checkpoint_devices(OWN_PID)
        left, right = socket.socketpair()
        with left, right, pytest.raises(Declined):
            plugin.dump_ext_file(left.fileno(), 1)
        with pytest.raises(Declined):
            plugin.dump_ext_file(0, 2)
        with pytest.raises(Declined):
            plugin.handle_device_vma(0, os.fstat(0))
        assert not plugin.used
        plugin.exit(Stage.DUMP, 0)

    trio.run(look, first.address)
    trio.run(look, "@softaccel-nobody")
    assert not list(images.path.iterdir())
    plugin = SoftaccelPlugin()
    with pytest.raises(Declined):
        plugin.init(images.restore_context(None))


@pytest.mark.parametrize("at", ["hold", "checkpoint"])
def test_a_hook_that_hangs_can_be_given_up(first: RunningServer, images: Images, at: str) -> None:
    async def hang(context: Context) -> None:
        plugin = begin_dump(images, first)
        with trio.move_on_after(0.3) as scope:
            await dump_contexts(plugin, [context], OWN_PID)
        assert scope.cancelled_caught
        plugin.exit(Stage.DUMP, -errno.ETIMEDOUT)

    with Context(server=first.address) as context:
        fault(first, f"hang={at}")
        clock = time.monotonic()
        trio.run(hang, context)
        assert time.monotonic() - clock < 2
        context.stream.launch(Kernel.BUSY, Type.FLOAT64, 0)
        context.synchronize()


def test_a_partial_copy_fails_the_dump_and_the_restore(first: RunningServer, images: Images) -> None:
    with Context(server=first.address) as context:
        context.upload(os.urandom(MIB))
        fault(first, "partial=checkpoint")
        with pytest.raises(HookError, match=rf"DUMP_DEVICES_LATE of pid {OWN_PID} failed: device memory ended after"):
            trio.run(dump, images, first, [context])
        for file in images.path.iterdir():
            file.unlink()
        trio.run(dump, images, first, [context])
        fault(first, "partial=fill")
        with pytest.raises(HookError, match="POST_FORKING failed: a copy to the device ended after"):
            trio.run(restore_until_filled, images, first)


async def restore_until_filled(images: Images, running: RunningServer) -> None:
    plugin = await begin_restore(images, running.address)
    try:
        await plugin.post_forking()
    finally:
        plugin.exit(Stage.RESTORE, -errno.EIO)


def test_a_lost_device_fails_the_dump(first: RunningServer, images: Images) -> None:
    with Context(server=first.address) as context:
        fault(first, "lost=0")
        with pytest.raises(HookError, match="device 0 of the software accelerator is lost"):
            trio.run(dump, images, first, [context])


def test_damaged_images_are_refused(first: RunningServer, images: Images) -> None:
    with Context(server=first.address) as context:
        context.upload(os.urandom(MIB))
        trio.run(dump, images, first, [context])
    (image,) = (file for file in images.path.iterdir() if "file" not in file.name)
    good = image.read_bytes()
    image.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    with pytest.raises(HookError, match=r"POST_FORKING failed: device memory at 0x7acc00000000: .* are damaged"):
        trio.run(restore_until_filled, images, first)
    for bad in (b"", good[:100], good[:-1], good[:-5] + b"12345", b"X" + good[1:], good + b"x"):
        image.write_bytes(bad)
        with pytest.raises(HookError, match=rf"RESTORE_INIT failed: {image.name}: "):
            trio.run(restore_until_filled, images, first)


def test_a_server_that_is_missing_or_too_small_is_found_before_anything_is_made(
    first: RunningServer, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    with Context(server=first.address) as context:
        context.alloc(60 * MIB)
        trio.run(dump, images, first, [context])
        with pytest.raises(HookError, match="no software accelerator listens at @softaccel-nobody"):
            trio.run(begin_restore, images, "@softaccel-nobody")
        there = "wanted: 60.0 MiB on device 0; there: 4.0 MiB of 64.0 MiB free on device 0"
        with pytest.raises(HookError, match=f"too small or lost: {there}"):
            trio.run(begin_restore, images, first.address)  # the first one still has its memory
    table = caplog.messages[-1].splitlines()
    assert [line.split() for line in table[2:]] == [
        ["0", "1", "60.0", "MiB"],
        ["there", "device", "free", "memory"],
        ["0", "4.0", "MiB", "64.0", "MiB"],
    ]


def test_a_restore_that_ends_early_takes_no_memory(first: RunningServer, images: Images) -> None:
    with Context(server=first.address) as context:
        context.alloc(30 * MIB)
        trio.run(dump, images, first, [context])
        plugin = trio.run(begin_restore, images, first.address)
        assert context.info()[2] == 4 * MIB
        plugin.exit(Stage.RESTORE, -errno.ECANCELED)
        wait_until(lambda: context.info()[2] == 34 * MIB, "the memory is given back", 10)


def test_contexts_move_to_the_device_that_is_asked_for(
    first: RunningServer, second: RunningServer, images: Images
) -> None:
    async def look(mapping: str) -> None:
        plugin = await begin_restore(images, second.address, **{"device-map": mapping})
        plugin.exit(Stage.RESTORE, 0)

    with Context(server=first.address) as context, Context(1, second.address) as there:
        context.alloc(40 * MIB)
        trio.run(dump, images, first, [context])
        trio.run(look, "0=1")
        wait_until(lambda: there.info()[2] == 64 * MIB, "the memory is given back", 10)
        taken = there.alloc(30 * MIB)
        with pytest.raises(HookError, match="too small or lost"):
            trio.run(look, "0=1")
        taken.free()
        with pytest.raises(HookError, match="OLD=NEW pairs"):
            trio.run(look, "x")


def test_device_memory_of_many_contexts_is_filled_at_the_same_time(images: Images) -> None:
    with server("--bandwidth", "40M") as running:
        contexts = [Context(server=running.address) for _ in range(4)]
        for context in contexts:
            context.alloc(2 * MIB)
        trio.run(dump, images, running, contexts)
        clock = time.monotonic()
        trio.run(restore_until_filled, images, running)
        assert 0.19 < time.monotonic() - clock < 2  # one engine: its bandwidth is shared, not multiplied
        for context in contexts:
            context.close()
