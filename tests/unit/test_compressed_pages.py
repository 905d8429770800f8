"""Pages go into compressed images and come back to where they were, and what goes wrong is named."""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.memory_child import (
    MAP_ANONYMOUS,
    MAP_SHARED,
    PAGE,
    PROT_READ,
    PROT_RW,
    MemoryChild,
    commit_images,
    fill,
    libc,
    map_memory,
    pattern,
)

from gpurestore.core import Cancel
from gpurestore.errors import CancelledError, CoreError, GpurestoreError, ImageError, TaskDiedError
from gpurestore.images import pb
from gpurestore.images.compression import Compression, Crew
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import read_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import memory, vmaflags
from gpurestore.tasks.memory import compressed, filling

METHODS = pytest.mark.parametrize("method", ["lz4", "zstd", "zstd:12"])


def crew(method: str, jobs: int = 3) -> Crew:
    return Crew(Compression.parse(method), jobs)


def area(start: int, nr_pages: int, status: int = vmaflags.REGULAR | vmaflags.ANON_PRIVATE) -> pb.vma_entry:
    return pb.vma_entry(
        start=start, end=start + nr_pages * PAGE, pgoff=0, shmid=0, prot=3, flags=0x22, status=status, fd=-1
    )


def dump(folder: Path, child: MemoryChild, method: str, *vmas: pb.vma_entry) -> memory.Progress:
    """Images of the child's memory in these mappings."""
    done = memory.Progress()
    with ImageWriter(folder / "images") as writer:
        writer.crew = crew(method)
        memory.dump(writer, child.pid, pb.mm_entry(vmas=vmas), 4, progress=done)
        commit_images(writer)
    return done


def restore(folder: Path, child: MemoryChild, *vmas: pb.vma_entry, cancel: Cancel | None = None) -> memory.PagePlan:
    """Put what the images hold into the child."""
    with ImageFolder(folder / "images") as images:
        images.verify()
        plan = memory.plan_pages(images, child.pid, pb.mm_entry(vmas=vmas))
        assert plan.compressed is not None
        with memory.open_pages(images, plan) as pages:
            plan.compressed.run(child.pid, 0, pages.fd, cancel)
    return plan


def read(child: MemoryChild, start: int, nr_pages: int) -> bytes:
    with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as file:
        return os.pread(file.fileno(), nr_pages * PAGE, start)


def forget(child: MemoryChild, start: int, nr_pages: int) -> None:
    """Overwrite pages of the child."""
    with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\xee" * (nr_pages * PAGE), start)


def written(nr_pages: int, which: list[int]) -> MemoryChild:
    """A child with these of its pages written."""

    def prepare() -> list[int]:
        start = map_memory(nr_pages * PAGE)
        for page in which:
            fill(start + page * PAGE)
        return [start]

    return MemoryChild(prepare)


@METHODS
def test_a_fragmented_task_is_stored_and_brought_back_page_by_page(folder: Path, method: str) -> None:
    nr = 3000
    which = [page for page in range(nr) if page % 7 and page % 13]
    with written(nr, which) as child:
        (start,) = child.values
        done = dump(folder, child, method, area(start, nr))
        assert done.done_bytes == len(which) * PAGE
        before = read(child, start, nr)
        for page in which:
            forget(child, start + page * PAGE, 1)
        plan = restore(folder, child, area(start, nr))
        assert read(child, start, nr) == before
        assert plan.done_bytes == plan.total_bytes == len(which) * PAGE
    assert plan.pages_name.startswith("pages-4.img.")
    assert not (folder / "images" / "pages-4.img").exists()
    assert (folder / "images" / plan.pages_name).stat().st_size < len(which) * PAGE / 3


def test_pages_of_zeros_are_left_out_where_nothing_else_would_show(folder: Path) -> None:
    """As for a plain pages image; over the border of a chunk, and a whole chunk of zeros."""
    nr = 600

    def prepare() -> list[int]:
        start = map_memory(nr * PAGE)
        fill(start, nr)
        ctypes.memset(start + 5 * PAGE, 0, PAGE)
        ctypes.memset(start + 100 * PAGE, 0, 300 * PAGE)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        file = vmaflags.REGULAR | vmaflags.FILE_PRIVATE
        vmas = area(start, 590), area(start + 590 * PAGE, 10, file)
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as memory_file:
            os.pwrite(memory_file.fileno(), bytes(PAGE), start + 595 * PAGE)
        before = read(child, start, nr)
        done = dump(folder, child, "lz4", *vmas)
        with ImageFolder(folder / "images") as images:
            pagemap = read_pagemap(images, "pagemap", child.pid)
            assert images.files()["pages-4.img.lz4"] > 0
        runs = zip(pagemap.vaddrs, pagemap.nr_pages, strict=True)
        assert [((a - start) // PAGE, n) for a, n in runs] == [(0, 5), (6, 94), (400, 190), (590, 10)]
        assert done.done_bytes == (5 + 94 + 190 + 10) * PAGE
        for page in (*range(5), *range(6, 100), *range(400, nr)):
            forget(child, start + page * PAGE, 1)
        restore(folder, child, *vmas)
        assert read(child, start, nr) == before


def test_several_threads_share_the_chunks(folder: Path) -> None:
    nr = 2000
    with written(nr, list(range(nr))) as child:
        (start,) = child.values
        dump(folder, child, "lz4", area(start, nr))
        forget(child, start, nr)
        with ImageFolder(folder / "images") as images:
            chunks = memory.plan_pages(images, child.pid, pb.mm_entry(vmas=[area(start, nr)])).compressed
            assert chunks is not None
            with images_file(images, "pages-4.img.lz4") as fd:
                threads = [threading.Thread(target=chunks.run, args=(child.pid, 0, fd)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        assert read(child, start, nr) == pattern(start, nr)


@contextmanager
def images_file(images: ImageFolder, name: str) -> Iterator[int]:
    fd = images.open_raw(name)
    yield fd
    os.close(fd)


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), min_size=1, max_size=30)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.sampled_from(["lz4", "zstd:19"]), st.booleans())
def test_every_page_of_an_object_arrives_in_the_right_place(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[int, int]], method: str, two_parts: bool
) -> None:
    """Also where a stream is made of several parts, as it is for memory that is read through several tasks."""
    runs, at = memory.PageRuns(), 0
    for gap, nr in found:
        runs.insert(at + gap * PAGE, nr)
        at += (gap + nr) * PAGE
    source, copy = os.memfd_create("source"), os.memfd_create("copy")
    expected = bytearray(at)
    for address, nr in runs:
        expected[address : address + nr * PAGE] = pattern(address, nr)
    os.write(source, expected)
    os.ftruncate(copy, at)
    path = tmp_path_factory.mktemp("object") / "images"
    with ImageWriter(path) as writer:
        writer.crew = crew(method)
        file = memory.pages_file(writer, 2, None, None, None)
        parts = list(runs)
        middle = len(parts) // 2 if two_parts else 0
        stored = memory.PageRuns()
        for part in (parts[:middle], parts[middle:]):
            some = memory.PageRuns()
            for address, nr in part:
                some.insert(address, nr)
            for address, nr in file.add_from_file(source, some):
                stored.insert(address, nr)
        file.finish("pagemap-shmem", 5, stored)
        commit_images(writer)
    with ImageFolder(path) as images:
        memory.fill_file(images, 5, copy, at, jobs=3)
    assert os.pread(copy, at, 0) == bytes(expected)
    os.close(source)
    os.close(copy)


def test_pages_of_an_object_are_put_in_place_as_a_whole_unless_they_are_there_already(folder: Path) -> None:
    nr = 1500
    fd = os.memfd_create("object")
    os.ftruncate(fd, nr * PAGE)
    os.pwrite(fd, pattern(0, 1000), 0)
    with ImageWriter(folder / "images") as writer:
        writer.crew = crew("lz4")
        stored = memory.save_object(writer, 5, fd, nr * PAGE, 2)
        commit_images(writer)
    os.close(fd)
    for touched in (False, True):
        start = map_memory(nr * PAGE, PROT_RW, MAP_SHARED | MAP_ANONYMOUS)
        if touched:
            ctypes.memset(start + 5 * PAGE, 77, PAGE)
        with ImageFolder(folder / "images") as images:
            made = memory.plan_object(images, 5, nr * PAGE)
            with memory.open_pages(images, made) as pages:
                made.fill(start, nr * PAGE, pages, jobs=2)
        assert ctypes.string_at(start, nr * PAGE) == pattern(0, 1000) + bytes(500 * PAGE)
        assert made.done_bytes == made.total_bytes == stored
        assert 0 < made.placed_bytes < stored if touched else made.placed_bytes == stored
        libc.munmap(start, nr * PAGE)


def test_an_object_keeps_its_holes_and_its_last_page_whole(folder: Path) -> None:
    fd, copy = os.memfd_create("object"), os.memfd_create("copy")
    size = 20 * PAGE + 100
    for each in (fd, copy):
        os.ftruncate(each, size)
    os.pwrite(fd, b"a" * PAGE, 3 * PAGE)
    os.pwrite(fd, b"z" * 100, 20 * PAGE)
    with ImageWriter(folder / "images") as writer:
        writer.crew = crew("zstd")
        assert memory.save_object(writer, 5, fd, size, 2) == 2 * PAGE
        commit_images(writer)
    with ImageFolder(folder / "images") as images:
        assert list(read_pagemap(images, "pagemap-shmem", 5).vaddrs) == [3 * PAGE, 20 * PAGE]
        memory.fill_file(images, 5, copy, size)
    assert os.pread(copy, size, 0) == os.pread(fd, size, 0)
    assert os.fstat(copy).st_blocks == os.fstat(fd).st_blocks
    os.close(fd)
    os.close(copy)


def test_pages_of_the_vdso_are_kept_but_not_written(folder: Path) -> None:
    vdso = vmaflags.REGULAR | vmaflags.VDSO | vmaflags.ANON_PRIVATE
    with written(8, list(range(8))) as child:
        (start,) = child.values
        vmas = area(start, 3), area(start + 3 * PAGE, 2, vdso), area(start + 5 * PAGE, 3)
        dump(folder, child, "lz4", *vmas)
        forget(child, start, 8)
        plan = restore(folder, child, *vmas)
        expected = bytearray(pattern(start, 8))
        expected[3 * PAGE : 5 * PAGE] = b"\xee" * (2 * PAGE)
        assert read(child, start, 8) == expected
        assert plan.done_bytes == plan.total_bytes == 6 * PAGE
        with ImageFolder(folder / "images") as images:
            code = memory.read_page_bytes(
                images, read_pagemap(images, "pagemap", child.pid), start + 3 * PAGE, start + 5 * PAGE
            )
            assert code == pattern(start + 3 * PAGE, 2)


# ---- what goes wrong


def test_memory_that_cannot_be_written_is_an_error_that_names_the_address(folder: Path) -> None:
    def prepare() -> list[int]:
        start = map_memory(8 * PAGE)
        fill(start, 8)
        libc.mprotect(start + 4 * PAGE, 4 * PAGE, PROT_READ)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        dump(folder, child, "zstd", area(start, 8))
        with pytest.raises(CoreError, match=f"to {start + 4 * PAGE:#x} of task {child.pid}"):
            restore(folder, child, area(start, 8))


def test_a_task_that_dies_meanwhile_is_an_error(folder: Path) -> None:
    with written(8, [1]) as child:
        dump(folder, child, "lz4", area(child.values[0], 8))
        os.kill(child.pid, 9)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TaskDiedError, match=f"task {child.pid}"):
            restore(folder, child, area(child.values[0], 8))


def test_filling_can_be_cancelled_and_then_nobody_goes_on(folder: Path) -> None:
    cancel = Cancel()
    cancel.set()
    with written(8, list(range(8))) as child:
        (start,) = child.values
        dump(folder, child, "lz4", area(start, 8))
        forget(child, start, 8)
        with ImageFolder(folder / "images") as images:
            chunks = memory.plan_pages(images, child.pid, pb.mm_entry(vmas=[area(start, 8)])).compressed
            assert chunks is not None
            with images_file(images, "pages-4.img.lz4") as fd:
                with pytest.raises(CancelledError):
                    chunks.run(child.pid, 0, fd, cancel)
                chunks.run(child.pid, 0, fd)
        assert read(child, start, 8) == b"\xee" * (8 * PAGE)


def test_a_dump_that_is_cancelled_under_way_stops_at_the_next_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nr, cancel, done = 4000, Cancel(), memory.Progress()
    compress = Compression.parse("lz4").codec()

    class Cancelling:
        def compress(self, chunk: bytes) -> object:
            if done.done_bytes:
                cancel.set()
            return compress.compress(chunk)

    monkeypatch.setattr(Compression, "codec", lambda self: Cancelling())
    with written(nr, list(range(nr))) as child, ImageWriter(folder / "images") as writer:
        writer.crew = crew("lz4", 2)
        with pytest.raises(CancelledError):
            memory.dump(
                writer, child.pid, pb.mm_entry(vmas=[area(child.values[0], nr)]), 1, cancel=cancel, progress=done
            )
    assert 0 < done.done_bytes <= 6 * writer.crew.compression.chunk_bytes < nr * PAGE


def test_a_restore_that_is_cancelled_under_way_stops_at_the_next_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nr, cancel = 4000, Cancel()
    with written(nr, list(range(nr))) as child:
        (start,) = child.values
        dump(folder, child, "lz4", area(start, nr))
        put = compressed.CompressedPages._put

        def put_and_cancel(self: compressed.CompressedPages, *args: Any) -> None:
            put(self, *args)
            cancel.set()

        monkeypatch.setattr(compressed.CompressedPages, "_put", put_and_cancel)
        with ImageFolder(folder / "images") as images:
            chunks = memory.plan_pages(images, child.pid, pb.mm_entry(vmas=[area(start, nr)])).compressed
            assert chunks is not None
            with images_file(images, "pages-4.img.lz4") as fd, pytest.raises(CancelledError):
                chunks.run(child.pid, 0, fd, cancel)
        assert chunks.done_bytes == Compression.parse("lz4").chunk_bytes


def test_a_chunk_that_is_damaged_ends_a_restore_and_is_named(folder: Path) -> None:
    with written(8, list(range(8))) as child:
        (start,) = child.values
        dump(folder, child, "zstd", area(start, 8))
        path = folder / "images" / "pages-4.img.zst"
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
        with ImageFolder(folder / "images") as images:
            with pytest.raises(ImageError, match=r"pages-4\.img\.zst: damaged"):
                images.verify()
            chunks = memory.plan_pages(images, child.pid, pb.mm_entry(vmas=[area(start, 8)])).compressed
            assert chunks is not None
            with images_file(images, path.name) as fd:
                with pytest.raises(ImageError, match=r"pages-4\.img\.zst: chunk 0 of 1 .* is damaged"):
                    chunks.run(child.pid, 0, fd)


def test_a_pages_image_with_too_few_pages_is_refused(folder: Path) -> None:
    with written(8, list(range(8))) as child:
        (start,) = child.values
        dump(folder, child, "zstd", area(start, 4))
        with ImageFolder(folder / "images") as images:
            pagemap = read_pagemap(images, "pagemap", child.pid)
            longer = filling.Pagemap(4, pagemap.vaddrs, array("Q", [8]), pagemap.flags, 8, True)
            ranges = array("Q", [start]), array("Q", [start + 8 * PAGE]), b"\0"
            size = filling.find_pages(images, 4).stream_bytes
            with pytest.raises(ImageError, match="behind the end of a file of 16384 bytes"):
                filling._create_queue(longer, ranges, None, size, PAGE, "pagemap-1.img")


def test_a_full_disk_in_the_middle_is_reported_and_ends_every_thread(folder: Path) -> None:
    nr = 4000
    with written(nr, list(range(nr))) as child, ImageWriter(folder / "images") as writer:
        writer.crew = crew("lz4", 4)
        file = memory.pages_file(writer, 1, None, None, None)
        assert isinstance(file, compressed.CompressedPagesFile)
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, file._fd)
        os.close(full)
        runs = memory.scan(child.pid, [area(child.values[0], nr)], memory.STORED)
        with pytest.raises(GpurestoreError, match=r"no space left for pages-1\.img\.lz4"):
            file.add_from_task(child.pid, runs)
    assert not [thread for thread in threading.enumerate() if thread.name == "gr-images"]


def test_pages_that_went_away_are_an_error_that_names_the_address(folder: Path) -> None:
    with MemoryChild(lambda: [map_memory(PAGE)]) as child, ImageWriter(folder / "images") as writer:
        writer.crew = crew("zstd")
        gone = memory.PageRuns()
        gone.insert(PAGE, 1)
        with pytest.raises(CoreError, match=f"0x1000 of task {child.pid}"):
            memory.pages_file(writer, 1, None, None, None).add_from_task(child.pid, gone)


def test_a_compressor_that_fails_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nr, lock, calls = 4000, threading.Lock(), [0]

    class Failing:
        def compress(self, chunk: object) -> bytes:
            with lock:
                calls[0] += 1
                if calls[0] == 5:
                    raise MemoryError("no room for a frame")
            return bytes(100)

    monkeypatch.setattr(Compression, "codec", lambda self: Failing())
    with written(nr, list(range(nr))) as child, ImageWriter(folder / "images") as writer:
        writer.crew = crew("zstd", 4)
        runs = memory.scan(child.pid, [area(child.values[0], nr)], memory.STORED)
        with pytest.raises(MemoryError, match="no room for a frame"):
            memory.pages_file(writer, 1, None, None, None).add_from_task(child.pid, runs)
    assert calls[0] <= 5 + 4


def test_writing_pages_can_be_cancelled_also_while_waiting_for_a_place(folder: Path) -> None:
    cancel = Cancel()
    cancel.set()
    runs = memory.PageRuns()
    runs.insert(PAGE, 1)
    with ImageWriter(folder / "images") as writer:
        writer.crew = crew("lz4", 1)
        with pytest.raises(CancelledError):
            memory.pages_file(writer, 1, None, cancel, None).add_from_task(os.getpid(), runs)
        with writer.crew.place(lambda: None), pytest.raises(CancelledError):
            memory.pages_file(writer, 2, None, cancel, None).add_from_task(os.getpid(), runs)


def test_a_place_is_for_our_own_memory_too(folder: Path) -> None:
    """fill() writes where its base says, and nowhere else."""
    fd, size = os.memfd_create("object"), 4 * PAGE
    os.write(fd, pattern(0, 4))
    with ImageWriter(folder / "images") as writer:
        writer.crew = crew("lz4")
        memory.save_object(writer, 5, fd, size, 2)
        commit_images(writer)
    start = map_memory(6 * PAGE)
    with ImageFolder(folder / "images") as images:
        plan = memory.plan_object(images, 5, size)
        with memory.open_pages(images, plan) as pages:
            plan.fill(start + PAGE, size, pages, jobs=2)
    assert ctypes.string_at(start, 6 * PAGE) == bytes(PAGE) + pattern(0, 4) + bytes(PAGE)
    libc.munmap(start, 6 * PAGE)
    os.close(fd)
