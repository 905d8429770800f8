"""The software accelerator by itself: memory, kernels, streams, many clients, and what is gone when one dies."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import wait_until
from support.softaccel import RunningServer, compile_with_client, fault, server
from support.victims import have_compiler

from gpurestore.devplugins.softaccel import for_kernel
from gpurestore.devplugins.softaccel.client import Context, DeviceBuffer, DeviceLostError, SoftaccelError
from gpurestore.devplugins.softaccel.protocol import Kernel, Type

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with server("--memory", "256M", "--devices", "2") as running:
        yield running


@pytest.fixture
def context(shared: RunningServer) -> Iterator[Context]:
    with Context(server=shared.address) as made:
        yield made


def test_what_is_copied_in_comes_out_also_from_the_middle(context: Context) -> None:
    data = os.urandom(3 * MIB + 17)
    buffer = context.upload(data)
    assert buffer.read() == data
    assert buffer.read(1000, offset=12345) == data[12345:13345]
    buffer.write(b"x" * 10, offset=5)
    assert buffer.read(20) == data[:5] + b"x" * 10 + data[15:20]
    other = context.alloc(100)
    context.stream.copy(other, buffer + 7, 100)
    assert other.read() == buffer.read(100, offset=7)


def test_fresh_memory_is_zero_and_is_given_back(context: Context) -> None:
    free = context.info()[2]
    buffer = context.alloc(MIB)
    assert buffer.read() == bytes(MIB)
    assert context.info() == (2, 256 * MIB, free - MIB)
    buffer.free()
    assert context.info()[2] == free
    assert context.alloc(10).address == buffer.address


def test_more_memory_than_there_is_gets_refused(context: Context) -> None:
    with pytest.raises(SoftaccelError, match="bytes free") as caught:
        for _ in range(3):
            context.alloc(120 * MIB)
    assert caught.value.errno == errno.ENOMEM
    context.alloc(MIB)  # the context is none the worse for it


@pytest.mark.parametrize(("kind", "code", "name"), [(Type.FLOAT32, "f", "float32"), (Type.FLOAT64, "d", "float64")])
def test_kernels_compute_what_numpy_does(context: Context, kind: Type, code: str, name: str) -> None:
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(1)

    def put(values: object) -> DeviceBuffer:
        return context.upload(np.ascontiguousarray(values, dtype=name))

    def get(buffer: DeviceBuffer, *shape: int) -> object:
        return np.frombuffer(bytes(buffer.read()), name).reshape(shape)

    def same(found: object, expected: object) -> None:
        np.testing.assert_allclose(found, np.asarray(expected, dtype=name), rtol=1e-5)

    a, b, row = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.normal(size=3)
    da, db, out = put(a), put(b), context.alloc(4 * 4 * 8)
    stream = context.stream
    stream.launch(Kernel.ADD, kind, out, da, db, 12)
    same(get(out, -1)[:12], (a + b).ravel())
    stream.launch(Kernel.ADD_ROW, kind, out, da, put(row), 4, 3)
    same(get(out, -1)[:12], (a + row).ravel())
    stream.launch(Kernel.SCALE, kind, out, da, 12, 2.5)
    same(get(out, -1)[:12], (a * 2.5).ravel())
    stream.launch(Kernel.AXPY, kind, out, db, 12, -1.0)
    same(get(out, -1)[:12], (a * 2.5 - b).ravel())
    stream.launch(Kernel.RELU, kind, out, da, 12)
    same(get(out, -1)[:12], np.maximum(a, 0).ravel())
    stream.launch(Kernel.RELU_GRADIENT, kind, out, db, da, 12)
    same(get(out, -1)[:12], np.where(a > 0, b, 0).ravel())
    stream.launch(Kernel.REDUCE_ROWS, kind, out, da, 4, 3)
    same(get(out, -1)[:3], a.sum(axis=0))
    stream.launch(Kernel.FILL, kind, out, 5, 1.5)
    same(get(out, -1)[:5], [1.5] * 5)
    stream.matmul(kind, out, da, db, (4, 4, 3), transpose_b=True)
    same(get(out, -1)[:16], (a @ b.T).ravel())
    stream.matmul(kind, out, da, db, (3, 3, 4), transpose_a=True, alpha=0.5)
    same(get(out, -1)[:9], 0.5 * (a.T @ b).ravel())
    before = get(out, -1)[:9].copy()
    stream.matmul(kind, out, da, db, (3, 3, 4), transpose_a=True, beta=2.0)
    same(get(out, -1)[:9], (a.T @ b).ravel() + 2 * before)


def test_softmax_gives_loss_and_gradient_and_refuses_a_wrong_label(context: Context) -> None:
    np = pytest.importorskip("numpy")
    scores = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    loss, gradient = context.alloc(16), context.alloc(48)
    labels = context.upload(array("q", [1, 2]))
    parameters = (loss, gradient, context.upload(scores), labels, 2, 3)
    context.stream.launch(Kernel.SOFTMAX_CROSS_ENTROPY, Type.FLOAT64, *parameters)
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss.download("d"), -np.log(chances[[0, 1], [1, 2]]))
    chances[[0, 1], [1, 2]] -= 1
    np.testing.assert_allclose(gradient.download("d"), chances.ravel())
    labels.write(array("q", [1, 3]))
    context.stream.launch(Kernel.SOFTMAX_CROSS_ENTROPY, Type.FLOAT64, *parameters)
    with pytest.raises(SoftaccelError, match="a label outside of 0 to 2"):
        context.synchronize()


def test_streams_run_side_by_side_and_events_put_them_in_order(context: Context) -> None:
    pytest.importorskip("numpy")
    other, event = context.create_stream(), context.create_event()
    x = context.upload(array("d", [1.0]))
    other.launch(Kernel.BUSY, Type.FLOAT64, 200_000_000)
    other.launch(Kernel.SCALE, Type.FLOAT64, x, x, 1, 2.0)
    other.record(event)
    context.stream.launch(Kernel.BUSY, Type.FLOAT64, 0)
    context.stream.synchronize()  # does not wait for the other one
    assert not event.query()
    context.stream.wait(event)
    context.stream.launch(Kernel.AXPY, Type.FLOAT64, x, x, 1, 1.0)
    assert x.download("d")[0] == 4.0
    assert event.query()
    event.destroy()
    other.destroy()
    assert context.create_stream().ident == other.ident


def test_commands_can_travel_together_and_their_end_be_seen_on_the_page(context: Context) -> None:
    with context.batch():
        for _ in range(150):
            context.stream.launch(Kernel.BUSY, Type.FLOAT32, 0)
    last = context.stream.launch(Kernel.BUSY, Type.FLOAT32, 30_000_000)
    assert last == 151
    context.stream.spin(last)
    assert context.stream.completed == last


def test_an_address_in_no_buffer_breaks_the_context_but_no_other(shared: RunningServer, context: Context) -> None:
    buffer = context.alloc(100)
    context.stream.copy(buffer + 50, buffer, 100)
    with pytest.raises(SoftaccelError, match="lie in no buffer") as caught:
        context.synchronize()
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(SoftaccelError, match="lie in no buffer"):
        buffer.read()
    with Context(server=shared.address) as other:
        assert other.alloc(10).read() == bytes(10)


def test_host_memory_that_is_not_there_is_named(context: Context) -> None:
    from gpurestore.devplugins.softaccel.protocol import Op

    buffer = context.alloc(100)
    context.command(Op.COPY_IN, 0, buffer.address, 4096, 100)
    with pytest.raises(SoftaccelError, match=f"cannot read 100 bytes at 0x1000 of pid {os.getpid()}"):
        context.synchronize()


def test_contexts_do_not_see_each_other_at_the_same_addresses(shared: RunningServer, context: Context) -> None:
    mine = context.upload(b"mine")
    with Context(server=shared.address) as other:
        theirs = other.upload(b"also")
        assert theirs.address == mine.address
        assert mine.read() == b"mine"


def test_a_client_leaves_no_descriptor_of_the_page_open(context: Context) -> None:
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    assert not [link for link in links if "softaccel" in link]
    with open("/proc/self/smaps") as smaps:
        lines = smaps.readlines()
    start = next(i for i, line in enumerate(lines) if f"softaccel-doorbell-{context.uid:016x}" in line)
    flags = next(line for line in lines[start:] if line.startswith("VmFlags"))
    assert "dc" in flags.split(), "a fork would inherit the page"


CLIENT = """
import os, sys, time
from gpurestore.devplugins.softaccel.client import Context
context = Context(server=sys.argv[1])
buffer = context.upload(b"x" * (50 << 20))
print("ready", flush=True)
time.sleep(60)
"""


def test_everything_is_gone_when_the_client_is_killed(shared: RunningServer, context: Context) -> None:
    free = context.info()[2]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, shared.address], stdout=subprocess.PIPE)
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        assert context.info()[2] == free - 50 * MIB
        client.kill()
        client.wait()
    wait_until(lambda: context.info()[2] == free, "the memory of the dead client is given back", 10)


def test_many_clients_at_once_get_what_they_asked_for(shared: RunningServer) -> None:
    pytest.importorskip("numpy")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Context(number % 2, shared.address) as own:
                x = own.upload(array("d", [float(number)] * 1000))
                for _ in range(20):
                    own.stream.launch(Kernel.AXPY, Type.FLOAT64, x, x, 1000, 0.5)
                    own.stream.synchronize()
                assert set(x.download("d")) == {number * 1.5**20}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_copy_takes_as_long_as_the_bandwidth_says_and_costs_little() -> None:
    with server("--bandwidth", "50M", "--latency", "50000") as running, Context(server=running.address) as own:
        buffer = own.alloc(20 * MIB)
        data = bytes(20 * MIB)
        before = cpu_s(running.process.pid)
        clock = time.monotonic()
        buffer.write(data)
        took = time.monotonic() - clock
        assert 0.44 <= took < 1.5
        assert cpu_s(running.process.pid) - before < 0.3 * took


def cpu_s(pid: int) -> float:
    """Processor time that a process took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_lost_device_is_reported_to_all_its_clients_and_no_other() -> None:
    with server("--devices", "2") as running:
        with Context(0, running.address) as first, Context(1, running.address) as second:
            number = first.stream.launch(Kernel.BUSY, Type.FLOAT32, 100_000_000)
            number = first.stream.launch(Kernel.BUSY, Type.FLOAT32, 60_000_000_000)
            fault(running, "lost=0")
            assert first.lost
            assert not second.lost
            with pytest.raises(DeviceLostError):
                first.stream.spin(number)
            with pytest.raises(DeviceLostError, match="device 0 of the software accelerator is lost"):
                first.synchronize()
            with pytest.raises(DeviceLostError):
                Context(0, running.address)
            assert second.upload(b"abc").read() == b"abc"


def test_a_partial_copy_is_an_error_and_not_silent() -> None:
    with server("--fault", "partial=d2h") as running, Context(server=running.address) as own:
        buffer = own.upload(b"x" * 1000)
        with pytest.raises(SoftaccelError, match="a copy ended after 500 of 1000 bytes"):
            buffer.read()


def test_nonsense_ends_only_the_connection_that_sent_it(shared: RunningServer, context: Context) -> None:
    for data in (b"x", b"\0" * 112, b"\xff" * 112 * 2, b"{", b"{}", b'{"op": "nothing"}', b'{"op": "_end"}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(for_kernel(shared.address))
            stranger.settimeout(10)
            stranger.send(data)
            answer = stranger.recv(4096)
            assert answer == b"" or b"error" in answer or b"version" in answer
    assert context.upload(b"abc").read() == b"abc"


def test_without_a_server_the_error_says_where_it_was_looked_for() -> None:
    with pytest.raises(DeviceLostError, match="no software accelerator listens at @softaccel-nobody"):
        Context(server="@softaccel-nobody")


def test_the_end_of_the_server_is_noticed() -> None:
    with server() as running:
        own = Context(server=running.address)
        running.stop()
        with pytest.raises(DeviceLostError, match="gone"):
            own.alloc(10)
        own.close()


def test_a_server_on_a_path_replaces_the_socket_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with server(address=str(path)) as running:
        running.process.kill()
        running.process.wait()
        assert path.exists()
    with server(address=str(path)), Context(server=str(path)) as own:
        assert own.upload(b"abc").read() == b"abc"
    assert not path.exists()


@pytest.mark.skipif(not have_compiler(), reason="no gcc to compile the C client with")
def test_the_c_client_does_the_same(shared: RunningServer, tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    program = compile_with_client("softaccel_client", tmp_path / "client")
    result = subprocess.run([str(program), shared.address], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr
    result = subprocess.run([str(program), "@softaccel-nobody"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no software accelerator listens at @softaccel-nobody" in result.stderr
