"""Files through a whole dump and restore: from a waiting child to staged descriptors of this process."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import stat
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import image_samples
from support.file_child import FileLife

from gpurestore.batch import Call, Data
from gpurestore.core import Cancel
from gpurestore.errors import CancelledError, GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.images.container import encode_image
from gpurestore.images.magic import KINDS
from gpurestore.syscalls import NR
from gpurestore.tasks import fdinfo, filelocks, fs, regfiles
from gpurestore.tasks.descriptors import plan_close_staged, plan_descriptors
from gpurestore.tasks.stagedfiles import StagedFiles


@pytest.fixture
def life(tmp_path: Path) -> Iterator[FileLife]:
    result = FileLife(tmp_path / "images")
    yield result
    result.end()


def table_of(staged: StagedFiles) -> dict[int, int]:
    """Staged descriptor by the number it had."""
    (pid,) = staged.uses.tables
    return {entry.fd: staged.fd_of(entry.id) for entry in staged.entries_of(pid)}


def flags_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_regular_files_come_back_with_position_and_flags(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    plain = os.open(path, os.O_RDONLY)
    append = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CREAT | os.O_TRUNC * 0)
    os.lseek(plain, 4, os.SEEK_SET)
    shared = os.dup(plain)
    folder = life.dump({plain, append, shared})
    now = table_of(life.stage(folder))
    assert os.read(now[plain], 3) == b"456"
    assert now[shared] == now[plain]
    assert flags_of(now[append]) == flags_of(append)
    assert flags_of(now[plain]) == flags_of(plain)
    assert path.read_bytes() == b"0123456789"
    assert min(now.values()) >= 500
    assert not any(os.get_inheritable(fd) for fd in now.values())


def test_an_unlinked_file_comes_back_shared_and_nameless(life: FileLife, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    path = directory / "gone"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o640)
    os.write(fd, b"head")
    os.pwrite(fd, b"tail", 1 << 20)
    other = os.open(path, os.O_RDONLY)
    os.utime(fd, (1000, 2000))
    os.fchmod(fd, 0o604)
    path.unlink()
    folder = life.dump({fd, other})
    os.close(fd)
    os.close(other)
    now = table_of(life.stage(folder))
    assert os.listdir(directory) == []
    assert os.fstat(now[fd]).st_ino == os.fstat(now[other]).st_ino
    assert os.lseek(now[fd], 0, os.SEEK_CUR) == 4
    assert os.pread(now[other], 4, 1 << 20) == b"tail"
    have = os.fstat(now[fd])
    assert (stat.S_IMODE(have.st_mode), have.st_mtime, have.st_nlink, have.st_size) == (0o604, 2000, 0, (1 << 20) + 4)
    assert have.st_blocks * 512 < 1 << 20
    os.pwrite(now[fd], b"HEAD", 0)
    assert os.pread(now[other], 4, 0) == b"HEAD"
    with pytest.raises(OSError, match="Bad file"):
        os.write(now[other], b"x")


def test_pipes_come_back_with_data_size_and_ends(life: FileLife) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 18)
    os.write(writer, b"x" * 100_000)
    os.set_blocking(reader, False)
    folder = life.dump({reader, writer})
    os.close(reader)
    os.close(writer)
    staged = life.stage(folder)
    now = table_of(staged)
    assert fcntl.fcntl(now[reader], fcntl.F_GETPIPE_SZ) == 1 << 18
    assert flags_of(now[reader]) == os.O_NONBLOCK
    assert flags_of(now[writer]) == os.O_WRONLY
    assert os.read(now[reader], 1 << 20) == b"x" * 100_000
    os.write(now[writer], b"more")
    assert os.read(now[reader], 1 << 20) == b"more"


def test_a_pipe_without_writer_ends_when_its_data_does(life: FileLife) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"last words")
    os.close(writer)
    folder = life.dump({reader})
    now = table_of(life.stage(folder))
    assert os.read(now[reader], 100) == b"last words"
    assert os.read(now[reader], 100) == b""
    os.close(reader)


def test_packets_come_back_as_packets(life: FileLife) -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    for packet in (b"one", b"two", b"a third"):
        os.write(writer, packet)
    folder = life.dump({reader, writer})
    now = table_of(life.stage(folder))
    assert [os.read(now[reader], 100) for _ in range(3)] == [b"one", b"two", b"a third"]
    assert flags_of(now[writer]) == flags_of(writer)
    os.close(reader)
    os.close(writer)


def test_fifos_come_back_with_their_data(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, b"through a name")
    folder = life.dump({reader, writer})
    os.close(reader)
    os.close(writer)
    now = table_of(life.stage(folder))
    assert os.read(now[reader], 100) == b"through a name"
    os.write(now[writer], b"x")
    pending = array.array("i", [0])
    fcntl.ioctl(now[reader], termios.FIONREAD, pending)
    assert pending[0] == 1


def test_a_removed_fifo_comes_back(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, b"data")
    path.unlink()
    folder = life.dump({reader, writer})
    now = table_of(life.stage(folder))
    assert os.read(now[reader], 100) == b"data"
    assert not path.exists()
    os.close(reader)
    os.close(writer)


def test_eventfds_come_back(life: FileLife) -> None:
    fd = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    folder = life.dump({fd})
    now = table_of(life.stage(folder))
    assert [os.eventfd_read(now[fd]) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(now[fd])
    os.close(fd)


def test_the_content_of_a_memfd_can_be_cancelled_and_leaves_nothing_open(life: FileLife) -> None:
    fd = os.memfd_create("large")
    os.write(fd, b"x" * (1 << 20))
    folder = life.dump({fd})
    os.close(fd)
    cancel = Cancel()
    staged = StagedFiles(folder, cancel=cancel)
    cancel.set()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CancelledError):
        staged.open_all(500)
    assert set(os.listdir("/proc/self/fd")) == before


def test_memfds_come_back_with_content_and_seals(life: FileLife) -> None:
    fd = os.memfd_create("scratch", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"content", 70_000)
    os.lseek(fd, 7, os.SEEK_SET)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    future_write = 0x10
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | future_write)
    folder = life.dump({fd, again})
    staged = life.stage(folder)
    now = table_of(staged)
    assert os.readlink(f"/proc/self/fd/{now[fd]}") == "/memfd:scratch (deleted)"
    assert os.pread(now[again], 7, 70_000) == b"content"
    assert os.lseek(now[fd], 0, os.SEEK_CUR) == 7
    with mmap.mmap(now[fd], 1 << 20) as mapped:
        staged.seal()
        mapped[0:1] = b"!"
    assert fcntl.fcntl(now[again], fcntl.F_GET_SEALS) == fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    with pytest.raises(PermissionError):
        os.pwrite(now[fd], b"x", 0)
    os.close(fd)
    os.close(again)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="/dev/shm cannot be written")
def test_shared_memory_files_are_put_back_when_missing_or_changed(life: FileLife) -> None:
    path = Path(f"/dev/shm/gpurestore-test-{os.getpid()}")
    try:
        path.write_bytes(bytes(8192) + b"shared" + bytes(8192))
        fd = os.open(path, os.O_RDWR)
        folder = life.dump({fd})
        os.close(fd)
        before = path.read_bytes()
        inode = path.stat().st_ino

        life.stage(folder).close()
        assert path.stat().st_ino == inode

        path.write_bytes(b"changed")
        life.stage(folder).close()
        assert path.read_bytes() == before

        path.unlink()
        life.stage(folder).close()
        assert path.read_bytes() == before

        path.unlink()
        staged = StagedFiles(folder)
        staged.open_all(500)
        staged.abort()
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_character_devices_and_directories_come_back(life: FileLife, tmp_path: Path) -> None:
    null, zero = os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDONLY)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    handle = os.open(tmp_path, os.O_PATH)
    folder = life.dump({null, zero, directory, handle})
    now = table_of(life.stage(folder))
    assert os.read(now[zero], 2) == b"\0\0"
    assert os.fstat(now[null]).st_rdev == os.makedev(1, 3)
    assert os.path.samestat(os.fstat(now[directory]), tmp_path.stat())
    assert flags_of(now[handle]) == flags_of(handle)


def test_flock_is_taken_again_and_a_foreign_one_ends_the_restore(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    folder = life.dump({fd})
    with pytest.raises(GpurestoreError, match="cannot lock"):
        life.stage(folder)
    os.close(fd)
    life.stage(folder)
    with open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_everything_that_changed_is_found_at_once(life: FileLife, tmp_path: Path) -> None:
    longer, missing, other = tmp_path / "longer", tmp_path / "missing", tmp_path / "other"
    fds = set()
    for path in (longer, missing, other):
        path.write_bytes(b"content")
        fds.add(os.open(path, os.O_RDONLY))
    folder = life.dump(fds)
    longer.write_bytes(b"more content")
    missing.unlink()
    other.unlink()
    os.mkfifo(other)
    text = "; ".join(map(str, StagedFiles(folder).check()))
    assert "longer: has 12 bytes and had 7" in text
    assert "missing: No such file" in text
    assert "other: is a FIFO now and was a regular file" in text


def test_a_log_that_grew_is_no_obstacle(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"line\n")
    folder = life.dump({fd})
    os.write(fd, b"another\n")
    life.stage(folder)
    os.close(fd)


def test_numbers_can_be_planned_without_opening_anything(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDONLY)
    staged = StagedFiles(life.dump({fd}))
    staged.assign(900)
    before = len(os.listdir("/proc/self/fd"))
    (pid,) = staged.uses.tables
    calls = plan_descriptors(staged.entries_of(pid), staged.fd_of, 900)
    assert before == len(os.listdir("/proc/self/fd"))
    assert any(call.nr == NR.DUP3 and call.args[:2] == (table_of(staged)[fd], fd) for call in calls)
    fs_calls = fs.plan(staged.uses.fs_of(pid), staged.fd_of, staged.is_our_root)
    assert [call.nr for call in fs_calls] == [NR.FCHDIR, NR.UMASK]
    os.close(fd)


def entry(fd: int, ident: int = 1, flags: int = 0) -> pb.fdinfo_entry:
    return pb.fdinfo_entry(id=ident, flags=flags, type=pb.REG, fd=fd)


def test_plans_move_staged_descriptors_and_close_all_others() -> None:
    calls = plan_descriptors([entry(5, 2, 1), entry(0)], lambda ident: 100 + ident, 100)
    assert [(call.nr, call.args) for call in calls] == [
        (NR.DUP3, (101, 0, 0)),
        (NR.CLOSE_RANGE, (1, 4, 0)),
        (NR.DUP3, (102, 5, os.O_CLOEXEC)),
        (NR.CLOSE_RANGE, (6, 99, 0)),
    ]
    assert plan_descriptors([], lambda ident: 0, 3) == [Call(NR.CLOSE_RANGE, (0, 2, 0), "close descriptors 0 to 2")]
    (last,) = plan_close_staged(100)
    assert last.args == (100, (1 << 32) - 1, 0)


@pytest.mark.parametrize("fds", [(4, 4), (100,), (99, 1 << 31)])
def test_impossible_descriptor_numbers_are_image_errors(fds: tuple[int, ...]) -> None:
    with pytest.raises(ImageError):
        plan_descriptors([entry(fd) for fd in fds], lambda ident: 200, 100)


@pytest.mark.parametrize("name", ["relative", "", "/a/../b", "/x\0y", "/" + "n" * 300, "/a" * 3000])
def test_paths_from_images_are_not_trusted(name: str) -> None:
    fown = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    with pytest.raises(ImageError):
        regfiles.safe_name(pb.reg_file_entry(id=1, flags=0, pos=0, fown=fown, name=name))


def test_nothing_is_created_or_cut_by_opening() -> None:
    flags = regfiles.open_flags(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_RDWR | os.O_APPEND | os.O_TMPFILE)
    assert flags == os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY


def test_posix_locks_and_signal_owners_are_left_to_the_task(life: FileLife, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETSIG, 12)
    fcntl.fcntl(fd, fdinfo.F_SETOWN_EX, struct.pack("=ii", 1, os.getpid()))
    folder = life.dump({fd})
    os.close(fd)
    staged = life.stage(folder)
    (pid,) = staged.uses.tables
    calls = staged.plan_late(pid)
    assert [call.nr for call in calls] == [NR.FCNTL] * 2
    assert [call.args[:2] for call in calls] == [(fd, fcntl.F_SETSIG), (fd, fdinfo.F_SETOWN_EX)]
    assert calls[1].args[2] == Data(struct.pack("=ii", 1, os.getpid()))

    lock = pb.file_lock_entry(flag=filelocks.FL_POSIX, type=1, pid=7, fd=3, start=10, len=5)
    (call,) = filelocks.plan([lock], 7)
    assert call.args == (3, 6, Data(struct.pack("=hhxxxxqqixxxx", 1, 0, 10, 5, 0)))
    assert filelocks.plan([lock], 8) == []


def test_the_way_to_another_root_is_planned() -> None:
    entry = pb.fs_entry(cwd_id=1, root_id=2, umask=0o27)
    calls = fs.plan(entry, lambda ident: 100 + ident, lambda ident: False)
    assert [(call.nr, call.args[0]) for call in calls] == [
        (NR.FCHDIR, 102),
        (NR.CHROOT, Data(b".\0")),
        (NR.FCHDIR, 101),
        (NR.UMASK, 0o27),
    ]


def test_a_damaged_ghost_is_named(life: FileLife, tmp_path: Path) -> None:
    path = tmp_path / "gone"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x" * 20_000)
    path.unlink()
    folder = life.dump({fd})
    os.close(fd)
    os.truncate(life.path / "ghost-file-1.img", 15_000)
    with pytest.raises(ImageError, match=r"ghost-file-1\.img"):
        StagedFiles(folder).check()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_numbers_in_an_image_it_is_an_error_or_a_stage(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("life")
    (path / "file").write_bytes(b"content")
    life = FileLife(path / "images")
    try:
        entries = some_of_each_kind(life, path / "file")
        twist_a_number(data, data.draw(st.sampled_from(entries)))
        image_samples.like_criu(life.path)  # there is no manifest that would notice
        (life.path / "files.img").write_bytes(encode_image(KINDS["files"], entries))
        try:
            staged = StagedFiles(life.open())
            if staged.check():
                return
            staged.open_all(500)
        except GpurestoreError:
            return
        (pid,) = staged.uses.tables
        try:
            staged.plan_late(pid)
        except ImageError:
            pass
        staged.close()
    finally:
        life.end()


def some_of_each_kind(life: FileLife, path: Path) -> list[pb.file_entry]:
    reader, writer = os.pipe()
    fds = {os.open(path, os.O_RDONLY), reader, writer, os.eventfd(0), os.memfd_create("m")}
    try:
        return life.dump(fds).read("files")
    finally:
        for fd in fds:
            os.close(fd)


def twist_a_number(data, entry: pb.file_entry) -> None:
    names = ("flags", "pos", "pipe_id", "counter", "inode_id", "mode", "size")
    (body,) = [value for field, value in entry.ListFields() if field.message_type is not None]
    chosen = data.draw(st.sampled_from([field for field in body.DESCRIPTOR.fields if field.name in names]))
    bits = 32 if chosen.cpp_type == chosen.CPPTYPE_UINT32 else 64
    setattr(body, chosen.name, data.draw(st.integers(0, (1 << bits) - 1)))
    body.fown.pid = data.draw(st.sampled_from([0, 1, (1 << 32) - 1]))
