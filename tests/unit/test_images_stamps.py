"""Files that nobody wrote to since the dump are not read again; whatever was done to one, it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import image_samples as samples

from gpurestore.errors import ImageError
from gpurestore.images import stamps
from gpurestore.images.folder import ImageFolder
from gpurestore.images.hashing import hash_files

PAGES_BYTES = 5 * 4096


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dump whose pages have a stamp."""
    monkeypatch.setattr(stamps, "MIN_BYTES", PAGES_BYTES)
    folder = samples.make(tmp_path / "images")
    with ImageFolder(folder) as dump:
        assert dump.manifest is not None
        if not stamps.this_machine() or dump.manifest.files["pages-1.img"].stamp is None:
            pytest.skip("the temporary folder's file system, or a machine without an id, knows no stamps")
    return folder


def bytes_read(path: Path, *, everything: bool = False) -> int:
    with ImageFolder(path) as folder:
        return folder.verify(everything=everything)


def test_what_was_left_alone_is_not_read_unless_asked_for(images: Path) -> None:
    with ImageFolder(images) as folder:
        total = sum(size for size in folder.files().values())
    assert bytes_read(images) == total - PAGES_BYTES
    assert bytes_read(images, everything=True) == total
    moved = images.rename(images.with_name("elsewhere"))
    assert bytes_read(moved) == total - PAGES_BYTES


def flip_at_once(path: Path) -> None:
    """Damage that keeps size and modification time."""
    state = path.stat()
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    flip_at_once(copy)
    copy.rename(path)


@pytest.mark.parametrize("damage", [flip_at_once, replace_by_a_copy])
def test_what_was_written_to_right_after_the_dump_is_read_and_refused(
    images: Path, damage: Callable[[Path], None]
) -> None:
    damage(images / "pages-1.img")
    with ImageFolder(images) as folder, pytest.raises(ImageError, match=r"pages-1\.img: damaged"):
        folder.verify()


def test_a_copy_and_another_machines_dump_are_read_whole(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = bytes_read(images, everything=True)
    assert bytes_read(Path(shutil.copytree(images, images.with_name("copy")))) == total
    monkeypatch.setattr(stamps, "this_machine", lambda: "another")
    assert bytes_read(images) == total


def test_a_stamp_is_not_taken_while_a_write_could_still_hide_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "MIN_BYTES", 1)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    changed = path.stat().st_ctime
    monkeypatch.setattr(stamps.time, "clock_gettime", lambda clock: changed)
    with path.open() as file:
        assert stamps.take({"file": file.fileno()}) == {}


def reference(data: bytes) -> int:
    """CRC-64/NVME bit by bit."""
    state = (1 << 64) - 1
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x9A6C9329AC4BC9B5 if state & 1 else 0)
    return state ^ ((1 << 64) - 1)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, (1 << 12) + 17])
def test_the_sum_of_a_pages_image_is_crc64_nvme_however_it_is_cut(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurestore.images import hashing

    assert reference(b"123456789") == 0xAE8B14860A799888
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for chunk_bytes in (64 << 20, 100, 64):
            monkeypatch.setattr(hashing, "CHUNK_BYTES", chunk_bytes)
            monkeypatch.setattr(hashing, "_CRC_BYTES", chunk_bytes // 2)
            record = hash_files(fd, {"file": size}, 2, summed={"file"})["file"]
            assert record.crc64_nvme == f"{reference(data):016x}"
    finally:
        os.close(fd)
