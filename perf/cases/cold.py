"""The same with images that are not in the page cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from floors import DEPTHS
from measure import MIB, Broken
from subject import subject
from suite import Bench, Contender, Outcome, Skipped, pages_files

NAME = "cold"
TITLE = "Restore of one task from the disk"

_LEFT_BYTES = 16 * MIB  # more than this in the page cache, and a file is not cold


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(512, 4096, copies=2.2)
    what = f"cold restore of {mib} MiB"
    with subject(bench, outcome, "idle", mib, where=bench.disk, copies=2) as tree:
        (pages,) = pages_files(tree.images)
        if left_in_cache(bench, tree.images):
            raise Skipped(f"files in {bench.disk} cannot be dropped from the page cache; name a folder with --disk")
        contenders = tree.contenders(what, [(), *bench.variants("restore", [("--verify",)])])
        contenders += disk_floors(bench, outcome, what, pages)
        folders = [tree.images, tree.criu_images]
        bench.in_turns([from_cold(bench, folders, contender) for contender in contenders])
    # Verifying reads all images first: afterwards they are in the page cache, and memory alone says nothing.
    outcome.line(what, "ours", "gpurestore --verify").compared_by = "engine"
    ours = outcome.line(what, "ours", "gpurestore")
    outcome.want_share(ours, 0.9)
    outcome.want_faster(ours, outcome.best(what, "criu", "command"), 1)


def disk_floors(bench: Bench, outcome: Outcome, what: str, pages: Path) -> list[Contender]:
    """Contenders: reads of ``pages`` past the page cache, with few and with many of them under way."""

    def contender(depth: int) -> Contender:
        name = f"{bench.floors.disk_reader}, depth {depth}"
        line = outcome.line(what, "floor", name, pages.stat().st_size)
        return lambda: line.add("command", bench.floors.read_disk(pages, depth))

    return [contender(depth) for depth in DEPTHS]


def from_cold(bench: Bench, folders: list[Path], contender: Contender) -> Callable[[], None]:
    """``contender``, after all images were dropped from the page cache."""

    def cold() -> None:
        for folder in folders:
            if left_in_cache(bench, folder):
                raise Broken(f"{folder} does not leave the page cache")
        contender()

    return cold


def left_in_cache(bench: Bench, folder: Path) -> bool:
    """Drop the images from the page cache; whether that failed."""
    files = list(folder.glob("*.img")) if folder.exists() else []
    return bool(files) and bench.floors.evict(files) > _LEFT_BYTES
