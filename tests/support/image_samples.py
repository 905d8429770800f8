"""Messages and dump folders for tests of the image format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from gpurestore.errors import ImageError, UsageError
from gpurestore.images import pb
from gpurestore.images.container import encode_image
from gpurestore.images.folder import ImageFolder
from gpurestore.images.inventory import build_inventory
from gpurestore.images.magic import KINDS, parse_file_name
from gpurestore.images.manifest import PluginRecord
from gpurestore.images.pagemap import PRESENT, read_pagemap, write_pagemap
from gpurestore.images.writer import ImageWriter

ROOT_PID = 4242
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
_SCALARS = {
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=12),
    FieldDescriptor.TYPE_STRING: TEXT,
}


def _values(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type._concrete_class, depth - 1)
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    return _SCALARS[field.type]


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 3) -> Message:
    """Any valid message of a type; below ``depth`` only what is required."""
    message: Any = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.is_required:
            _set(message, field, draw(_values(field, depth)))
        elif depth > 0 and draw(st.booleans()):
            repeated = field.is_repeated
            values = draw(st.lists(_values(field, depth), max_size=2) if repeated else _values(field, depth))
            _set(message, field, values)
    result: Message = message
    return result


def _set(message: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def ids(number: int = 1) -> pb.task_kobj_ids_entry:
    return pb.task_kobj_ids_entry(vm_id=number, files_id=number, fs_id=number, sighand_id=number)


def core(comm: str, state: int = 1) -> pb.core_entry:
    """The least that a core image may hold."""
    task = pb.task_core_entry(task_state=state, exit_code=0, personality=0, flags=0, blk_sigset=0, comm=comm)
    return pb.core_entry(mtype=pb.core_entry.X86_64, tc=task, ids=ids())


def mm(*vmas: pb.vma_entry) -> pb.mm_entry:
    """An address space without meaning but for its areas."""
    places: dict[str, Any] = {field.name: 0 for field in pb.mm_entry.DESCRIPTOR.fields if field.name.startswith("mm_")}
    del places["mm_saved_auxv"]
    return pb.mm_entry(exe_file_id=1, vmas=vmas, **places)


def vma(start: int, end: int, status: int, flags: int = 0x22) -> pb.vma_entry:
    return pb.vma_entry(start=start, end=end, pgoff=0, shmid=0, prot=3, flags=flags, status=status, fd=-1)


def no_owner() -> pb.fown_entry:
    return pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


def fill(writer: ImageWriter, pages: int = 5) -> None:
    """Write every form of container once, and what ``inspect`` wants to see."""
    writer.root_pid = ROOT_PID
    writer.cpu = {"vendor": "sample", "features": ["fpu", "avx"]}
    writer.plugins.append(PluginRecord("softaccel", "1.2"))
    writer.extension["sample"] = {"list": [1, 2.5, None, True, "x"]}
    writer.write("inventory", [build_inventory(ids(), ["softaccel"])])
    writer.write("pstree", [pb.pstree_entry(pid=ROOT_PID, ppid=0, pgid=1, sid=1, threads=[ROOT_PID, ROOT_PID + 1])])
    writer.write("core", [core("sample")], ROOT_PID)
    writer.write("mm", [mm(vma(0x10000, 0x20000, 1 | 1 << 9), vma(0x30000, 0x31000, 1 | 1 << 5))], ROOT_PID)
    writer.write("fdinfo", [pb.fdinfo_entry(id=7, flags=1, type=pb.REG, fd=3)], 1)
    regular = pb.reg_file_entry(id=7, flags=2, pos=0, fown=no_owner(), name="/tmp/sample")
    writer.write("files", [pb.file_entry(type=pb.REG, id=7, reg=regular)])
    data = [pb.pipe_data_entry(pipe_id=1, bytes=5, size=65536), pb.pipe_data_entry(pipe_id=2, bytes=0)]
    writer.write("pipes-data", data, payloads=[b"hello", b""])
    ghost = writer.open_image("ghost-file", [pb.ghost_file_entry(uid=0, gid=0, mode=0o100600, size=5)], 31)
    writer.append(ghost, b"ghost", "ghost-file-1f.img")
    write_pagemap(writer, "pagemap", ROOT_PID, 1, [0x10000, 0x30000], [pages - 1, 1], [PRESENT, PRESENT])
    writer.append(writer.open_raw("pages-1.img"), os.urandom(4096 * pages), "pages-1.img")


def make(path: Path) -> Path:
    """A whole dump at ``path``."""
    with ImageWriter(path) as writer:
        fill(writer)
        writer.commit(sync=False)
    return path


def like_criu(path: Path) -> Path:
    """Turn a dump of ours into what CRIU writes: no manifest, and another run's id."""
    (path / "gpurestore.json").unlink(missing_ok=True)
    inventory = build_inventory(ids(), ["softaccel"])
    inventory.dump_criu_run_id = "another tool"
    (path / "inventory.img").write_bytes(encode_image(KINDS["inventory"], [inventory]))
    return path


def refusal(call: Callable[..., object], *args: object) -> str | None:
    """The one line that the call is refused with, or None when it returns; any other exception goes through."""
    try:
        call(*args)
    except (ImageError, UsageError) as error:
        return str(error) if "\n" not in str(error) else f"several lines: {error}"
    return None


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def read_everything(path: Path) -> None:
    """What a restore reads, and the checksums."""
    with ImageFolder(path) as folder:
        for name in folder.files():
            match parse_file_name(name):
                case None:
                    os.close(folder.open_raw(name))
                case kind, int(ident) if kind.name == "ghost-file":
                    folder.read_ghost(ident)
                case kind, int(ident) if kind.name == "pagemap":
                    read_pagemap(folder, "pagemap", ident)
                case kind, ident:
                    folder.read_payloads(kind.name, ident)
        folder.verify()
