"""What a dump sees of files, tried on a forked child that only waits."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.file_child import FileChild

from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.tasks import fdinfo, fs, ids, maps, mounts, regfiles
from gpurestore.tasks.descriptors import FileTable
from gpurestore.tasks.filefacts import FileFacts, PipeOwner


@pytest.fixture
def fork() -> Iterator[Callable[[set[int]], FileChild]]:
    children: list[FileChild] = []

    def make(keep: set[int]) -> FileChild:
        children.append(FileChild.start(keep))
        return children[-1]

    yield make
    for child in children:
        child.end()


class Writer:
    """Takes what an ImageWriter would take."""

    def __init__(self) -> None:
        self.images: dict[str, list] = {}
        self.payloads: dict[str, list[bytes]] = {}
        self.extension: dict = {}
        self.raw: dict[str, int] = {}

    def write(self, kind, messages, ident=None, payloads=()):
        self.images[kind] = list(messages)
        self.payloads[kind] = [bytes(p) for p in payloads]

    def open_image(self, kind, messages, ident=None):
        fd = os.memfd_create(kind)
        self.raw[f"{kind}-{ident}"] = fd
        return fd


def dump(children: list[FileChild]) -> tuple[FileTable, list[list[pb.fdinfo_entry]], list[Finding]]:
    findings: list[Finding] = []
    table = FileTable(findings)
    entries = [table.add_descriptors(child) for child in children]
    table.finish()
    return table, entries, findings


def written(table: FileTable) -> Writer:
    writer = Writer()
    table.write(writer, lambda shmid, fd, size: None)
    table.close()
    return writer


def test_duplicates_share_an_id_and_separate_opens_do_not(fork, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    one = os.open(path, os.O_RDONLY)
    two = os.dup(one)
    other = os.open(path, os.O_RDONLY)
    first, second = fork({one, two, other}), fork({two})
    table, (entries, more), findings = dump([first, second])
    table.close()
    by_fd = {entry.fd: entry.id for entry in entries}
    assert not findings
    assert by_fd[one] == by_fd[two] == more[0].id
    assert by_fd[other] != by_fd[one]
    for fd in (one, two, other):
        os.close(fd)


def test_position_flags_and_close_on_exec_are_recorded(fork, tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o640)
    os.write(fd, b"x" * 100)
    os.lseek(fd, 42, os.SEEK_SET)
    os.set_inheritable(fd, False)
    table, (entries,), findings = dump([fork({fd})])
    writer = written(table)
    assert not findings
    entry = writer.images["files"][0].reg
    assert (entry.name, entry.pos, entry.size) == (str(path), 42, 100)
    assert entry.flags & os.O_APPEND
    assert not entry.flags & os.O_CLOEXEC
    assert entries[0].flags == 1
    os.close(fd)


def test_a_pipe_inside_the_tree_is_carried_with_its_data_unconsumed(fork) -> None:
    reader, writer_end = os.pipe()
    fcntl.fcntl(writer_end, fcntl.F_SETPIPE_SZ, 1 << 16)
    os.write(writer_end, b"in flight")
    child = fork({reader, writer_end})
    table, (entries,), findings = dump([child])
    writer = written(table)
    assert not findings
    assert {entry.type for entry in entries} == {pb.PIPE}
    assert writer.payloads["pipes-data"] == [b"in flight"]
    assert writer.images["pipes-data"][0].size == 1 << 16
    assert os.read(reader, 100) == b"in flight"
    os.close(reader)
    os.close(writer_end)


def test_packets_keep_their_bounds(fork) -> None:
    reader, writer_end = os.pipe2(os.O_DIRECT)
    os.write(writer_end, b"one")
    os.write(writer_end, b"three")
    table, _, findings = dump([fork({reader, writer_end})])
    writer = written(table)
    assert not findings
    assert list(writer.extension["files"]["packets"].values()) == [[3, 5]]
    os.close(reader)
    os.close(writer_end)


def test_a_pipe_whose_other_end_is_outside_is_a_finding(fork) -> None:
    reader, writer_end = os.pipe()
    table, _, findings = dump([fork({writer_end})])
    table.close()
    assert [finding.why.split(" (")[0] for finding in findings] == [
        "its reading end is held by a process outside the tree"
    ]
    os.close(reader)
    os.close(writer_end)


def test_a_pipe_whose_other_end_is_closed_is_carried(fork) -> None:
    reader, writer_end = os.pipe()
    child = fork({writer_end})
    os.close(reader)
    table, _, findings = dump([child])
    table.close()
    assert not findings
    os.close(writer_end)


def test_eventfd_counter_and_semaphore_are_recorded(fork) -> None:
    fd = os.eventfd(17, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    table, (entries,), findings = dump([fork({fd})])
    writer = written(table)
    assert not findings
    assert writer.images["files"][0].efd.counter == 17
    assert writer.extension["files"]["semaphores"] == [entries[0].id]
    os.close(fd)


def test_an_unlinked_file_becomes_a_ghost_even_if_its_name_is_taken_again(fork, tmp_path: Path) -> None:
    path = tmp_path / "gone"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    path.unlink()
    path.write_bytes(b"somebody else's")
    table, (entries,), findings = dump([fork({fd})])
    writer = written(table)
    assert not findings
    assert writer.images["files"][0].reg.name == str(path)
    assert writer.images["remap-fpath"][0].orig_id == entries[0].id
    os.close(fd)


def test_a_file_linked_to_its_final_name_is_found_there(fork, tmp_path: Path) -> None:
    temporary, final = tmp_path / "temporary", tmp_path / "final"
    fd = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o600)
    os.link(temporary, final)
    temporary.unlink()
    table, _, findings = dump([fork({fd})])
    writer = written(table)
    assert not findings
    assert writer.images["files"][0].reg.name == str(final)
    os.close(fd)


def test_memfds_are_recorded_by_inode(fork) -> None:
    fd = os.memfd_create("scratch", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    table, _, findings = dump([fork({fd, again})])
    writer = written(table)
    assert not findings
    (inode,) = writer.images["memfd"]
    assert (inode.name, inode.size, inode.seals) == ("scratch", 8192, 0x2)
    assert [entry.memfd.inode_id for entry in writer.images["files"]] == [1, 1]
    os.close(fd)
    os.close(again)


def test_locks_are_recorded_once(fork, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    again = os.dup(fd)
    table, _, findings = dump([fork({fd, again})])
    writer = written(table)
    assert not findings
    (lock,) = writer.images["filelocks"]
    assert (lock.flag, lock.type, lock.start, lock.len) == (2, 1, 0, 0)
    os.close(fd)
    os.close(again)


def test_everything_else_is_named_with_a_reason(fork, tmp_path: Path) -> None:
    import select

    first, second = socket.socketpair()
    poll = select.epoll()
    status = os.open("/proc/self/status", os.O_RDONLY)
    pidfd = os.pidfd_open(os.getpid())
    keep = {first.fileno(), second.fileno(), poll.fileno(), status, pidfd}
    table, (entries,), findings = dump([fork(keep)])
    table.close()
    assert entries == []
    text = "; ".join(str(finding) for finding in findings)
    for word in ("unix socket", "epoll set", "/status", "pidfd"):
        assert word in text
    assert len(findings) == len(keep)
    for fd in (status, pidfd):
        os.close(fd)
    for item in (first, second, poll):
        item.close()


def test_a_removed_directory_is_a_finding(fork, tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    directory.rmdir()
    table, _, findings = dump([fork({fd})])
    table.close()
    assert "removed directory" in str(findings[0])
    os.close(fd)


def test_program_directories_and_umask_of_a_task(fork) -> None:
    old = os.umask(0o027)
    try:
        child = fork(set())
    finally:
        os.umask(old)
    findings: list[Finding] = []
    table = FileTable(findings)
    entry = fs.collect(child, table)
    exe = table.add_exe(child)
    writer = written(table)
    names = {item.id: item.reg.name for item in writer.images["files"]}
    assert not findings
    assert (names[entry.cwd_id], names[entry.root_id], entry.umask) == (os.getcwd(), "/", 0o027)
    assert names[exe] == os.readlink("/proc/self/exe")


def test_mapped_libraries_get_one_entry_with_their_build_id(fork) -> None:
    child = fork(set())
    findings: list[Finding] = []
    table = FileTable(findings)
    libc = [vma for vma in maps.read(child.pid) if "/libc.so" in vma.path]
    numbers = {table.add_mapping(child, vma) for vma in libc}
    writer = written(table)
    assert not findings
    assert len(libc) > 1
    assert len(numbers) == 1
    assert len(writer.images["files"][0].reg.build_id) == 5


def test_ids_of_separate_processes_differ_and_shared_tables_are_findings(fork) -> None:
    one, two = fork(set()), fork(set())
    findings: list[Finding] = []
    entries = ids.collect([one, two], findings)
    assert not findings
    assert entries[one.pid].files_id != entries[two.pid].files_id
    assert entries[one.pid].net_ns_id == ids.root_ids().net_ns_id

    ids.collect([one, two], findings, lambda a, b, kind: 0 if kind == ids.KCMP_FILES else 1)
    assert [finding.what for finding in findings] == ["descriptor table (CLONE_FILES)"]


def test_fdinfo_text_is_parsed() -> None:
    lock = "lock:\t1: POSIX  ADVISORY  READ 7 fe:00:5 3 9\n"
    text = "pos:\t18446744073709551615\nflags:\t02100001\nmnt_id:\t27\nino:\t5\n" + lock
    info = fdinfo.parse(text)
    assert (info.pos, info.flags, info.cloexec) == ((1 << 64) - 1, os.O_WRONLY | 0o100000, True)
    assert info.locks == (fdinfo.LockLine("POSIX", False, 7, 3, 9),)
    with pytest.raises(ValueError, match="fdinfo without"):
        fdinfo.parse("nothing here")


def test_mountinfo_text_is_parsed() -> None:
    text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
    (mount,) = mounts.parse(text).values()
    assert (mount.mnt_id, mount.mountpoint, mount.fs_type) == (36, "/mnt 2", "ext3")


def test_build_ids_survive_any_bytes() -> None:
    head = Path(os.readlink("/proc/self/exe")).read_bytes()[: 1 << 16]
    for cut in range(0, 4096, 7):
        regfiles.parse_build_id(head[:cut])
    for at in range(0, 1024, 3):
        regfiles.parse_build_id(head[:at] + b"\xff\xff\xff\xff" + head[at + 4 :])


@pytest.mark.parametrize("may_open", [True, False])
def test_a_removed_file_that_is_only_mapped_is_carried(fork, tmp_path: Path, monkeypatch, may_open: bool) -> None:
    path = tmp_path / "semaphore"
    path.write_bytes(b"shared state".ljust(5000, b"."))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 5000)
    path.unlink()
    child = fork(set())
    mapped.close()
    if not may_open:
        real_open = os.open

        def refusing(name, *args, **kwargs):
            if "map_files" in str(name):
                raise PermissionError(1, "Operation not permitted")
            return real_open(name, *args, **kwargs)

        monkeypatch.setattr(os, "open", refusing)
    (vma,) = [vma for vma in maps.read(child.pid) if vma.path == str(path)]
    findings: list[Finding] = []
    table = FileTable(findings)
    file_id = table.add_mapping(child, vma)
    table.finish()
    writer = written(table)
    assert not findings
    assert writer.images["files"][0].reg.flags == os.O_RDWR
    (remap,) = writer.images["remap-fpath"]
    assert (remap.orig_id, remap.remap_type) == (file_id, pb.GHOST)
    image = writer.raw[f"ghost-file-{remap.remap_id}"]
    assert b"shared state...." in os.pread(image, 100, 0)
    assert os.fstat(image).st_size in (5000, 8192)  # whole pages where only the mapping shows it


@pytest.mark.parametrize(
    "value", [[], {"rdev": 3}, {"rdev": {"x": 1}}, {"pipes": {"1": {"uid": -1}}}, {"packets": {"1": "a"}}]
)
def test_facts_from_a_manifest_are_not_trusted(value: object) -> None:
    with pytest.raises(ImageError):
        FileFacts.from_json(value)


def test_facts_survive_the_way_through_a_manifest() -> None:
    facts = FileFacts([3], {1: 2}, {4: 5}, {6: PipeOwner(7, 8, 0o600)}, {9: [1, 2]})
    assert FileFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert FileFacts.from_json(None) == FileFacts()
