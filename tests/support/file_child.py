"""A forked child with chosen descriptors, which stands for a frozen task; how they are dumped, and staged again."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpurestore.errors import Finding, GpurestoreError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.inventory import build_inventory
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import fs, memory
from gpurestore.tasks.descriptors import FileTable
from gpurestore.tasks.stagedfiles import StagedFiles


@dataclass
class FileChild:
    """The child. It waits until it is ended."""

    pid: int
    pidfd: int
    zombie: bool = False
    threads: tuple[int, ...] = ()

    @classmethod
    def start(cls, keep: set[int]) -> FileChild:
        """Fork; it has exactly the descriptors ``keep`` when this returns."""
        pid = os.fork()
        if pid == 0:
            try:
                for name in os.listdir("/proc/self/fd"):
                    if int(name) not in keep:
                        try:
                            os.close(int(name))
                        except OSError:
                            pass  # the one that listed the folder
                signal.pause()
            finally:
                os._exit(0)
        child = cls(pid, os.pidfd_open(pid))
        while {int(name) for name in os.listdir(f"/proc/{pid}/fd")} != keep:
            os.sched_yield()
        return child

    def read_memory(self, address: int, size: int) -> bytes:
        """As of a frozen task."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as mem:
            try:
                data = os.pread(mem.fileno(), size, address)
            except OSError as error:
                raise GpurestoreError(str(error)) from error
        if len(data) != size:
            raise GpurestoreError("short")
        return data

    def end(self) -> None:
        """Kill and reap it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


@dataclass
class FileLife:
    """Dumps descriptors of a child into the folder ``path``, ends the child, and stages what the folder holds."""

    path: Path
    staged: list[StagedFiles] = field(default_factory=list)
    folders: list[ImageFolder] = field(default_factory=list)

    def dump(self, keep: set[int]) -> ImageFolder:
        """A child with the descriptors ``keep`` as images."""
        child = FileChild.start(keep)
        try:
            self._write(child)
        finally:
            child.end()
        return self.open()

    def _write(self, child: FileChild) -> None:
        findings: list[Finding] = []
        table = FileTable(findings)
        try:
            entries = table.add_descriptors(child)
            mm = pb.mm_entry(exe_file_id=table.add_exe(child))
            for name in (
                "start_code end_code start_data end_data start_stack start_brk brk arg_start arg_end env_start env_end"
            ).split():
                setattr(mm, f"mm_{name}", 0)
            fs_entry = fs.collect(child, table)
            table.finish()
            assert findings == []
            with ImageWriter(self.path) as writer:
                table.write(writer, self._saver(writer))
                ids = pb.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1)
                writer.write("inventory", [build_inventory(ids)])
                writer.write("ids", [ids], child.pid)
                writer.write("pstree", [pb.pstree_entry(pid=child.pid, ppid=0, pgid=1, sid=1, threads=[child.pid])])
                writer.write("mm", [mm], child.pid)
                writer.write("fs", [fs_entry], child.pid)
                writer.write("fdinfo", entries, 1)
                writer.commit(sync=False)
        finally:
            table.close()

    @staticmethod
    def _saver(writer: ImageWriter) -> Callable[[int, int, int], None]:
        pages_ids = itertools.count(1)

        def save(shmid: int, fd: int, size: int) -> None:
            memory.save_object(writer, shmid, fd, size, next(pages_ids))

        return save

    def open(self) -> ImageFolder:
        """The images, until the end of the test."""
        self.folders.append(ImageFolder(self.path))
        return self.folders[-1]

    def stage(self, folder: ImageFolder) -> StagedFiles:
        """What a restore opens, from descriptor 500 on."""
        staged = StagedFiles(folder)
        assert staged.check() == []
        self.staged.append(staged)
        staged.open_all(500)
        return staged

    def end(self) -> None:
        """Close everything."""
        for staged in self.staged:
            staged.close()
        for folder in self.folders:
            folder.close()
