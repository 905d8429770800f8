"""A victim in Python: everything that a tree holds through files, locks and shared memory, in two processes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Event, Semaphore, SimpleQueue
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

FOLDER = Path(sys.argv[1])
SEALS = 0x1 | 0x2 | 0x4 | 0x10  # seal, shrink, grow, future write


def expect(what: str, good: object) -> None:
    if not good:
        with open(FOLDER / "wrong", "a") as file:
            file.write(f"pid {os.getpid()}: {what}\n")


def is_refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES, errno.EPERM)
    return False


def in_a_fork(action: Callable[[], object]) -> bool:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if action() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Held:
    """The state: made before the fork, so that both processes share it."""

    def __init__(self) -> None:
        self.locked = os.open(FOLDER / "locked", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self.locked, fcntl.LOCK_EX)
        self.record = os.open(FOLDER / "record", os.O_CREAT | os.O_RDWR)
        fcntl.lockf(self.record, fcntl.LOCK_EX, 5, 10)
        os.mkfifo(FOLDER / "fifo")
        self.owned = os.open(FOLDER / "fifo", os.O_RDWR)
        fcntl.fcntl(self.owned, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self.owned, fcntl.F_SETSIG, signal.SIGUSR2)
        self.semaphore, self.event, self.queue = Semaphore(3), Event(), SimpleQueue()
        self.semaphore.acquire()
        self.queue.put({"in": "flight"})
        self.shared = SharedMemory(create=True, size=100_000, name=f"gpurestore-held-{os.getpid()}")
        self.shared.buf[5000:5004] = b"abcd"
        self.reader, self.writer = os.pipe2(os.O_DIRECT)
        os.write(self.writer, b"one")
        os.write(self.writer, b"three")
        self.position = os.open(FOLDER / "position", os.O_CREAT | os.O_RDWR)
        os.write(self.position, b"0123456789")
        self.sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.sealed, 4096)
        self.memory = mmap.mmap(self.sealed, 4096)
        self.memory[:5] = b"hello"
        fcntl.fcntl(self.sealed, fcntl.F_ADD_SEALS, SEALS)
        self.nameless = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)
        os.write(self.nameless, b"nameless")
        os.chdir(FOLDER)
        os.umask(0o037)

    def check_parent(self, child: int) -> None:
        def lock_whole() -> None:
            fcntl.flock(os.open(FOLDER / "locked", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)

        def lock_record() -> None:
            fcntl.lockf(os.open(FOLDER / "record", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)

        expect("flock", in_a_fork(lambda: is_refused(lock_whole)))
        expect("record lock", in_a_fork(lambda: is_refused(lock_record)))
        expect("owner", fcntl.fcntl(self.owned, fcntl.F_GETOWN) == os.getpid())
        expect("signal", fcntl.fcntl(self.owned, fcntl.F_GETSIG) == signal.SIGUSR2)
        expect("semaphore", self.semaphore.get_value() == 2)
        self.semaphore.acquire()
        expect("shared memory", bytes(self.shared.buf[5000:5004]) == b"abcd")
        self.shared.buf[6000:6002] = b"xy"
        expect("queue", self.queue.get() == {"in": "flight"})
        expect("packets", [os.read(self.reader, 9), os.read(self.reader, 9)] == [b"one", b"three"])
        os.lseek(self.position, 7, os.SEEK_SET)
        self.memory[:5] = b"HELLO"
        expect("seals", fcntl.fcntl(self.sealed, fcntl.F_GET_SEALS) == SEALS)
        expect("future writes", is_refused(lambda: mmap.mmap(self.sealed, 4096)))
        os.link(f"/proc/self/fd/{self.nameless}", "named", src_dir_fd=os.open("/", os.O_PATH))
        expect("nameless file", Path("named").read_bytes() == b"nameless")
        expect("working directory", Path.cwd() == FOLDER)
        self.event.set()
        expect("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)
        self.shared.close()
        self.shared.unlink()

    def check_child(self) -> None:
        expect("event", self.event.wait(60))
        expect("shared position", os.lseek(self.position, 0, os.SEEK_CUR) == 7)
        expect("semaphore", self.semaphore.get_value() == 1)
        expect("shared memory", bytes(self.shared.buf[6000:6002]) == b"xy")
        expect("memfd", self.memory[:5] == b"HELLO")
        expect("umask", os.umask(0) == 0o037)


def put(name: str, content: bytes) -> None:
    (FOLDER / f"{name}.new").write_bytes(content)
    (FOLDER / f"{name}.new").rename(FOLDER / name)


def main() -> int:
    held = Held()
    child = os.fork()
    if child == 0:
        try:
            held.check_child()
        except BaseException:
            expect(traceback.format_exc(), False)
        os._exit(0)
    put("ready", b"ready\n")
    beats = 0
    while not (FOLDER / "go").exists():
        beats += 1
        with open(FOLDER / "beats", "r+b" if beats > 1 else "wb") as file:
            file.write(struct.pack("=Q", beats))
        time.sleep(0.02)
    try:
        held.check_parent(child)
    except BaseException:
        expect(traceback.format_exc(), False)
    wrong = FOLDER / "wrong"
    text = wrong.read_bytes() if wrong.exists() else b"ok\n"
    put("verdict", text)
    return 0 if text == b"ok\n" else 1


if __name__ == "__main__":
    sys.exit(main())
