"""The summary of a dump."""

from __future__ import annotations

import json

import pytest
from support import image_samples as samples

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.inspect import MemorySummary, SharedMemorySummary, format_summary, summarize
from gpurestore.images.pagemap import LAZY, PARENT, PRESENT, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import inherited
from gpurestore.tasks.memory import PageRuns


def test_a_summary_tells_tree_memory_descriptors_plugins_and_sizes(tmp_path):
    summary = summarize(samples.make(tmp_path / "images"))
    assert (summary.root_pid, summary.plugins, summary.total_bytes) == (
        samples.ROOT_PID,
        ("softaccel 1.2",),
        sum(summary.files.values()),
    )
    (task,) = summary.tasks
    assert (task.comm, task.state, len(task.threads), task.stored_bytes) == ("sample", "alive", 2, 5 * 4096)
    assert task.memory == (
        MemorySummary("private anonymous", 1, 0x10000, 4 * 4096),
        MemorySummary("heap", 1, 0x1000, 4096),
    )
    (descriptor,) = task.descriptors
    assert (descriptor.fd, descriptor.kind, descriptor.target) == (3, "file", "/tmp/sample")
    assert descriptor.close_on_exec
    assert json.loads(json.dumps(summary.as_dict()))["root_pid"] == samples.ROOT_PID


def test_the_text_shows_the_same_and_ends_its_lines(tmp_path):
    text = format_summary(summarize(samples.make(tmp_path / "images")))
    for part in ("gpurestore 0", "softaccel 1.2", "4242 sample: alive, 2 threads", "fd 3    file       /tmp/sample"):
        assert part in text
    assert text.endswith("\n")


def _write(path, mm_entry, *runs, extra_pages=0):
    with ImageWriter(path) as writer:
        writer.write("inventory", [samples.build_inventory(samples.ids())])
        writer.write("pstree", [pb.pstree_entry(pid=1, ppid=0, pgid=1, sid=1, threads=[1])])
        writer.write("core", [samples.core("a\x1b[2Jb")], 1)
        writer.write("mm", [mm_entry], 1)
        write_pagemap(writer, "pagemap", 1, 1, *map(list, zip(*runs, strict=True)))
        write_pagemap(writer, "pagemap-shmem", 77, 2, [0], [3], [PRESENT])
        present = sum(nr for _, nr, flags in runs if flags & PRESENT)
        writer.append(writer.open_raw("pages-1.img"), bytes(4096 * (present + extra_pages)), "pages-1.img")
        writer.append(writer.open_raw("pages-2.img"), bytes(4096 * 3), "pages-2.img")
        writer.commit(sync=False)
    return path


def test_pages_are_counted_where_they_lie_whatever_the_order_of_runs(tmp_path):
    areas = samples.mm(samples.vma(0x10000, 0x14000, 1 | 1 << 9), samples.vma(0x14000, 0x18000, 1 | 1 << 5))
    runs = [(0x17000, 1, PRESENT), (0x12000, 3, PRESENT | LAZY), (0x10000, 1, PARENT), (0x20000, 1, PRESENT)]
    summary = summarize(_write(tmp_path / "images", areas, *runs))
    assert {m.kind: m.stored_bytes for m in summary.tasks[0].memory} == {"private anonymous": 8192, "heap": 8192}
    assert summary.tasks[0].stored_bytes == 5 * 4096
    assert summary.shared_memory == (SharedMemorySummary(77, 3 * 4096),)
    assert "\x1b" not in format_summary(summary)


def test_what_a_task_has_from_its_parent_is_counted_apart(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        writer.write("inventory", [samples.build_inventory(samples.ids(), inheriting=True)])
        entries = [pb.pstree_entry(pid=pid, ppid=pid - 1, pgid=1, sid=1, threads=[pid]) for pid in (1, 2)]
        writer.write("pstree", entries)
        for pid in (1, 2):
            writer.write("core", [samples.core("x")], pid)
            writer.write("mm", [samples.mm(samples.vma(0x10000, 0x14000, 1 | 1 << 9))], pid)
            write_pagemap(writer, "pagemap", pid, pid, [0x10000], [2 if pid == 1 else 1], [PRESENT])
            name = f"pages-{pid}.img"
            writer.append(writer.open_raw(name), bytes(8192), name)
        inherited.write(writer, 2, 1, PageRuns.of_ranges([(0x11000, 0x12000)]))
        writer.commit(sync=False)
    summary = summarize(tmp_path / "images")
    assert [(t.stored_bytes, t.inherited_bytes) for t in summary.tasks] == [(8192, 0), (4096, 4096)]
    assert "4.0 KiB stored, 4.0 KiB shared with 1" in format_summary(summary)


def test_a_pages_image_that_is_too_short_is_named(tmp_path):
    path = _write(tmp_path / "images", samples.mm(), (0x10000, 4, PRESENT), extra_pages=-1)
    with pytest.raises(ImageError, match=r"pages-1\.img: truncated: pagemap-1\.img counts 4 pages"):
        summarize(path)
