"""Trees go into compressed images and come back, and what goes wrong changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")


@pytest.mark.parametrize("method", ["lz4", "zstd:3"])
@pytest.mark.parametrize("name", ["memory", "shared", "held", "heirs"])
def test_all_kinds_of_memory_come_back(tool: Tool, victims: Victims, folder: Path, name: str, method: str) -> None:
    """Private memory of every protection, shared memory of several tasks, memfds, memory that fork shares."""
    victim = victims.start(name)
    dump(tool, victim, folder / "images", f"--compress={method}")
    names = {path.name for path in (folder / "images").iterdir() if path.name.startswith("pages-")}
    suffix = {"l": ".img.lz4", "z": ".img.zst"}[method[0]]
    assert names and all(each.endswith(suffix) for each in names)
    tool.restore(folder / "images").expect(0)
    victim.expect_running()
    victim.finish()


def test_a_serial_restore_and_one_of_a_restored_tree_are_right_too(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("tree")
    dump(tool, victim, folder / "first", "--compress=zstd")
    tool.restore(folder / "first", "-d", "--serial").expect(0)
    dump(tool, victim, folder / "second", "--compress=lz4", "--jobs=1")
    tool.restore(folder / "second").expect(0)
    victim.finish()


def test_inspect_shows_the_algorithm_and_the_ratio(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("memory")
    tool.dump(victim.pid, folder / "images", "-R", "--compress=zstd").expect(0)
    text = tool.run("inspect", folder / "images").expect(0).out
    assert "compressed by zstd: " in text
    summary = json.loads(tool.run("inspect", folder / "images", "--json").expect(0).out)["compressed"]
    assert summary["algorithm"] == "zstd"
    files = (folder / "images").glob("pages-*.img.zst")
    assert sum(path.stat().st_size for path in files) == summary["file_bytes"] < summary["bytes"]
    victim.finish()


def test_a_trace_shows_who_compressed_and_who_decompressed(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle", "8")
    images, trace = folder / "images", folder / "trace"
    outcome = dump(tool, victim, images, "--compress=lz4", "--json", "--trace", str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    moved = sum(event["args"]["bytes"] for event in events if event["name"] == "compress")
    assert moved == json.loads(outcome.out)["memory_bytes"] > 8 << 20
    tool.restore(images, "-d", "--trace", str(trace)).expect(0)
    assert "decompress" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    victim.finish()


@pytest.mark.parametrize("method", ["gzip", "zstd:40", "lz4:9"])
def test_a_method_that_is_none_is_refused(tool: Tool, victims: Victims, folder: Path, method: str) -> None:
    victim = victims.start("idle")
    assert f"compression '{method}'" in tool.dump(victim.pid, folder / "images", f"--compress={method}").expect(2).err
    assert not (folder / "images").exists()
    victim.finish()


def test_without_the_package_nothing_is_frozen(tool: Tool, victims: Victims, folder: Path) -> None:
    """A module path in front of the installed packages in which the package cannot be imported."""
    (folder / "zstandard.py").write_text("raise ImportError('not here')\n")
    victim = victims.start("idle")
    outcome = tool.dump(victim.pid, folder / "images", "--compress=zstd", env={"PYTHONPATH": str(folder)})
    assert "pip install 'gpurestore[compress]'" in outcome.expect(2).one_line()
    assert "freeze" not in outcome.log and not (folder / "images").exists()
    victim.finish()


def test_a_damaged_chunk_ends_a_restore_that_trusts_the_images(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images", "--compress=zstd")
    path = next((folder / "images").glob("pages-*.img.zst"))
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    line = tool.restore(folder / "images", "-d").expect(1).one_line()
    assert f"{path.name}: damaged" in line
    line = tool.restore(folder / "images", "-d", "--no-verify").expect(1).one_line()
    assert f"{path.name}: chunk 0 of " in line
    victim.expect_gone()
    content[60] ^= 0xFF
    path.write_bytes(content)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_lazy_restore_of_compressed_pages_is_refused_in_words(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images", "--compress=lz4")
    line = tool.restore(folder / "images", "-d", "--lazy").expect(1).one_line()
    assert "compressed pages cannot be restored lazily" in line
    victim.expect_gone()
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_file_that_cannot_grow_leaves_the_tree_running_and_no_images(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    """A limit on file size stands in for the disk: the first write beyond it fails."""
    victim = victims.start("memory")
    limited = tool.start(
        "dump", "-t", str(victim.pid), "-D", folder / "images", "--compress=lz4", prefix=("prlimit", "--fsize=100000")
    ).wait()
    assert "pages-1.img.lz4" in limited.expect(1).one_line()
    assert not (folder / "images").exists()
    victim.expect_running()
    victim.finish()
