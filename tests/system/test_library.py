"""The Python API: what a program gets that dumps and restores by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")

# A caller as real ones are: with threads, open descriptors, another folder and umask. Nothing of it may reach the tree.
CALLER = """
import dataclasses, json, os, sys, tempfile, threading
from pathlib import Path
import gpurestore

pid, images = int(sys.argv[1]), Path(sys.argv[2])
held = [open("/dev/zero"), tempfile.TemporaryFile(), *os.pipe()]
os.set_inheritable(held[2], True)
done = threading.Event()
threads = [threading.Thread(target=done.wait) for _ in range(3)]
for thread in threads:
    thread.start()
os.umask(0o137)
os.chdir(tempfile.gettempdir())
try:
    dumped = gpurestore.dump_sync(pid, images)
    restored = gpurestore.restore_sync(images, detached=True)
finally:
    done.set()
for thread in threads:
    thread.join()
print(json.dumps([dataclasses.asdict(dumped), dataclasses.asdict(restored)]))
"""


@pytest.mark.parametrize("name", ["files", "process"])
def test_a_threaded_program_dumps_and_restores_a_tree_without_leaving_traces_in_it(
    victims: Victims, folder: Path, name: str
) -> None:
    victim = victims.start(name)
    # The dumped tree is a child of this process, which reaps it while the caller waits for its pid.
    running = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(victim.pid), str(folder / "images")], stdout=subprocess.PIPE, text=True
    )
    victim.expect_gone()
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    dumped, restored = json.loads(out)
    assert dumped["root_pid"] == restored["root_pid"] == victim.pid
    victim.expect_running()
    victim.finish()


def test_an_error_of_the_library_is_of_its_own_classes(folder: Path) -> None:
    # Of the caller itself, which no process can dump.
    script = CALLER.replace("int(sys.argv[1])", "os.getpid()")
    result = subprocess.run(
        [sys.executable, "-c", script, "", folder / "images"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "gpurestore.errors." in result.stderr.splitlines()[-1], result.stderr
