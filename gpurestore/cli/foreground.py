"""Standing in front of a restored tree: signals are passed on, and the root task's exit status becomes ours."""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from types import FrameType

# What a shell, a scheduler or a person sends to a job. Not in it: what the kernel sends for our own faults, SIGCHLD,
# and SIGPIPE, which Python ignores. SIGTTIN and SIGTTOU concern only who reads the terminal: ourselves.
PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGTERM,
    signal.SIGCONT,
    signal.SIGTSTP,
    signal.SIGURG,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGWINCH,
    signal.SIGPWR,
    *(signal.Signals(n) if n in signal.Signals._value2member_map_ else n for n in range(35, 65)),
)


class Foreground:
    """A context in which signals to us are collected, to be passed on to the tree once it runs.

    For the main thread. Handlers of the time before come back at the end.
    """

    def __init__(self) -> None:
        self._arrived: deque[int] = deque()
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Foreground:
        for number in (*PASSED_ON, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._arrived.append(number)

    def follow(self, root_pid: int) -> int:
        """Pass signals on until our child ``root_pid`` ends; return its exit status.

        If a signal ended it, end ourselves by the same signal, so that our parent sees what happened. When the root
        task is stopped we stop too, as a shell expects of a job, and wake it when we are woken.
        """
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A signal may be caught by any of our threads; the pipe wakes this one.
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            while True:
                while self._arrived:
                    _send(root_pid, self._arrived.popleft())
                status = os.waitid(os.P_PID, root_pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
                if status is None:
                    select.select([reader], [], [])
                    _drain(reader)
                elif status.si_code == os.CLD_EXITED:
                    return status.si_status
                elif status.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    return self._end_by(status.si_status)
                elif status.si_code == os.CLD_STOPPED:
                    os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)

    def _end_by(self, number: int) -> int:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        return 128 + number  # reached by pid 1 of a namespace, which no signal of its own ends


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended: the next wait says how


def _drain(reader: int) -> None:
    try:
        while os.read(reader, 4096):
            pass
    except BlockingIOError:
        pass
