"""Writing dump folders: whole or absent, whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from support import image_samples as samples

from gpurestore.errors import CancelledError, GpurestoreError, UsageError
from gpurestore.images import writer as writer_module
from gpurestore.images.folder import ImageFolder
from gpurestore.images.writer import ImageWriter


@pytest.fixture
def images(tmp_path):
    return samples.make(tmp_path / "images")


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
    assert samples.names(tmp_path) == ["images"]


def test_memory_is_for_its_owner_only(images):
    assert stat.S_IMODE(images.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in images.iterdir()} == {0o600}


def test_an_empty_folder_is_taken_with_its_mode(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o750)
    samples.make(tmp_path / "images")
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o750
    assert samples.names(tmp_path) == ["images"]


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    samples.make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    samples.read_everything(tmp_path / "real")


def test_an_exception_leaves_nothing(tmp_path):
    def dump() -> None:
        with ImageWriter(tmp_path / "images") as writer:
            samples.fill(writer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dump()
    assert samples.names(tmp_path) == []


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
    assert samples.names(tmp_path) == ["file", "full"]


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
    assert samples.names(tmp_path) == ["images"]
    assert samples.names(tmp_path / "images") == ["precious"]


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
    assert samples.names(tmp_path) == []


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
    assert samples.names(tmp_path) == []


def test_pages_that_are_not_as_long_as_what_was_summed_are_refused(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        os.pwrite(writer.open_pages("pages-1.img"), b"x", 0)
        writer.summed("pages-1.img", 4096, 0)
        with pytest.raises(GpurestoreError, match=r"pages-1\.img has 1 bytes, and 4096 were written"):
            writer.commit(sync=False)
    assert samples.names(tmp_path) == []


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
            samples.read_everything(path)
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
    assert samples.names(tmp_path) == []


def test_a_living_tools_folder_is_left_alone_and_a_dead_ones_removed(tmp_path):
    first = ImageWriter(tmp_path / "first")
    dead = tmp_path / ".old.gpurestore-0123456789ab"
    dead.mkdir()
    (dead / "pages-1.img").write_bytes(b"x" * 100)
    (tmp_path / ".gpurestore-not-ours").mkdir()
    ImageWriter(tmp_path / "second").abort()
    assert samples.names(tmp_path) == sorted([first.path.name, ".gpurestore-not-ours"])
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
    assert samples.names(tmp_path) == ["images"]
    assert samples.names(tmp_path / "images") == []


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
        assert samples.names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
