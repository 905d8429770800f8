"""The progress line of a real restore, on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support import processes
from support.round_trip import dump
from support.tool import COMMAND, Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")
_PLUGIN = '''
import time, trio
from gpurestore.devplugins.api import DevicePlugin

class Slow(DevicePlugin):
    """Brings content back at 3 GB/s for ever."""
    name = "slow"

    def init(self, context):
        self.context = context

    def pause_devices(self, pid):
        self.used = True

    async def post_forking(self):
        begin = time.monotonic()
        gauge = lambda: int(3e9 * (time.monotonic() - begin))
        with self.context.span("content", track="plugin slow", total=1 << 40, gauge=gauge):
            await trio.sleep_forever()

    def resume_devices_late(self, pid):
        pass
'''


def read_until(terminal: int, pattern: str) -> str:
    """What came through the terminal up to a line that fits."""
    text, end = "", time.monotonic() + 30
    while not re.search(pattern, text):
        left = end - time.monotonic()
        assert select.select([terminal], [], [], max(left, 0))[0], f"no {pattern} on the terminal:\n{text[-500:]!r}"
        text += os.read(terminal, 65536).decode()
    return text


def test_the_terminal_shows_bytes_and_speed_and_what_waits_for_what(tool: Tool, victims: Victims, folder: Path) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "slow.py").write_text(_PLUGIN)
    options = ("-L", str(folder / "plugins"))
    victim = victims.start("idle")
    dump(tool, victim, folder / "images", *options)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    command = [*COMMAND, "restore", "-d", "-D", str(folder / "images"), *options]
    environment = {**os.environ, "TERM": "xterm"}
    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs, env=environment, process_group=0
    )
    os.close(theirs)
    try:
        read_until(ours, r" of 1\.0 TiB \([0-9]+ %\), [0-9.]+ GB/s  POST_FORKING")
        read_until(ours, r"RESUME_DEVICES_LATE waits for POST_FORKING of slow")
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    finally:
        running.kill()
        os.close(ours)
    processes.wait_gone(victim.pids)
