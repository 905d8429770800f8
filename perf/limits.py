"""The tables of docs/performance.md about the machine itself.

    perf/limits.py [copy|shared|write|disk ...] [--gib N] [--runs N] [--folder DIR] [--disk DIR]

copy: a file from the page cache into fresh private memory; shared: into shared memory; write: memory into a new file;
disk: a file past the page cache. Over threads or depth, kinds of memory, and bytes per call; GB/s, medians.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from floors import Floors, Way, default_threads
from measure import GIB, MIB, Series, digits, markdown_table, workshop

CHUNKS = (256 << 10, 1 * MIB, 4 * MIB, 16 * MIB)
Row = tuple[list[str], Callable[[int], float]]  # what it is, and seconds for a number of bytes per call


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="copy, shared, write, disk (default: all)")
    parser.add_argument("--gib", type=float, default=0.5, help="size of the file (default: 0.5)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="in memory (default: /dev/shm)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="on a disk (default: /var/tmp)")
    args = parser.parse_args()
    nr_bytes = int(args.gib * GIB)
    with workshop(args.folder) as (programs, folder), workshop(args.disk) as (_, disk):
        floors = Floors(programs)
        for name in args.tables or list(TABLES):
            print(f"\n{name}: GB/s for {args.gib:g} GiB, medians of {args.runs}\n")
            rows = TABLES[name](floors, disk if name == "disk" else folder, nr_bytes)
            print("\n".join(table(floors, rows, nr_bytes, args.runs)), flush=True)


def table(floors: Floors, rows: Iterator[Row], nr_bytes: int, runs: int) -> list[str]:
    """Measure every row at every number of bytes per call."""
    lines: list[list[str]] = []
    for labels, seconds in rows:
        series = [Series() for _ in CHUNKS]
        for _ in range(runs):
            for chunk_bytes, entry in zip(CHUNKS, series, strict=True):
                floors.touch(2 * nr_bytes)
                entry.values.append(seconds(chunk_bytes))
        lines.append([*labels, *(digits(nr_bytes / entry.median / 1e9) for entry in series)])
    head = ["" for _ in lines[0][: -len(CHUNKS)]] + [f"{chunk >> 10} KiB" for chunk in CHUNKS]
    return markdown_table([head, *lines])


def some_file(folder: Path, nr_bytes: int) -> Path:
    """A file of noise."""
    file = folder / "pages"
    if not file.exists():
        with open(file, "wb") as out:
            for _ in range(nr_bytes // MIB):
                out.write(os.urandom(MIB))
            os.fsync(out.fileno())
    return file


HOW = {"none": "by the copy", "ahead": "ahead", "placed": "as whole pages"}  # pages are faulted in, or not


def copies(kinds: Sequence[str], floors: Floors, folder: Path, nr_bytes: int) -> Iterator[Row]:
    """From the page cache into fresh memory."""
    file = some_file(folder, nr_bytes)
    threads = sorted({1, default_threads(), 2 * default_threads()})
    for nr, memory, populate in product(threads, kinds, HOW):
        if populate == "placed" and memory.endswith("huge"):
            continue  # by the kernel's choice always small ones

        def seconds(chunk_bytes: int, nr: int = nr, memory: str = memory, populate: str = populate) -> float:
            return floors.copy([file], Way(memory, populate, chunk_bytes), nr)

        yield [f"{nr} threads", memory, HOW[populate]], seconds


def writes(floors: Floors, folder: Path, nr_bytes: int) -> Iterator[Row]:
    """From memory into a new file."""
    threads = sorted({1, default_threads(), 2 * default_threads()})
    for mapped, nr in product((False, True), threads):

        def seconds(chunk_bytes: int, nr: int = nr, mapped: bool = mapped) -> float:
            return floors.write(folder / "written", nr_bytes, nr, chunk_bytes=chunk_bytes, mapped=mapped)

        yield [f"{nr} threads", "through a mapping" if mapped else "pwrite"], seconds


def disk_reads(floors: Floors, folder: Path, nr_bytes: int) -> Iterator[Row]:
    """Past the page cache."""
    file = some_file(folder, nr_bytes)
    floors.evict([file])
    for depth in (1, 4, 32):
        if floors.fio:
            yield [f"fio, depth {depth}"], partial(floors.read_disk, file, depth)

        def seconds(chunk_bytes: int, depth: int = depth) -> float:
            return floors.read_directly(file, depth, chunk_bytes)

        yield [f"{depth} threads with pread"], seconds


TABLES: dict[str, Callable[[Floors, Path, int], Iterator[Row]]] = {
    "copy": partial(copies, ("small", "huge")),
    "shared": partial(copies, ("shared", "shared-huge")),
    "write": writes,
    "disk": disk_reads,
}


if __name__ == "__main__":
    main()
