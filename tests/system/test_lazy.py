"""Lazy restore: the tree runs while its memory comes, and never sees a page that is not its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support import processes
from support.round_trip import dump, round_trip
from support.tool import Tool
from support.victims import Victim, Victims

from gpurestore.tasks.memory.lazy import obstacle

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(obstacle() is not None, reason=f"no lazy restore here: {obstacle()}"),
]

HANDLER, KEEPER = "gr-lazy-handler", "gr-lazy-keeper"


def restore_lazily(tool: Tool, victim: Victim, images: Path, *options: str | Path) -> dict[str, int]:
    """Restore and return what the command says of the fill."""
    outcome = tool.run("restore", "-D", images, "-d", "--lazy", "--json", *options).expect(0)
    lazy: dict[str, int] = json.loads(outcome.out)["lazy"]
    return lazy


def wait_filled(lazy: dict[str, int]) -> None:
    """Handler and keeper end by themselves when all memory is there."""
    processes.wait_until(
        lambda: not any(processes.alive(lazy[name]) for name in ("handler_pid", "keeper_pid")), "memory is in place"
    )


def lazy_processes() -> list[int]:
    """Handlers and keepers that run below this process: ours, since it adopts what its descendants leave."""
    names = {}
    for pid in processes.tree(os.getpid()):
        try:
            names[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
    return [pid for pid, name in names.items() if name in (HANDLER, KEEPER) and processes.alive(pid)]


def watched_areas(pid: int) -> int:
    """How many mappings of a task are registered with a userfaultfd."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return sum("um" in line.split() for line in lines if line.startswith("VmFlags:"))


@pytest.mark.parametrize("fill", ["filling", "on demand"])
def test_memory_is_right_while_it_comes_and_is_forked_moved_and_given_back(
    tool: Tool, victims: Victims, folder: Path, fill: str
) -> None:
    victim = victims.start("lazy")
    dump(tool, victim, folder / "images")
    victim.go()  # it begins at once when it is back
    # While faults are recorded the fill waits: then all pages come on demand.
    options = ["--record-faults", folder / "faults"] if fill == "on demand" else []
    lazy = restore_lazily(tool, victim, folder / "images", *options)
    victim.finish()
    wait_filled(lazy)


@pytest.mark.parametrize("fill", ["filling", "on demand"])
def test_shared_memory_comes_late_to_all_who_show_it(tool: Tool, victims: Victims, folder: Path, fill: str) -> None:
    victim = victims.start("lazyshared", "256")
    dump(tool, victim, folder / "images")
    victim.go()
    options = ["--record-faults", folder / "faults"] if fill == "on demand" else []
    lazy = restore_lazily(tool, victim, folder / "images", *options)
    victim.finish()
    wait_filled(lazy)


def test_a_dump_that_observes_the_tree_notes_what_it_uses(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("busy")
    busy, idle = struct.unpack("=QQ", (victim.folder / "addresses").read_bytes())
    images = folder / "images"
    dump(tool, victim, images, "--observe", "0.3")
    used = json.loads((images / "gpurestore.json").read_text())["extension"]["mm"][str(victim.pid)]["used"]
    assert f"{busy:x}" in used
    assert f"{idle:x}" not in used
    lazy = restore_lazily(tool, victim, images)
    wait_filled(lazy)
    victim.finish()


def test_the_handler_lets_go_when_all_is_in_place(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "64")
    for turn in range(2):
        images = folder / f"{turn}.images"
        dump(tool, victim, images)
        lazy = restore_lazily(tool, victim, images)
        wait_filled(lazy)
        assert lazy_processes() == []
        assert watched_areas(victim.pid) == 0
    victim.finish()


@pytest.mark.parametrize("name", ["tree", "heirs", "memory", "shared"])
def test_state_of_all_kinds_survives(tool: Tool, victims: Victims, name: str) -> None:
    round_trip(tool, victims.start(name), 1, "-d", "--lazy")


def test_a_tree_whose_handler_dies_is_killed_and_never_fed_zeros(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazy", "256", "slow")
    dump(tool, victim, folder / "images")
    log = folder / "log"
    lazy = restore_lazily(tool, victim, folder / "images", "--record-faults", folder / "faults", "-o", log)
    # One keeper after the other may die: the handler has a new one before it goes on.
    os.kill(lazy["keeper_pid"], signal.SIGKILL)
    processes.wait_until(
        lambda: lazy["keeper_pid"] not in lazy_processes() and len(lazy_processes()) == 2, "there is a new keeper"
    )
    victim.expect_running()
    assert watched_areas(victim.pid) > 0
    os.kill(lazy["handler_pid"], signal.SIGKILL)
    processes.wait_gone(victim.pids)
    processes.wait_until(lambda: lazy_processes() == [], "the keeper has ended")
    assert not (victim.folder / "wrong").exists(), (victim.folder / "wrong").read_text()
    told = [line for line in log.read_text().splitlines() if "lazy restore" in line]
    assert len(told) == 1
    assert f"the handler (pid {lazy['handler_pid']})" in told[0]
    assert "the tree was killed" in told[0]


def test_nobody_reads_zeros_from_shared_memory_when_the_handler_dies(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("lazyshared", "256")
    dump(tool, victim, folder / "images")
    victim.go()  # all tasks are reading when it dies
    lazy = restore_lazily(tool, victim, folder / "images", "--record-faults", folder / "faults")
    os.kill(lazy["handler_pid"], signal.SIGKILL)
    processes.wait_gone(victim.pids)
    processes.wait_until(lambda: lazy_processes() == [], "the keeper has ended")
    assert not (victim.folder / "wrong").exists(), (victim.folder / "wrong").read_text()


def test_the_kernels_log_tells_what_nobody_else_would_hear(tool: Tool, victims: Victims, folder: Path) -> None:
    try:
        kernel_log = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no kernel log: {error.strerror}")
    os.lseek(kernel_log, 0, os.SEEK_END)
    victim = victims.start("lazy", "256", "slow")
    dump(tool, victim, folder / "images")
    command = [sys.executable, "-m", "gpurestore", "restore", "-D", folder / "images", "-d", "--lazy", "--json"]
    options = ["--record-faults", folder / "faults"]
    # Its stderr is a pipe: it cannot stay open for what comes later.
    said = subprocess.run([*command, *options], check=True, capture_output=True, timeout=60).stdout
    handler = json.loads(said)["lazy"]["handler_pid"]
    os.kill(handler, signal.SIGKILL)
    processes.wait_gone(victim.pids)
    processes.wait_until(lambda: lazy_processes() == [], "the keeper has ended")
    lines = []
    while True:
        try:
            lines.append(os.read(kernel_log, 8192).decode(errors="replace"))
        except BlockingIOError:
            break
    os.close(kernel_log)
    assert any(f"gpurestore: lazy restore: the handler (pid {handler})" in line for line in lines)


def test_the_command_in_front_tells_that_the_handler_died(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazy", "256", "slow")
    dump(tool, victim, folder / "images")
    running = tool.start("restore", "-D", folder / "images", "--lazy", "--record-faults", folder / "faults")
    processes.wait_until(lambda: victim.beats() > 0 and len(lazy_processes()) == 2, "the tree runs")
    victim.expect_running()
    os.kill(min(lazy_processes()), signal.SIGKILL)
    outcome = running.wait()
    assert outcome.code == -signal.SIGKILL
    assert "the tree was killed" in outcome.one_line()


def test_a_tree_that_still_misses_pages_is_not_dumped(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazy", "256", "slow")
    dump(tool, victim, folder / "images")
    lazy = restore_lazily(tool, victim, folder / "images", "--record-faults", folder / "faults")
    refused = tool.dump(victim.pid, folder / "again.images").expect(1)
    assert "lazy restore" in refused.one_line()
    victim.expect_running()
    victim.finish()
    wait_filled(lazy)


def test_recorded_faults_give_the_order_of_the_next_restore(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazy")
    faults = folder / "faults"
    dump(tool, victim, folder / "images")
    victim.go()
    wait_filled(restore_lazily(tool, victim, folder / "images", "--record-faults", faults))
    victim.finish()
    lines = [line.split() for line in faults.read_text().splitlines()]
    assert len(lines) > 100
    assert {pid for pid, _ in lines} == {str(victim.pid)}
    for name in ("verdict", "ready"):
        (victim.folder / name).unlink()
    lazy = restore_lazily(tool, victim, folder / "images", "--fault-order", faults)
    victim.finish()
    wait_filled(lazy)


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("restore.forked", "fail"),
        ("restore.memory", "kill"),
        ("restore.memory", "interrupt"),
        ("restore.release", "fail"),
    ],
)
def test_a_lazy_restore_that_ends_early_leaves_nothing(
    tool: Tool, victims: Victims, folder: Path, point: str, kind: str
) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images")
    outcome = tool.restore(folder / "images", "-d", "--lazy", env={"GPURESTORE_FAULT": f"{point}:{kind}"})
    if outcome.code == 0:
        assert kind == "interrupt"  # it came too late
        processes.kill(victim.pids)
    processes.wait_gone(victim.pids)
    processes.wait_until(lambda: lazy_processes() == [], "no handler is left")


def test_pages_that_cannot_be_read_end_the_tree(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazy", "256", "slow")
    dump(tool, victim, folder / "images")
    log = folder / "log"
    restore_lazily(tool, victim, folder / "images", "--record-faults", folder / "faults", "-o", log)
    victim.expect_running()
    for pages in (folder / "images").glob("pages-*.img"):
        os.truncate(pages, 0)
    processes.wait_gone(victim.pids)
    processes.wait_until(lambda: lazy_processes() == [], "handler and keeper have ended")
    assert not (victim.folder / "wrong").exists(), (victim.folder / "wrong").read_text()
    told = [line for line in log.read_text().splitlines() if "lazy restore" in line]
    assert len(told) == 1
    assert "reading pages of task" in told[0]
    assert "the tree was killed" in told[0]


def test_a_dry_run_says_how_much_comes_late(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "64")
    dump(tool, victim, folder / "images")
    said = tool.run("restore", "-D", folder / "images", "--lazy", "--dry-run").expect(0).out
    late = [line.split() for line in said.splitlines() if "to come lazily" in line]
    assert len(late) == 1
    assert int(late[0][late[0].index("bytes") - 1]) > 64 << 20
    assert "stage fill" in said
    assert lazy_processes() == []


def test_a_dry_run_says_that_shared_memory_comes_late_once(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("lazyshared", "128")
    dump(tool, victim, folder / "images")
    said = tool.run("restore", "-D", folder / "images", "--lazy", "--dry-run").expect(0).out.splitlines()
    late = [line.split() for line in said if line.startswith("shared memory") and line.endswith("to come lazily")]
    # The object of 128 blocks, that of 64, and that of 16 with every second one empty; each once, whoever shows it.
    assert sorted(int(words[words.index("bytes") - 1]) >> 18 for words in late) == [8, 64, 128]
    assert not any(line.startswith("stage shared memory") for line in said)  # nothing of it before the tree runs


def test_without_the_right_nothing_is_created(tool: Tool, victims: Victims, folder: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv (util-linux)")
    victim = victims.start("idle")
    dump(tool, victim, folder / "images")
    prefix = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    outcome = tool.start("restore", "-D", folder / "images", "-d", "--lazy", prefix=prefix).wait().expect(1)
    assert "CAP_SYS_PTRACE" in outcome.one_line()
    processes.wait_gone(victim.pids)


def test_a_trace_shows_when_the_tree_ran_and_when_it_had_its_memory(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "64")
    dump(tool, victim, folder / "images")
    tool.restore(folder / "images", "-d", "--lazy", "--trace", folder / "trace").expect(0)
    events = json.loads((folder / "trace").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["release"]["ts"] + spans["release"]["dur"] <= spans["fill"]["ts"]
    assert spans["fill"]["args"]["bytes"] > 64 << 20
    assert watched_areas(victim.pid) == 0
    victim.finish()


CALLER = """
import sys
from pathlib import Path
import gpurestore

fill = gpurestore.restore_sync(Path(sys.argv[1]), lazy=True, detached=True).lazy
status = fill.wait_sync()
assert status.done_bytes == status.total_bytes == fill.total_bytes > 0, status
assert status.lost_bytes == 0 and status.ended and not status.message, status
"""


def test_a_program_can_wait_for_the_fill(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "64")
    dump(tool, victim, folder / "images")
    subprocess.run([sys.executable, "-c", CALLER, folder / "images"], check=True, timeout=60)
    assert watched_areas(victim.pid) == 0
    victim.finish()
