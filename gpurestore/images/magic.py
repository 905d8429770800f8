"""The kinds of image file: magic numbers, file names, and which message a record is.

    +0   u32  common magic (service files: service magic; the inventory: none, its own magic stands here)
    +4   u32  magic of the kind
    +8   records: u32 size, then a protobuf message of that many bytes

Everything is little endian. ``pages-N.img`` is raw: pages and nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from google.protobuf.message import Message

from gpurestore.images import pb

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940

# What img_version of the inventory means: 1 is the format without the common magic, which CRIU left in 2014.
IMAGE_VERSION = 2
# The same with inherited-PID.img in it: ours alone. Other readers must refuse it: to them pages would be missing.
INHERITING_VERSION = 1002

PAGE_BYTES = 4096

PAYLOAD_NONE = "none"
PAYLOAD_RECORD = "record"  # each record is followed by as many bytes as its field `bytes` says
PAYLOAD_FILE = "file"  # the first record is followed by the content of a file


class ImageKind(NamedTuple):
    """One kind of image. ``ident_format`` is None where a dump has only one such file."""

    name: str
    magic: int
    message: type[Message]
    ident_format: str | None = None
    payload: str = PAYLOAD_NONE
    service: bool = False
    head: type[Message] | None = None  # message of the first record where it differs from the others

    def file_name(self, ident: int | None = None) -> str:
        """The file's name; ``ident`` is a pid, an id, or nothing, as the kind wants it."""
        if (ident is None) != (self.ident_format is None):
            raise ValueError(f"image kind {self.name!r} takes {'no' if self.ident_format is None else 'an'} ident")
        suffix = "" if self.ident_format is None else "-" + format(ident, self.ident_format)
        return f"{self.name}{suffix}.img" if not self.service else self.name

    @property
    def first_magics(self) -> tuple[int, ...]:
        """The magic numbers at the start of the file, in order."""
        if self.name == "inventory":
            return (self.magic,)
        return (SERVICE_MAGIC if self.service else COMMON_MAGIC, self.magic)


_KINDS = (
    ImageKind("inventory", 0x58313116, pb.inventory_entry),
    ImageKind("pstree", 0x50273030, pb.pstree_entry),
    ImageKind("core", 0x55053847, pb.core_entry, "d"),
    ImageKind("ids", 0x54432030, pb.task_kobj_ids_entry, "d"),
    ImageKind("mm", 0x57492820, pb.mm_entry, "d"),
    ImageKind("pagemap", 0x56084025, pb.pagemap_entry, "d", head=pb.pagemap_head),
    ImageKind("pagemap-shmem", 0x56084025, pb.pagemap_entry, "d", head=pb.pagemap_head),
    ImageKind("inherited", 0x48495247, pb.pagemap_entry, "d", head=pb.pagemap_head),  # ours alone
    ImageKind("ancestral", 0x41495247, pb.pagemap_entry, "d", head=pb.pagemap_head),  # this one, too
    ImageKind("fs", 0x51403912, pb.fs_entry, "d"),
    ImageKind("fdinfo", 0x56213732, pb.fdinfo_entry, "d"),
    ImageKind("files", 0x56303138, pb.file_entry),
    ImageKind("reg-files", 0x50363636, pb.reg_file_entry),
    ImageKind("ext-files", 0x59255641, pb.ext_file_entry),
    ImageKind("ns-files", 0x61394011, pb.ns_file_entry),
    ImageKind("eventfd", 0x44523722, pb.eventfd_file_entry),
    ImageKind("eventpoll", 0x45023858, pb.eventpoll_file_entry),
    ImageKind("eventpoll-tfd", 0x44433746, pb.eventpoll_tfd_entry),
    ImageKind("signalfd", 0x57323820, pb.signalfd_entry),
    ImageKind("timerfd", 0x50493712, pb.timerfd_entry),
    ImageKind("inotify", 0x48424431, pb.inotify_file_entry),
    ImageKind("inotify-wd", 0x54562009, pb.inotify_wd_entry),
    ImageKind("fanotify", 0x55096122, pb.fanotify_file_entry),
    ImageKind("fanotify-mark", 0x56506035, pb.fanotify_mark_entry),
    ImageKind("pidfd", 0x54435556, pb.pidfd_entry),
    ImageKind("pipes", 0x56513555, pb.pipe_entry),
    ImageKind("pipes-data", 0x56453709, pb.pipe_data_entry, payload=PAYLOAD_RECORD),
    ImageKind("fifo", 0x58364939, pb.fifo_entry),
    ImageKind("fifo-data", 0x59333054, pb.pipe_data_entry, payload=PAYLOAD_RECORD),
    ImageKind("unixsk", 0x54373943, pb.unix_sk_entry),
    ImageKind("inetsk", 0x56443851, pb.inet_sk_entry),
    ImageKind("packetsk", 0x60454618, pb.packet_sock_entry),
    ImageKind("netlinksk", 0x58005614, pb.netlink_sk_entry),
    ImageKind("tty", 0x59433025, pb.tty_file_entry),
    ImageKind("tty-info", 0x59453036, pb.tty_info_entry),
    ImageKind("tty-data", 0x59413026, pb.tty_data_entry),
    ImageKind("tunfile", 0x57143751, pb.tunfile_entry),
    ImageKind("bpfmap-file", 0x57506142, pb.bpfmap_file_entry),
    ImageKind("memfd", 0x48453499, pb.memfd_inode_entry),
    ImageKind("remap-fpath", 0x59133954, pb.remap_file_path_entry),
    ImageKind("ghost-file", 0x52583605, pb.ghost_file_entry, "x", payload=PAYLOAD_FILE),
    ImageKind("filelocks", 0x54323616, pb.file_lock_entry),
    ImageKind("seccomp", 0x64413049, pb.seccomp_entry),
    ImageKind("cgroup", 0x59383330, pb.cgroup_entry),
    ImageKind("cpuinfo", 0x61404013, pb.cpuinfo_entry),
    ImageKind("timens", 0x43114433, pb.timens_entry, "d"),
    ImageKind("utsns", 0x54473203, pb.utsns_entry, "d"),
    ImageKind("stats-dump", 0x57093306, pb.stats_entry, service=True),
    ImageKind("stats-restore", 0x57093306, pb.stats_entry, service=True),
)
KINDS = {kind.name: kind for kind in _KINDS}

_NAME = re.compile(r"(?P<kind>[a-z]+(?:-[a-z]+)*?)(?:-(?P<ident>[0-9a-f]{1,20}))?\.img")


def pages_file_name(pages_id: int) -> str:
    """The raw image that a pagemap's ``pages_id`` names."""
    return f"pages-{pages_id}.img"


def is_pages_file(name: str) -> bool:
    """Whether a file of an image folder holds pages."""
    return name.startswith("pages-")


def parse_file_name(name: str) -> tuple[ImageKind, int | None] | None:
    """The kind and ident that ``name`` stands for, or None when no kind of ours is called so."""
    kind = KINDS.get(name)
    if kind is not None and kind.service:
        return kind, None
    match = _NAME.fullmatch(name)
    if match is None or (kind := KINDS.get(match["kind"])) is None or kind.service:
        return None
    text = match["ident"]
    if text is None or kind.ident_format is None:
        return (kind, None) if text is None and kind.ident_format is None else None
    try:
        ident = int(text, 16 if kind.ident_format == "x" else 10)
    except ValueError:
        return None
    return (kind, ident) if kind.file_name(ident) == name else None
