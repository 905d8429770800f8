"""Training on a real NVIDIA GPU: dump, and restore with memory and device at the same time or one after the other."""

from __future__ import annotations

from pathlib import Path

from measure import MIB, Broken
from suite import Bench, Outcome, Skipped, remove
from support import processes
from support.gpu_jobs import Jobs, library, missing_gpu
from tools import Run

from gpurestore.devplugins.cuda.driver import default_library, describe, load

NAME = "gpu"
TITLE = "Training on a GPU"


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure, with each way in which device memory can go."""
    if reason := missing_gpu():
        raise Skipped(reason)
    mib = bench.size(1024, 8192, copies=3.2)
    outcome.notes += [f"Device: {names()}.", f"Driver: {describe().text}."]
    jobs = Jobs(bench.folder, library())
    try:
        _, out = jobs.start("undisturbed", wait=False, ballast_mib=mib)
        expected = jobs.losses(out)
        for storage in ("driver", *(["custom"] if describe().custom_storage else [])):
            measure(bench, outcome, jobs, storage, mib, expected)
    finally:
        jobs.end()


def names() -> str:
    """The GPUs that are visible."""
    from gpurestore.devplugins.cuda import nvml

    return ", ".join(f"{gpu.model} ({gpu.memory_bytes >> 20} MiB)" for gpu in nvml.read().gpus)


def measure(bench: Bench, outcome: Outcome, jobs: Jobs, storage: str, mib: int, expected: list[str]) -> None:
    """One job, dumped again and again from its own restores; in the end it must have learnt what it should."""
    what = f"{mib} MiB on the GPU, storage {storage}"
    pid, out = jobs.start(f"job-{storage}", ballast_mib=mib)
    images = bench.folder / f"images-{storage}"
    option = ("--plugin-option", f"cuda.storage={storage}")

    def note(name: str, done: Run) -> None:
        outcome.line(what, "ours", name, mib * MIB, compared_by="engine").add_run(done)

    def dump() -> None:
        remove(images)
        note("gpurestore dump", bench.gpurestore.dump(pid, images, *option))
        jobs.forget(pid)

    def restore(mode: str) -> None:
        processes.wait_gone([pid])
        note(f"gpurestore restore --{mode}", bench.gpurestore.restore(images, f"--{mode}"))

    for turn in range(bench.runs):
        for mode in ("parallel", "serial") if turn % 2 else ("serial", "parallel"):
            dump()
            restore(mode)
    Jobs.go(out)
    if jobs.losses(out) != expected:
        raise Broken(f"{what}: the losses are not those of a job that nobody stopped")
    if load(default_library()).can_use_custom_storage and storage == "custom" and not device_files(images):
        raise Broken(f"{what}: the dump has no device memory of its own")


def device_files(images: Path) -> list[Path]:
    """Device memory that went through custom storage."""
    return list(images.glob("cuda-*-*.img"))
