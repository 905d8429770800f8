"""Dump folders: whole or absent whatever happens, and nothing in them is trusted."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import image_samples as samples

from gpurestore.errors import CancelledError, GpurestoreError, ImageError, UsageError
from gpurestore.images import hashing, pb
from gpurestore.images import writer as writer_module
from gpurestore.images.container import encode_image
from gpurestore.images.folder import GhostRun, ImageFolder
from gpurestore.images.inventory import build_inventory
from gpurestore.images.magic import KINDS, parse_file_name
from gpurestore.images.pagemap import read_pagemap
from gpurestore.images.writer import ImageWriter


@pytest.fixture
def images(tmp_path):
    return samples.make(tmp_path / "images")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _read_everything(path: Path) -> None:
    """What a restore reads, and the checksums."""
    with ImageFolder(path) as folder:
        for name in folder.files():
            match parse_file_name(name):
                case None:
                    os.close(folder.open_raw(name))
                case kind, ident if kind.name == "ghost-file":
                    folder.read_ghost(ident)
                case kind, ident if kind.name == "pagemap":
                    read_pagemap(folder, "pagemap", ident)
                case kind, ident:
                    folder.read_payloads(kind.name, ident)
        folder.verify()


# ---- writing ----


def test_a_dump_is_read_back_with_what_was_written(images):
    with ImageFolder(images) as folder:
        folder.verify()
        assert folder.manifest.root_pid == samples.ROOT_PID
        assert folder.manifest.extension == {"sample": {"list": [1, 2.5, None, True, "x"]}}
        assert folder.manifest.plugins[0].name == "softaccel"
        assert list(folder.inventory.plugins_entry.plugins) == ["softaccel"]
        assert folder.read_one("pstree").pid == samples.ROOT_PID
        assert [payload for _, payload in folder.read_payloads("pipes-data")] == [b"hello", b""]
        assert folder.idents("core") == [samples.ROOT_PID]
        assert folder.has("mm", samples.ROOT_PID)
        assert not folder.has("mm", 1)
        entry, runs = folder.read_ghost(31)
        assert (entry.mode, [run.bytes for run in runs]) == (0o100600, [5])
        assert os.pread(folder.open_raw("ghost-file-1f.img"), 5, runs[0].image_offset) == b"ghost"


def test_nothing_stands_under_the_name_before_commit_and_nothing_else_after(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        samples.fill(writer)
        assert not (tmp_path / "images").exists()
        writer.commit()
        assert writer.path == tmp_path / "images"
    assert _names(tmp_path) == ["images"]


def test_memory_is_for_its_owner_only(images):
    assert stat.S_IMODE(images.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in images.iterdir()} == {0o600}


def test_an_empty_folder_is_taken_with_its_mode(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o750)
    samples.make(tmp_path / "images")
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o750
    assert _names(tmp_path) == ["images"]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    samples.make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    _read_everything(tmp_path / "real")


def test_an_exception_leaves_nothing(tmp_path):
    def dump() -> None:
        with ImageWriter(tmp_path / "images") as writer:
            samples.fill(writer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dump()
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [("full", "not empty"), ("file", "Not a directory"), ("no/parent", "No such file"), ("file/below", "Not a dir")],
)
def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path, name, why):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=why):
        ImageWriter(tmp_path / name)
    assert _names(tmp_path) == ["file", "full"]


def test_a_mount_point_is_refused_at_once():
    with pytest.raises(UsageError, match="a mount point cannot be replaced"):
        ImageWriter(Path("/proc"))
    with pytest.raises(UsageError, match="folder of their own"):
        ImageWriter(Path("/"))


def test_a_folder_that_fills_up_meanwhile_is_left_alone(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        samples.fill(writer)
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "precious").touch()
        with pytest.raises(UsageError, match="taken by somebody else"):
            writer.commit()
    assert _names(tmp_path) == ["images"]
    assert _names(tmp_path / "images") == ["precious"]


def test_a_name_is_written_once_and_stays_inside(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        writer.open_raw("pages-1.img")
        for name in ("pages-1.img", "../x", "a/b", "", "..", "gpurestore.json"):
            with pytest.raises(ValueError, match=r"written twice|no name for an image"):
                writer.open_raw(name)


def test_a_cancelled_commit_leaves_nothing(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        samples.fill(writer)
        with pytest.raises(CancelledError):
            writer.commit(cancel=lambda: True)
    assert _names(tmp_path) == []


def test_a_long_way_to_the_disk_can_be_cancelled(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_FLUSH_BYTES", 1 << 16)
    asked = []

    def cancel() -> bool:
        asked.append(1)
        return len(asked) > 3

    with ImageWriter(tmp_path / "images") as writer:
        fd = writer.open_pages("pages-1.img")
        os.pwrite(fd, bytes(1 << 20), 0)
        writer.summed("pages-1.img", 1 << 20, 0)
        with pytest.raises(CancelledError, match="brought to the disk"):
            writer.commit(cancel=cancel)
    assert len(asked) == 4
    assert _names(tmp_path) == []


def test_pages_that_are_not_as_long_as_what_was_summed_are_refused(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        os.pwrite(writer.open_pages("pages-1.img"), b"x", 0)
        writer.summed("pages-1.img", 4096, 0)
        with pytest.raises(GpurestoreError, match=r"pages-1\.img has 1 bytes, and 4096 were written"):
            writer.commit(sync=False)
    assert _names(tmp_path) == []


# ---- being killed ----

_SYSTEM_CALLS = ("mkdir", "open", "write", "fsync", "fchmod", "fchown", "rename", "close", "preadv", "rmdir", "unlink")


def _dump_and_die(path: Path, at: int) -> bool:
    """Dump in a child that kills itself before its ``at``-th system call. Whether it lived to the end."""
    pid = os.fork()
    if pid == 0:
        left = at

        def counted(call):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return run

        for name in _SYSTEM_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        status = 1
        try:
            with ImageWriter(path) as writer:
                samples.fill(writer, pages=2)
                writer.commit()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


@pytest.mark.parametrize("existed", [False, True])
def test_killed_at_any_step_there_is_a_whole_dump_or_none(tmp_path, existed):
    path = tmp_path / "images"
    for at in range(1000):
        if existed:
            path.mkdir()
        lived = _dump_and_die(path, at)
        if path.exists() and any(path.iterdir()):
            _read_everything(path)
            shutil.rmtree(path)
        elif path.exists():
            assert existed
            path.rmdir()
        else:
            assert not existed
        if lived:
            break
    assert at > 40
    # The last one, which lived, removed what the dead ones left.
    assert _names(tmp_path) == []


def test_a_living_tools_folder_is_left_alone_and_a_dead_ones_removed(tmp_path):
    first = ImageWriter(tmp_path / "first")
    dead = tmp_path / ".old.gpurestore-0123456789ab"
    dead.mkdir()
    (dead / "pages-1.img").write_bytes(b"x" * 100)
    (tmp_path / ".gpurestore-not-ours").mkdir()
    ImageWriter(tmp_path / "second").abort()
    assert _names(tmp_path) == sorted([first.path.name, ".gpurestore-not-ours"])
    first.abort()


def test_a_link_in_place_of_a_dead_tools_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".x.gpurestore-0123456789ab").symlink_to("precious")
    ImageWriter(tmp_path / "images").abort()
    assert (tmp_path / "precious" / "file").exists()


# ---- a full or broken disk ----


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "fchmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_names_folder_and_file_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    (tmp_path / "images").mkdir()

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    def dump() -> None:
        with ImageWriter(tmp_path / "images") as writer:
            if call == "write":
                monkeypatch.setattr(os, call, fail)
            samples.fill(writer)
            monkeypatch.setattr(os, call, fail)
            writer.commit()

    with pytest.raises(GpurestoreError) as raised:
        dump()
    monkeypatch.undo()
    assert str(raised.value).startswith(f"{tmp_path}/images: ")
    assert ("no space left" in str(raised.value)) == (number == errno.ENOSPC)
    assert _names(tmp_path) == ["images"]
    assert _names(tmp_path / "images") == []


def test_a_full_disk_is_told_with_what_was_wanted_and_what_is_free(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system takes root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with ImageWriter(disk / "images") as writer:
            with pytest.raises(GpurestoreError, match=r"no space left for the images: 1000000 bytes wanted, \d+ bytes"):
                writer.check_space(1_000_000)
            writer.check_space(1)
            with pytest.raises(GpurestoreError, match=r"no space left for pages-1\.img: \d+ bytes wanted, 0 bytes"):
                samples.fill(writer, pages=100)
        assert _names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- reading what is not as it should be ----


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.touch(), "Not a directory"),
        (lambda path: path.mkdir(), "holds no images"),
        (lambda path: (path.mkdir(), (path / "other.img").touch()), "holds no images"),
    ],
)
def test_a_folder_without_images_is_a_usage_error(tmp_path, make, why):
    make(tmp_path / "images")
    with pytest.raises(UsageError, match=why):
        ImageFolder(tmp_path / "images")


def test_every_missing_file_is_named(images):
    for path in images.iterdir():
        if path.name == "gpurestore.json":
            continue
        moved = path.rename(images.parent / path.name)
        with pytest.raises(ImageError, match=f"images/{path.name}: missing"):
            _read_everything(images)
        moved.rename(path)


def test_every_truncated_or_longer_file_is_named(images):
    for path in images.iterdir():
        data = path.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 2}:
            path.write_bytes(data[:length])
            with pytest.raises(ImageError, match=f"images/{path.name}: (truncated|damaged)"):
                _read_everything(images)
        path.write_bytes(data + b"\0")
        with pytest.raises(ImageError, match=f"images/{path.name}: (too long|damaged)"):
            _read_everything(images)
        path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_any_file_is_found(images):
    for path in images.iterdir():
        data = bytearray(path.read_bytes())
        step = max(1, len(data) // 150)
        for index in range(0, len(data), step):
            data[index] ^= 1 << index % 8
            path.write_bytes(data)
            data[index] ^= 1 << index % 8
            why = samples.refusal(_read_everything, images)
            if why is None:
                assert path.name == "gpurestore.json"  # white space
            else:
                assert why.startswith(f"{images}/{path.name}: ")
        path.write_bytes(data)
    _read_everything(images)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_bytes_in_any_files_of_a_foreign_dump_are_an_image_error_or_valid(images, data):
    samples.like_criu(images)
    name = data.draw(st.sampled_from([n for n in _names(images) if not n.startswith("pages-")]))
    path = images / name
    before = path.read_bytes()
    body = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(body)))
        body[where : where + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=6))
    path.write_bytes(body)
    try:
        why = samples.refusal(_read_everything, images)
    finally:
        path.write_bytes(before)
    assert why is None or why.startswith(str(images))


def test_an_image_that_is_not_of_this_dump_is_named(images):
    (images / "core-1.img").touch()
    with pytest.raises(ImageError, match=r"core-1\.img: not part of this dump"):
        ImageFolder(images)


def test_other_files_may_lie_beside_the_images(images):
    (images / "restore.log").touch()
    (images / "stats-restore").touch()
    with ImageFolder(images) as folder:
        folder.verify()


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(images, kind):
    samples.like_criu(images)
    path = images / "pstree.img"
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    with (
        ImageFolder(images) as folder,
        pytest.raises(ImageError, match=r"pstree\.img: (not a regular|cannot be opened)"),
    ):
        folder.read("pstree")


def test_an_absurdly_large_image_is_refused_unread(images):
    samples.like_criu(images)
    os.truncate(images / "mm-4242.img", 1 << 40)
    with ImageFolder(images) as folder, pytest.raises(ImageError, match="1099511627776 bytes are too many"):
        folder.read("mm", samples.ROOT_PID)


def test_a_dump_of_criu_has_no_manifest(tmp_path):
    samples.like_criu(tmp_path)
    (tmp_path / "dump.log").touch()
    with ImageFolder(tmp_path) as folder:
        assert folder.manifest is None
        folder.verify()


@pytest.mark.parametrize("records", [0, 2])
def test_one_record_is_one_record(tmp_path, records):
    (tmp_path / "inventory.img").write_bytes(
        encode_image(KINDS["inventory"], [build_inventory(samples.ids())] * records)
    )
    with pytest.raises(ImageError, match=rf"inventory\.img: damaged: {records} records instead of one"):
        ImageFolder(tmp_path)


def test_the_chunks_of_a_ghost_file_are_found_and_checked(tmp_path):
    kind = KINDS["ghost-file"]
    head = encode_image(kind, [pb.ghost_file_entry(uid=0, gid=0, mode=0o100600, chunks=True, size=9000)])
    chunks = b""
    for offset, content in ((0, b"abc"), (8192, b"x" * 100)):
        body = pb.ghost_chunk_entry(len=len(content), off=offset).SerializeToString()
        chunks += len(body).to_bytes(4, "little") + body + content
    samples.like_criu(tmp_path)
    path = tmp_path / "ghost-file-2.img"
    path.write_bytes(head + chunks)
    with ImageFolder(tmp_path) as folder:
        _, runs = folder.read_ghost(2)
        assert runs == [GhostRun(len(head) + 8, 0, 3), GhostRun(len(head) + 8 + 3 + 9, 8192, 100)]
        path.write_bytes((head + chunks)[:-1])
        with pytest.raises(ImageError, match="a chunk of 100 bytes, but 99 are left"):
            folder.read_ghost(2)


# ---- checksums ----


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, (1 << 18) - 1])
def test_a_checksum_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch, size):
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(hashing, "_INLINE_BYTES", 0)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        records = [hashing.hash_files(fd, {"file": size}, jobs)["file"] for jobs in (1, 3, 8)]
    finally:
        os.close(fd)
    assert len(set(records)) == 1
    if size <= 1 << 16:
        assert records[0].xxh3_128 == hashing.xxhash.xxh3_128_hexdigest(data)


def test_the_first_failure_of_a_thread_ends_the_others():
    done = []

    def fail():
        raise ImageError("first")

    with pytest.raises(ImageError, match="first"):
        hashing.run_in_threads([fail, *[lambda: done.append(1)] * 1000], 1)
    assert done == []


def test_a_dump_of_ours_without_its_manifest_is_not_taken_for_one_of_criu(tmp_path):
    folder = samples.make(tmp_path / "images")
    (folder / "gpurestore.json").unlink()
    with pytest.raises(ImageError, match=r"gpurestore\.json: missing"):
        ImageFolder(folder)
