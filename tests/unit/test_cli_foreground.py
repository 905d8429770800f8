"""Standing in front of a tree: signals go through, and the exit status is the tree's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import state, wait_until

CHILD = """
import os, signal, sys, time
def note(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM: os._exit(7)
    if number == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGHUP)
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP): signal.signal(s, note)
os.setsid()  # what is sent to our group must come through the parent
print("ready", flush=True)
while True: time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, os
from gpurestore.cli.foreground import Foreground
with Foreground() as foreground:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", {CHILD!r}], os.environ)
    sys.exit(foreground.follow(pid))
"""


@pytest.fixture
def front() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_signals_are_passed_on_and_the_exit_code_comes_back(front: subprocess.Popen[str]) -> None:
    for number in (signal.SIGUSR1, signal.SIGINT):
        front.send_signal(number)
        assert line(front) == f"got {number.name}\n"
    front.send_signal(signal.SIGTERM)
    assert line(front) == "got SIGTERM\n"
    assert front.wait() == 7


def test_a_tree_that_a_signal_ends_ends_us_by_the_same_signal(front: subprocess.Popen[str]) -> None:
    front.send_signal(signal.SIGHUP)
    assert front.wait() == -signal.SIGHUP


def test_a_tree_that_is_killed_shows_as_killed(front: subprocess.Popen[str]) -> None:
    os.kill(child_of(front.pid), signal.SIGKILL)
    assert front.wait() == -signal.SIGKILL


def test_we_stop_with_the_tree_and_wake_it_when_woken(front: subprocess.Popen[str]) -> None:
    child = child_of(front.pid)
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: state(front.pid) == "T", "we are stopped")
    front.send_signal(signal.SIGCONT)
    wait_until(lambda: state(child) in ("S", "R"), "the tree runs")
    front.send_signal(signal.SIGTERM)
    assert front.wait() == 7


def test_a_signal_that_came_before_the_tree_was_there_is_not_lost() -> None:
    script = PARENT.replace("    pid =", "    os.kill(os.getpid(), signal.SIGUSR1)\n    pid =")
    script = script.replace("import subprocess", "import signal, subprocess")
    # Only a tree that has its handlers can say what it got.
    script = script.replace("    sys.exit", "    sys.stdin.readline()\n    sys.exit")
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert line(process) == "ready\n"
    assert process.stdin is not None
    process.stdin.close()
    assert line(process) == "got SIGUSR1\n"
    process.terminate()
    assert process.wait() == 7
    assert process.stdout is not None
    process.stdout.close()
