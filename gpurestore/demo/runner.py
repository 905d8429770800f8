"""The demonstration itself: two training runs of which one is dumped, killed and restored, then a comparison."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpurestore.demo import restores
from gpurestore.demo.restores import COMMAND, Timing
from gpurestore.devplugins.softaccel import SOCKET_VARIABLE
from gpurestore.errors import GpurestoreError, UsageError
from gpurestore.pipeline.trace import Span, format_table, summarize
from gpurestore.pipeline.tracefile import read_trace
from gpurestore.units import format_bytes

_ACCELERATOR = ("--memory", "256M", "--bandwidth", "200M", "--latency", "20")
_TEMPORARY = "gpurestore-demo-"
_PICTURE = "timeline.svg"
_POLL_S = 0.005
_SHOWN_S = 0.005
_STALLED_S = 120.0  # without a single new step


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration found; the seconds are of the wall clock."""

    steps: int
    dumped_after_step: int
    undisturbed_s: float
    before_dump_s: float
    dump_s: float
    restore_s: float
    after_restore_s: float
    image_bytes: int
    last_loss: float
    weights_sha256: str
    timings: tuple[Timing, ...]
    picture: str


class Status:
    """One line on a terminal that is drawn over again; nothing elsewhere."""

    def __init__(self) -> None:
        self._able = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._next = 0.0

    def show(self, text: str) -> None:
        """Replace the line, at most ten times a second; an empty text wipes it at once."""
        now = time.monotonic()
        if self._able and (now >= self._next or not text):
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._next = now + 0.1


class Job:
    """One run of the training job, in a session of its own, with files where a terminal would be."""

    def __init__(self, folder: Path, steps: int, accelerator: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.steps = steps
        self.losses = folder / "losses.txt"
        with open(folder / "job.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpurestore.demo.device_job", "--out", str(folder), "--steps", str(steps)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", SOCKET_VARIABLE: accelerator},
            )

    def last_step(self) -> int:
        """Steps that are written to the loss curve by now."""
        try:
            with open(self.losses, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 200))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return 0
        return int(lines[-2].split()[0]) + 1 if len(lines) > 1 else 0

    def follow(self, status: Status, title: str, until: int | None, poll: Callable[[], int | None]) -> int:
        """Wait for step ``until``, or for the end of the process that ``poll`` asks about; the last step."""
        moved_at, seen = time.monotonic(), -1
        while True:
            ended = poll()
            step = self.last_step()
            status.show(f"{title}: step {step} of {self.steps}")
            if until is not None and step >= until:
                break
            if ended is not None:
                if until is not None or ended != 0:
                    raise GpurestoreError(f"{title}: ended at step {step} with status {ended}: {self._complaint()}")
                break
            if step != seen:
                moved_at, seen = time.monotonic(), step
            elif time.monotonic() - moved_at > _STALLED_S:
                raise GpurestoreError(f"{title}: stands still at step {step}: {self._complaint()}")
            time.sleep(_POLL_S)
        status.show("")
        return step

    def _complaint(self) -> str:
        lines = (self.folder / "job.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """End what is left of the tree, also after it was restored: its session is the job's own."""
        try:
            command = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        except OSError:
            return
        if os.fsencode(self.folder) in command:
            os.killpg(self.process.pid, signal.SIGKILL)


def run_demo(*, steps: int, keep: Path | None, as_json: bool) -> int:
    """Run it all and print what came out; the exit code."""
    from importlib.util import find_spec

    for package in ("numpy", "sklearn"):
        if find_spec(package) is None:
            raise UsageError(f"the demo needs the package {package}: pip install 'gpurestore[demo]'")
    from gpurestore import namespaces

    if not namespaces.may_restore():
        arguments = ["demo", "--steps", str(steps), *(["--keep", str(keep)] if keep else []), *["--json"] * as_json]
        return namespaces.run([sys.executable, "-m", "gpurestore", *arguments])
    folder = _work_folder(keep)
    try:
        result, spans = _run(folder, steps, quiet=as_json)
    except GpurestoreError as error:
        if keep is None:
            raise
        raise type(error)(f"{error} (see {folder})") from error
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        from gpurestore.cli.options import print_json

        print_json(result)
    else:
        print(_report(result, spans))
    return 0


def _work_folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise UsageError(f"{keep} is not empty")
    return keep.resolve()


@contextmanager
def _accelerator(folder: Path) -> Iterator[str]:
    """A server of the software accelerator for the time of the demonstration: its address."""
    where = f"@gpurestore-demo-{os.getpid()}-{os.urandom(4).hex()}"
    with open(folder / "accelerator.log", "wb") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gpurestore.devplugins.softaccel",
                "--with-parent",
                "--socket",
                where,
                *_ACCELERATOR,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert server.stdout is not None
    try:
        if not server.stdout.readline():
            raise GpurestoreError(f"the software accelerator did not start: {(folder / 'accelerator.log').read_text()}")
        yield where
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def _run(folder: Path, steps: int, *, quiet: bool) -> tuple[DemoResult, dict[str, list[Span]]]:
    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    restores.adopt_orphans()
    say(
        f"Training a network on handwritten digits, {steps} steps. What it learns lives in the memory of the software\n"
        "accelerator, a stand-in for hardware, not a GPU: a server process that forgets everything with its client."
    )
    with _accelerator(folder) as accelerator:
        return _run_on(accelerator, folder, steps, say)


def _run_on(
    accelerator: str, folder: Path, steps: int, say: Callable[[str], None]
) -> tuple[DemoResult, dict[str, list[Span]]]:
    status = Status()
    say("1. an undisturbed run")
    clock = time.monotonic()
    undisturbed = Job(folder / "undisturbed", steps, accelerator)
    try:
        undisturbed.follow(status, "undisturbed run", None, undisturbed.process.poll)
    finally:
        undisturbed.kill()
        undisturbed.process.wait()
    undisturbed_s = time.monotonic() - clock

    say("2. the same again, but dumped on the way; the dump ends it, and its device memory is gone")
    job = Job(folder / "restored", steps, accelerator)
    try:
        before_dump_s, dump_s = _train_and_dump(job, status, folder)
        dumped_after = job.last_step()
        losses = job.losses.read_bytes()
        say(f"3. restore it some times, serial and parallel, and end it again: {restores.NR_ROUNDS} rounds")
        timings = restores.compare(folder / "images", job.kill, lambda: _put_back(job.losses, losses))
        say(f"4. restore it once more, as it was after step {dumped_after}, and let it finish")
        restore_s, after_s = _restore_and_finish(job, status, folder)
    finally:
        job.kill()
    digest = _compare(undisturbed.folder, job.folder)
    result = DemoResult(
        steps=steps,
        dumped_after_step=dumped_after,
        undisturbed_s=undisturbed_s,
        before_dump_s=before_dump_s,
        dump_s=dump_s,
        restore_s=restore_s,
        after_restore_s=after_s,
        image_bytes=sum(path.stat().st_blocks * 512 for path in (folder / "images").iterdir() if path.is_file()),
        last_loss=float.fromhex(job.losses.read_text().splitlines()[-1].split()[1]),
        weights_sha256=digest,
        timings=tuple(timings),
        picture=_draw(folder),
    )
    return result, {name: read_trace(folder / f"{name}.json").spans for name in ("dump", "restore")}


def _put_back(path: Path, data: bytes) -> None:
    """The file as it was at the dump: a restored run went on writing to it."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def _draw(folder: Path) -> str:
    """The picture of the last restore, where it outlives the folder."""
    from gpurestore.pipeline.timeline import draw_file

    picture = folder.with_name(f"{folder.name}.svg") if folder.name.startswith(_TEMPORARY) else folder / _PICTURE
    draw_file(folder / "restore.json", picture, "the demonstration's restore")
    return str(picture)


def _train_and_dump(job: Job, status: Status, folder: Path) -> tuple[float, float]:
    """Let the job run a quarter of its steps and dump it; seconds of the run and of the dump."""
    started = time.monotonic()
    job.follow(status, "second run", max(1, job.steps // 4), job.process.poll)
    frozen = time.monotonic()
    pid, images, trace = str(job.process.pid), str(folder / "images"), str(folder / "dump.json")
    command = [*COMMAND, "dump", "-t", pid, "-D", images, "--trace", trace, "--json"]
    dump = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if dump.returncode != 0:
        raise GpurestoreError(f"the dump failed with status {dump.returncode}")
    ended = time.monotonic()
    if job.process.wait(10) != -signal.SIGKILL:
        raise GpurestoreError(f"the job ended with status {job.process.returncode}, not by the dump's kill")
    restores.wait_gone(json.loads(dump.stdout)["pids"])
    return frozen - started, ended - frozen


def _restore_and_finish(job: Job, status: Status, folder: Path) -> tuple[float, float]:
    """Restore in front of the tree; seconds until it ran, and from there to its end."""
    trace = ("--trace", str(folder / "restore.json"))
    with restores.restored(folder / "images", job.kill, "--parallel", *trace) as tree:
        runs_at = time.monotonic()
        job.follow(status, "restored run", None, tree.process.poll)
        return tree.seconds, time.monotonic() - runs_at


def _compare(undisturbed: Path, restored: Path) -> str:
    """Raise unless both runs wrote the same bytes; the weights' checksum."""
    expected = (undisturbed / "losses.txt").read_text().splitlines()
    found = (restored / "losses.txt").read_text().splitlines()
    for number, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            raise GpurestoreError(f"the loss curves differ from step {number} on: {a!r} undisturbed, {b!r} restored")
    if len(expected) != len(found):
        raise GpurestoreError(f"the loss curves have {len(expected)} steps undisturbed and {len(found)} restored")
    digests = [hashlib.sha256((run / "weights.bin").read_bytes()).hexdigest() for run in (undisturbed, restored)]
    if digests[0] != digests[1]:
        raise GpurestoreError(f"the final weights differ: sha256 {digests[0]} undisturbed, {digests[1]} restored")
    return digests[0]


def _report(result: DemoResult, spans: dict[str, list[Span]]) -> str:
    rows: list[tuple[str, float, int]] = [("undisturbed run", result.undisturbed_s, 0)]
    rows.append(("second run up to the dump", result.before_dump_s, 0))
    rows.append(("dump, as a whole process", result.dump_s, 0))
    rows += _stages(spans["dump"])
    rows.append(("restore, until the job runs", result.restore_s, 0))
    rows += _stages(spans["restore"])
    rows.append(("restored run to the end", result.after_restore_s, 0))
    return (
        f"\nThe loss curves are equal, all {result.steps} steps (the last loss is {result.last_loss:.6f}),\n"
        f"and so are the final weights, bit for bit (sha256 {result.weights_sha256[:16]}...).\n"
        f"The images took {format_bytes(result.image_bytes)}. Stages overlap; those above {_SHOWN_S * 1000:.0f} ms:\n\n"
        + format_table(rows, "what")
        + f"\n\nSerial against parallel, the best of {restores.NR_ROUNDS} rounds:\n\n"
        + restores.table(list(result.timings))
        + f"\n\nWhat ran when in the last restore: {result.picture}"
    )


def _stages(spans: list[Span]) -> list[tuple[str, float, int]]:
    return [(f"  {row.name}", row.wall_s, row.nr_bytes) for row in summarize(spans) if row.wall_s >= _SHOWN_S]
