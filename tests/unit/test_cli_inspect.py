"""The text that ``gpurestore inspect`` prints."""

from __future__ import annotations

from gpurestore.cli.inspect import describe
from gpurestore.images.inspect import (
    DescriptorSummary,
    FolderSummary,
    MemorySummary,
    SharedMemorySummary,
    TaskSummary,
)


def task(pid: int, ppid: int, **other: object) -> TaskSummary:
    fields: dict[str, object] = {
        "pid": pid,
        "ppid": ppid,
        "pgid": 10,
        "sid": 10,
        "state": "alive",
        "comm": "train",
        "threads": (pid,),
        "memory": (),
        "stored_bytes": 0,
        "descriptors": (),
        **other,
    }
    return TaskSummary(**fields)  # type: ignore[arg-type]


def folder(*tasks: TaskSummary) -> FolderSummary:
    return FolderSummary(
        path="/images",
        tool="gpurestore 0.1.0",
        created="today",
        hostname="here",
        kernel="6.18",
        root_pid=10,
        tasks=tasks,
        shared_memory=(SharedMemorySummary(7, 8192),),
        plugins=(),
        files={"pages-1.img": 4096, "core-10.img": 600},
        total_bytes=4696,
    )


def test_the_tree_is_indented_below_its_parents() -> None:
    lines = list(describe(folder(task(10, 1), task(11, 10), task(12, 11), task(13, 10))))
    assert [line for line in lines if "task " in line] == [
        "task 10  train  alive, 1 thread, group 10, session 10",
        "  task 11  train  alive, 1 thread, group 10, session 10",
        "    task 12  train  alive, 1 thread, group 10, session 10",
        "  task 13  train  alive, 1 thread, group 10, session 10",
    ]


def test_tasks_that_claim_each_other_as_parents_do_not_hang_it() -> None:
    assert list(describe(folder(task(10, 11), task(11, 10))))


def test_memory_descriptors_and_sizes_are_listed() -> None:
    lines = list(
        describe(
            folder(
                task(
                    10,
                    1,
                    threads=(10, 14),
                    stored_bytes=4096,
                    memory=(MemorySummary("heap", 1, 8192, 4096),),
                    descriptors=(DescriptorSummary(3, "pipe", "pipe 5", True),),
                )
            )
        )
    )
    assert lines[:3] == [
        "images   /images: 4.6 KiB in 2 files",
        "made by  gpurestore 0.1.0 on here, kernel 6.18, today",
        "plugins  none",
    ]
    assert "  threads  10 14" in lines
    assert "    heap                    1     8.0 KiB mapped    4.0 KiB stored" in lines
    assert "       3  pipe       pipe 5  (close on exec)" in lines
    assert "  object 7: 8.0 KiB stored" in lines
    assert lines[-2:] == ["       600 B  core-10.img", "     4.0 KiB  pages-1.img"]
