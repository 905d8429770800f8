"""Bad input: one clear line, the documented exit code, and nothing lost."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import processes, without_rights
from support.round_trip import dump
from support.tool import Outcome, Tool
from support.tracer import traced
from support.victims import NOBODY, Victim, Victims

from gpurestore.errors import GpurestoreError
from gpurestore.images.folder import ImageFolder
from gpurestore.images.manifest import MANIFEST_NAME, decode, encode

SEED = int(os.environ.get("GPURESTORE_TEST_SEED", "20240602"))
SMALL_DISK_BYTES = 2 << 20


def expect_refusal(outcome: Outcome, code: int, *words: str) -> None:
    """One line, without a traceback, that names every one of ``words``."""
    outcome.expect(code)
    line = outcome.one_line()
    for word in words:
        assert word in line, f"the message does not name {word!r}\n{outcome}"


@pytest.fixture
def dumped(tool: Tool, victims: Victims, folder: Path, rights: None) -> tuple[Victim, Path]:
    """A small victim that was dumped and ended, and its images."""
    victim = victims.start("idle")
    dump(tool, victim, folder / "images")
    return victim, folder / "images"


# ---- the command line ----


@pytest.mark.parametrize(
    "arguments",
    [
        ("dump",),
        ("dump", "-t", "1"),
        ("dump", "-D", "x"),
        ("dump", "-t", "none", "-D", "x"),
        ("dump", "-t", "0", "-D", "x"),
        ("dump", "-t", "-5", "-D", "x"),
        ("dump", "-t", "1", "-D", "x", "-R", "-s"),
        ("dump", "-t", "1", "-D", "x", "--jobs", "0"),
        ("dump", "-t", "1", "-D", "x", "--no-such-option"),
        ("restore",),
        ("restore", "-D", "x", "--parallel", "--serial"),
        ("restore", "-D", "x", "--jobs", "many"),
        ("no-such-command",),
        (),
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_usage_ends_with_2_and_changes_nothing(tool: Tool, arguments: tuple[str, ...]) -> None:
    outcome = tool.run(*arguments).expect(2)
    assert outcome.err.strip(), "no word of explanation"
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("rights")
def test_a_dump_into_a_folder_that_holds_something_is_refused(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    (folder / "images").mkdir()
    (folder / "images" / "thesis.txt").write_text("precious")
    expect_refusal(tool.dump(victim.pid, folder / "images"), 2, str(folder / "images"))
    assert [path.name for path in (folder / "images").iterdir()] == ["thesis.txt"]
    victim.expect_running()


@pytest.mark.usefixtures("rights")
def test_a_dump_into_an_empty_folder_is_fine(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    (folder / "images").mkdir()
    dump(tool, victim, folder / "images")
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.usefixtures("rights")
def test_a_dump_below_a_folder_that_does_not_exist_says_so(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    outcome = tool.dump(victim.pid, folder / "nowhere" / "images")
    assert outcome.code in (1, 2)
    assert "nowhere" in outcome.one_line()
    victim.expect_running()


# ---- pids that cannot be dumped ----


@pytest.mark.usefixtures("rights")
def test_a_pid_that_does_not_exist_is_named(tool: Tool, folder: Path) -> None:
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        pid = int(file.read()) - 1
    expect_refusal(tool.dump(pid, folder / "images"), 1, str(pid))
    assert not (folder / "images").exists()


@pytest.mark.usefixtures("real_root", "rights")
def test_a_kernel_thread_is_refused_as_one(tool: Tool, folder: Path) -> None:
    kernel_threads = [pid for pid in processes.all_pids() if processes.parent(pid) == 2]
    if not kernel_threads:
        pytest.skip("no kernel threads are visible in this pid namespace")
    expect_refusal(tool.dump(kernel_threads[0], folder / "images"), 1, str(kernel_threads[0]), "kernel thread")


@pytest.mark.usefixtures("rights")
def test_a_zombie_is_refused_as_one(tool: Tool, folder: Path) -> None:
    process = subprocess.Popen(["true"])
    processes.wait_until(lambda: processes.state(process.pid) == "Z", "a zombie")
    expect_refusal(tool.dump(process.pid, folder / "images"), 1, str(process.pid), "zombie")
    process.wait()


@pytest.mark.usefixtures("rights")
def test_a_task_that_somebody_traces_is_refused_and_the_tracer_is_named(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("pipes")
    for pid in victim.pids:
        with traced(pid) as tracer:
            expect_refusal(tool.dump(victim.pid, folder / "images"), 1, str(pid), str(tracer), "trace")
            assert processes.tracer(pid) == tracer, "the tracer lost its task"
    assert not (folder / "images").exists()
    victim.expect_running()
    victim.finish()


@pytest.mark.usefixtures("rights")
def test_a_tree_that_holds_the_tool_itself_is_refused(tool: Tool, folder: Path) -> None:
    script = f'{sys.executable} -m gpurestore dump -t $$ -D "$1"; echo "code $?"'
    result = subprocess.run(
        ["sh", "-c", script, "sh", folder / "images"], capture_output=True, text=True, timeout=30, check=False
    )
    assert "code 2" in result.stdout, result
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "images").exists()


# ---- rights ----


@pytest.mark.usefixtures("real_root", "rights")
def test_an_ordinary_user_is_told_which_right_is_missing(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", user=NOBODY)
    dump(tool, victim, folder / "images")
    other = victims.start("idle", user=NOBODY)
    for arguments in (
        ("dump", "-t", str(other.pid), "-D", str(folder / "other")),
        ("restore", "-d", "-D", str(folder / "images")),
    ):
        outcome = tool.start(*arguments, prefix=without_rights.PREFIX).wait().expect(1)
        assert re.search("CAP_|root", outcome.one_line()), str(outcome)
    assert not (folder / "other").exists()
    assert processes.state(victim.pid) is None
    other.expect_running()
    other.finish()


# ---- image folders ----


def test_a_missing_image_folder_is_named(tool: Tool, folder: Path) -> None:
    outcome = tool.restore(folder / "images")
    assert outcome.code in (1, 2)
    assert "images" in outcome.one_line()


def test_an_empty_image_folder_is_named(tool: Tool, folder: Path) -> None:
    (folder / "images").mkdir()
    outcome = tool.restore(folder / "images")
    assert outcome.code in (1, 2)
    assert "images" in outcome.one_line()


def test_a_file_in_place_of_an_image_folder_is_named(tool: Tool, folder: Path) -> None:
    (folder / "images").write_text("no folder")
    outcome = tool.restore(folder / "images")
    assert outcome.code in (1, 2)
    assert "images" in outcome.one_line()


def test_a_folder_of_another_tool_is_refused(tool: Tool, folder: Path) -> None:
    (folder / "images").mkdir()
    for name in ("inventory.img", "checkpoint.bin", "pstree.img"):
        (folder / "images" / name).write_bytes(b"DMTCP_CHECKPOINT_IMAGE_v3.0\n" * 10)
    outcome = tool.restore(folder / "images")
    assert outcome.code in (1, 2)
    assert ".img" in outcome.one_line()


def complaint(images: Path) -> str:
    """What the library says about a damaged folder."""
    try:
        with ImageFolder(images) as opened:
            opened.verify(1)
    except GpurestoreError as error:
        return str(error)
    return ""


def damaged(images: Path, path: Path) -> Iterator[str]:
    """Damage one file in several ways, one at a time, and put it right again."""
    whole = path.read_bytes()
    draw = random.Random(f"{SEED} {path.name}")
    for size in sorted({0, len(whole) // 2, max(0, len(whole) - 2)}):
        os.truncate(path, size)
        yield f"{path.name} cut to {size} of {len(whole)} bytes"
        path.write_bytes(whole)
    for _ in range(2):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        yield f"{path.name} with a flipped bit in byte {at} of {len(whole)}"
    path.write_bytes(whole + b"x")
    yield f"{path.name} with a byte too many"
    path.write_bytes(whole)
    if path.name != MANIFEST_NAME:  # without one it is a folder as CRIU writes it, which is restored too
        path.unlink()
        yield f"{path.name} missing"
        path.write_bytes(whole)


def test_a_damaged_file_of_a_dump_is_named_before_anything_is_created(tool: Tool, dumped: tuple[Victim, Path]) -> None:
    victim, images = dumped
    for path in sorted(images.iterdir()):
        for number, what in enumerate(damaged(images, path)):
            # Every kind of damage through the library, some of them through the whole command.
            if number in (1, 3):
                outcome = tool.restore(images)
                assert outcome.code == 1, f"{what}\n{outcome}"
                assert path.name in outcome.one_line() or "gpurestore.json" in outcome.err, f"{what}\n{outcome}"
            else:
                assert ".img" in complaint(images) or ".json" in complaint(images), what
            assert processes.state(victim.pid) is None
    tool.restore(images).expect(0)
    victim.finish()


def test_damaged_images_without_verification_give_a_clear_error_or_work(
    tool: Tool, dumped: tuple[Victim, Path]
) -> None:
    victim, images = dumped
    manifest = images / "gpurestore.json"
    for path in sorted(images.glob("*.img")):
        if path.name.startswith("pages-"):
            continue
        whole = path.read_bytes()
        draw = random.Random(f"{SEED} unverified {path.name}")
        at = draw.randrange(8, len(whole)) if len(whole) > 8 else 0
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        outcome = tool.restore(images, "-d", "--no-verify")
        assert outcome.code in (0, 1), f"{path.name}: byte {at}\n{outcome}"
        assert "Traceback" not in outcome.err, str(outcome)
        processes.end_all_below()
        processes.wait_gone(victim.pids)
        path.write_bytes(whole)
    assert manifest.exists()


# ---- the machine ----


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """A file system with hardly any room."""
    disk = folder / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(
        b"none", os.fsencode(disk), b"tmpfs", 0, b"size=%d,mode=777" % getattr(request, "param", SMALL_DISK_BYTES)
    ):
        pytest.skip(f"no mounting here: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(os.fsencode(disk), 2)


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("mib", [1, 2, 16])
def test_a_full_disk_ends_the_dump_and_leaves_nothing_on_it(
    tool: Tool, victims: Victims, small_disk: Path, mib: int
) -> None:
    victim = victims.start("idle", str(mib))
    # Room for all but the last of what has to be written, or for next to nothing of it.
    (small_disk / "ballast").write_bytes(bytes(SMALL_DISK_BYTES - (1 << 20) - 65536 * mib))
    expect_refusal(tool.dump(victim.pid, small_disk / "images"), 1, "space")
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast"]
    victim.expect_running()
    victim.finish()


@pytest.mark.usefixtures("rights")
def test_a_disk_that_is_too_small_is_told_before_memory_is_written(
    tool: Tool, victims: Victims, folder: Path, small_disk: Path
) -> None:
    victim = victims.start("idle", "16")
    trace = folder / "trace.json"
    outcome = tool.dump(victim.pid, small_disk / "images", "--trace", trace)
    expect_refusal(outcome, 1, "no space left for the images", "bytes wanted", str(small_disk))
    wanted = re.search(r"(\d+) bytes wanted", outcome.one_line())
    assert wanted is not None and int(wanted[1]) >= 16 << 20
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert "collect" in names and "memory" not in names
    victim.expect_running()
    victim.finish()


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("small_disk", [15 << 20], indirect=True)
def test_a_disk_that_only_takes_memory_without_its_zeros_is_enough(
    tool: Tool, victims: Victims, small_disk: Path
) -> None:
    victim = victims.start("zeros")  # 16 MiB of private memory, a third of the one half not zeros; 3 MiB of shared
    dump(tool, victim, small_disk / "images")
    tool.restore(small_disk / "images").expect(0)
    victim.finish()


def test_pids_that_are_taken_are_all_named(tool: Tool, victims: Victims, folder: Path, rights: None) -> None:
    victim = victims.start("pipes")
    dump(tool, victim, folder / "images")
    tool.restore(folder / "images").expect(0)
    expect_refusal(tool.restore(folder / "images"), 1, *map(str, victim.pids))
    victim.expect_running()
    victim.finish()


def test_a_zombie_that_keeps_a_pid_is_named_with_its_parent(
    tool: Tool, victims: Victims, folder: Path, rights: None
) -> None:
    victim = victims.start("idle")
    tool.dump(victim.pid, folder / "images").expect(0)
    # This process is the victim's parent and has not reaped it.
    processes.wait_until(lambda: processes.state(victim.pid) == "Z", "a zombie")
    expect_refusal(tool.restore(folder / "images"), 1, str(victim.pid), "zombie", str(os.getpid()))
    running = tool.start("restore", "-d", "-D", folder / "images")
    assert victim.process is not None
    processes.wait_until(lambda: processes.state(running.pid) is not None, "the tool runs")
    victim.expect_gone()
    running.wait().expect(0)
    victim.finish()


def test_files_that_changed_or_are_missing_are_all_named(
    tool: Tool, victims: Victims, folder: Path, rights: None
) -> None:
    victim = victims.start("files")
    dump(tool, victim, folder / "images")
    saved = folder / "saved"
    shutil.copytree(victim.folder, saved, symlinks=True)
    with open(victim.folder / "plain.txt", "a", encoding="ascii") as file:
        file.write("grown")
    (victim.folder / "append.txt").unlink()
    (victim.folder / "some").rmdir()
    expect_refusal(tool.restore(folder / "images"), 1, "plain.txt", "append.txt", "some")
    assert processes.state(victim.pid) is None
    for name in ("plain.txt", "append.txt"):
        shutil.copy2(saved / name, victim.folder / name)
    (victim.folder / "some").mkdir(0o750)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_changed_program_is_named(tool: Tool, victims: Victims, folder: Path, rights: None) -> None:
    program = folder / "program"
    shutil.copy2(victims.compiler.program("idle")[0], program)
    other = victims.compiler.program("cow")[0]
    victim = Victim.start([str(program)], folder / "victim")
    victims.started.append(victim)
    dump(tool, victim, folder / "images")
    size = program.stat().st_size
    program.rename(folder / "kept")
    shutil.copy2(other, program)
    # The same size, so that only the build id tells: a rebuilt library often has it.
    os.truncate(program, size)
    expect_refusal(tool.restore(folder / "images"), 1, str(program))
    program.unlink()
    expect_refusal(tool.restore(folder / "images"), 1, str(program))
    (folder / "kept").rename(program)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_another_machine_and_missing_files_and_taken_pids_are_told_in_one_error(
    tool: Tool, victims: Victims, folder: Path, rights: None
) -> None:
    victim = victims.start("files")
    tool.dump(victim.pid, folder / "images", "-R").expect(0)
    manifest = folder / "images" / "gpurestore.json"
    facts = decode(manifest.read_bytes())
    cpu = {**facts.cpu, "features": [*facts.cpu["features"], "avx4096"]}
    manifest.write_bytes(encode(facts._replace(cpu=cpu)))
    (victim.folder / "append.txt").rename(victim.folder / "elsewhere")
    expect_refusal(tool.restore(folder / "images"), 1, "avx4096", "append.txt", str(victim.pid))
    (victim.folder / "elsewhere").rename(victim.folder / "append.txt")
    victim.expect_running()
    victim.finish()


# ---- Ctrl-C ----


@pytest.mark.usefixtures("rights")
def test_ctrl_c_while_a_big_dump_is_written_puts_everything_back(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "512")
    running = tool.start("dump", "-t", str(victim.pid), "-D", folder / "images")
    processes.wait_until(
        lambda: (
            any(path.stat().st_size > 1 << 20 for path in folder.glob("**/pages-*.img"))
            or not processes.alive(running.pid)
        ),
        "pages are being written",
    )
    running.signal(signal.SIGINT)
    outcome = running.wait()
    assert outcome.code == 130, str(outcome)
    assert "Traceback" not in outcome.err
    assert [path.name for path in folder.iterdir() if "images" in path.name] == []
    victim.expect_running()
    victim.finish()


def test_the_json_of_a_result_is_one_object(tool: Tool, victims: Victims, folder: Path, rights: None) -> None:
    victim = victims.start("pipes")
    dumped = json.loads(dump(tool, victim, folder / "images", "--json").out)
    restored = json.loads(tool.restore(folder / "images", "-d", "--json").expect(0).out)
    assert isinstance(dumped, dict)
    assert restored["root_pid"] == victim.pid
    assert sorted(restored["pids"]) == sorted(victim.pids)
    victim.finish()
