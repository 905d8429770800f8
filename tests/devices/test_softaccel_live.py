"""Live trees on the software accelerator: dumped and restored, by the command, and what failures leave behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import processes
from support.softaccel import RunningServer, compile_with_client, fault, server
from support.tool import Tool

from gpurestore.devplugins.softaccel.client import Context

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(find_spec("numpy") is None, reason="kernels need numpy: pip install 'gpurestore[demo]'"),
]

MIB = 1 << 20
# Adds 1 to numbers on the device, in every way in which a client can wait, and says how far it is.
JOB = """
import os, sys
from array import array
from gpurestore.devplugins.softaccel.client import Context
from gpurestore.devplugins.softaccel.protocol import Kernel, Type
folder, server, steps, processes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
number = 0
for other in range(1, processes):
    if os.fork() == 0:
        number = other
        break
context = Context(number % 2, server)
ones, sums = context.upload(array("d", [1.0] * 1000)), context.alloc(8000)
ballast = os.urandom(4 << 20)
kept = context.upload(ballast)
stream, event = context.create_stream(), context.create_event()
with open(f"{folder}/progress.{number}", "w") as progress:
    for step in range(steps):
        stream.wait(event)
        stream.launch(Kernel.BUSY, Type.FLOAT64, 5_000_000)
        last = stream.launch(Kernel.AXPY, Type.FLOAT64, sums, ones, 1000, 1.0)
        stream.record(event)
        if step % 4 == 0:
            context.synchronize()
        elif step % 4 == 1:
            event.synchronize()
        elif step % 4 == 2:
            stream.spin(last)
        elif step % 64 == 3:
            assert kept.read(stream=stream) == ballast
            kept.write(ballast, stream=stream)
        progress.write(f"{step}\\n")
        progress.flush()
context.synchronize()
assert set(sums.download("d")) == {float(steps)}, set(sums.download("d"))
assert kept.read() == ballast
with open(f"{folder}/done.{number}", "w") as done:
    done.write(f"{ones.address:x} {sums.address:x} {kept.address:x}")
if number == 0:
    for _ in range(processes - 1):
        assert os.wait()[1] == 0
"""


class Job:
    """A running job."""

    def __init__(self, folder: Path, where: str, steps: int = 1500, nr_processes: int = 1) -> None:
        self.folder, self.nr_processes, self.steps = folder, nr_processes, steps
        command = self.command(where)
        with open(folder / "job.log", "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def command(self, where: str) -> list[str]:
        """What it runs."""
        (self.folder / "job.py").write_text(JOB)
        return [sys.executable, str(self.folder / "job.py"), str(self.folder), where, *self.numbers]

    @property
    def numbers(self) -> list[str]:
        return [str(self.steps), str(self.nr_processes)]

    @property
    def pid(self) -> int:
        return self.process.pid

    def step(self, number: int = 0) -> int:
        """How far one of its processes is."""
        try:
            return (self.folder / f"progress.{number}").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for(self, step: int) -> None:
        """Until all of it is as far as that."""
        processes.wait_until(
            lambda: (
                all(self.step(number) >= step for number in range(self.nr_processes)) or not processes.alive(self.pid)
            ),
            f"step {step}",
            60,
        )
        assert processes.alive(self.pid), (self.folder / "job.log").read_text()

    def results(self) -> list[str]:
        """What each process wrote in the end; waits for that."""
        names = [self.folder / f"done.{number}" for number in range(self.nr_processes)]
        processes.wait_until(
            lambda: (
                all(name.exists() and name.stat().st_size for name in names) or (self.folder / "job.log").stat().st_size
            ),
            "the end of the job",
            90,
        )
        assert not (self.folder / "job.log").read_text()
        return [name.read_text() for name in names]


class JobInC(Job):
    """The same in C, with the C client."""

    def command(self, where: str) -> list[str]:
        program = compile_with_client("softaccel_job", self.folder / "job")
        return [str(program), where, str(self.folder), str(self.steps)]


# Connects, and says who it is only a good while later.
SHY = """
import sys, time
from gpurestore.devplugins.softaccel.client import Context
class Shy(Context):
    def _open(self):
        print("connected", flush=True)
        time.sleep(0.5)
        return super()._open()
context = Shy(0, sys.argv[1])
data = context.upload(b"kept on the device")
open(sys.argv[2], "w").write("open")
while context.stream:
    time.sleep(0.01)
    assert data.read() == b"kept on the device"
    open(sys.argv[3], "a").write(".")
"""


@pytest.fixture
def here() -> Iterator[RunningServer]:
    with server("--devices", "2", "--memory", "32M", "--bandwidth", "400M") as running:
        yield running


Start = Callable[..., Job]


@pytest.fixture
def start(folder: Path, here: RunningServer) -> Iterator[Start]:
    """Starts jobs on the server here; whatever is left of them is ended afterwards."""
    processes.become_subreaper()
    jobs = []

    def begin(steps: int, nr_processes: int = 1, kind: type[Job] = Job) -> Job:
        jobs.append(kind(folder, here.address, steps, nr_processes))
        return jobs[-1]

    yield begin
    processes.end_all_below([here.process.pid])
    for job in jobs:
        job.process.poll()


def dump(tool: Tool, job: Job, images: Path, *options: str) -> None:
    """A dump that kills the job."""
    pids = processes.tree(job.pid)
    tool.dump(job.pid, images, *options).expect(0)
    job.process.poll()
    processes.wait_gone(pids)


@pytest.mark.parametrize("nr_processes", [1, 3])
def test_jobs_go_on_after_several_restores_with_all_that_they_had(
    tool: Tool, folder: Path, here: RunningServer, start: Start, nr_processes: int
) -> None:
    job = start(900, nr_processes)
    for turn in range(3):
        job.wait_for(100 + 100 * turn)
        where = ("--plugin-option", f"softaccel.socket={here.address}")
        dump(tool, job, folder / f"images.{turn}", *where)
        assert len(list((folder / f"images.{turn}").glob("softaccel-????????????????.img"))) == nr_processes
        tool.restore(folder / f"images.{turn}", "-d", *(["--serial"] if turn == 1 else [])).expect(0)
    assert job.results() == ["7acc00000000 7acc00002000 7acc00004000"] * nr_processes


@pytest.mark.usefixtures("compiler")
def test_a_job_with_the_c_client_goes_on_and_computes_right(
    tool: Tool, folder: Path, here: RunningServer, start: Start
) -> None:
    job = start(900, kind=JobInC)
    where = ("--plugin-option", f"softaccel.socket={here.address}")
    for turn in range(2):
        job.wait_for(100 + 200 * turn)
        assert job.step() < 900
        dump(tool, job, folder / f"images.{turn}", *where)
        tool.restore(folder / f"images.{turn}", "-d").expect(0)
    assert job.results() == ["right"]


def test_a_client_that_has_only_just_connected_is_waited_for(
    tool: Tool, folder: Path, here: RunningServer, start: Start
) -> None:
    (folder / "shy.py").write_text(SHY)
    command = [sys.executable, str(folder / "shy.py"), here.address, str(folder / "open"), str(folder / "beats")]
    with open(folder / "shy.log", "wb") as log:
        shy = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    processes.wait_until(lambda: (folder / "shy.log").stat().st_size > 0, "it has connected")
    assert not (folder / "open").exists()
    where = ("--plugin-option", f"softaccel.socket={here.address}")
    tool.dump(shy.pid, folder / "images", *where).expect(0)
    shy.wait(20)
    processes.wait_gone([shy.pid])
    tool.restore(folder / "images", "-d").expect(0)
    beats = (folder / "beats").stat().st_size if (folder / "beats").exists() else 0
    processes.wait_until(
        lambda: (folder / "beats").exists() and (folder / "beats").stat().st_size > beats, "it goes on"
    )
    assert processes.alive(shy.pid), (folder / "shy.log").read_text()


def test_a_job_that_was_left_running_goes_on_beside_its_copy_on_another_server(
    tool: Tool, folder: Path, here: RunningServer, start: Start
) -> None:
    job = start(700)
    job.wait_for(100)
    tool.dump(job.pid, folder / "images", "-R", "--plugin-option", f"softaccel.socket={here.address}").expect(0)
    assert job.results() == ["7acc00000000 7acc00002000 7acc00004000"]
    assert job.process.wait(20) == 0
    (folder / "done.0").unlink()
    here.stop()
    with server("--memory", "32M") as there:
        lines = (folder / "progress.0").read_bytes().splitlines(keepends=True)
        size = _size_at_dump(folder / "images", folder / "progress.0")
        (folder / "progress.0").write_bytes(b"".join(lines)[:size])
        tool.restore(folder / "images", "-d", "--plugin-option", f"softaccel.socket={there.address}").expect(0)
        assert job.results() == ["7acc00000000 7acc00002000 7acc00004000"]


def _size_at_dump(images: Path, path: Path) -> int:
    from gpurestore.images.folder import ImageFolder

    with ImageFolder(images) as opened:
        entries = [entry.reg for entry in opened.read("files") if entry.HasField("reg")]
    return next(int(entry.size) for entry in entries if entry.name.endswith(path.name))


@pytest.mark.parametrize("spec", ["hang=hold", "hang=checkpoint", "partial=checkpoint", "lost=1"])
def test_a_dump_that_fails_on_the_device_lets_the_job_go_on(
    tool: Tool, folder: Path, here: RunningServer, start: Start, spec: str
) -> None:
    job = start(600)
    job.wait_for(50)
    with Context(1, here.address) if spec == "lost=1" else Context(0, here.address):
        fault(here, spec)
        if spec == "lost=1":
            fault(here, "partial=checkpoint")
        options = ("--plugin-option", f"softaccel.socket={here.address}", "--hook-timeout", "2")
        outcome = tool.dump(job.pid, folder / "images", *options)
    assert outcome.code == 1
    assert re.search(r"plugin softaccel: \w+ of pid \d+ failed: ", outcome.err), outcome.err
    assert not (folder / "images").exists()
    assert job.results() == ["7acc00000000 7acc00002000 7acc00004000"]
    assert job.process.wait(20) == 0


def test_a_restore_that_fails_on_the_device_leaves_nothing(
    tool: Tool, folder: Path, here: RunningServer, start: Start
) -> None:
    job = start(600)
    job.wait_for(50)
    where = ("--plugin-option", f"softaccel.socket={here.address}")
    dump(tool, job, folder / "images", *where)
    with Context(0, here.address) as context:
        free = context.info()[2]
        with server("--memory", "1M", address=f"{here.address}-small") as small:
            outcome = tool.restore(folder / "images", "-d", "--plugin-option", f"softaccel.socket={small.address}")
            assert outcome.code == 1
            assert "wanted: 4.0 MiB on device 0; there: 1.0 MiB of 1.0 MiB free on device 0" in outcome.err
        for spec in ("partial=fill", "hang=fill", "hang=resume", "hang=create"):
            fault(here, spec)
            clock = time.monotonic()
            assert tool.restore(folder / "images", "-d", *where, "--hook-timeout", "1").code == 1
            assert time.monotonic() - clock < 20
            processes.wait_until(lambda: not os.path.exists(f"/proc/{job.pid}"), "the half-restored job is gone", 10)
            processes.wait_until(lambda: context.info()[2] == free, "its device memory is given back", 10)
    tool.restore(folder / "images", "-d", *where).expect(0)
    assert job.results() == ["7acc00000000 7acc00002000 7acc00004000"]
