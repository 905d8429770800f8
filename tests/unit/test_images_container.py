"""Containers of images: their bytes, and that any other bytes end in a typed error."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_samples import core, ids, messages, refusal

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.container import decode_image, decode_records, encode_head, encode_image
from gpurestore.images.inventory import build_inventory, check_inventory
from gpurestore.images.magic import KINDS, PAYLOAD_NONE, PAYLOAD_RECORD, parse_file_name

PSTREE = pb.pstree_entry(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 300])
GOLDEN = {
    # common magic, magic, size, {pid, ppid, pgid, sid, two threads}
    "pstree": ("19435654303027500d0000000801100018012001280128ac02", [PSTREE]),
    # its own magic alone
    "inventory": ("163131580400000008021001", [pb.inventory_entry(img_version=2, fdinfo_per_id=True)]),
    # service magic
    "stats-dump": ("405910550633095700000000", [pb.stats_entry()]),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_an_image_has_these_bytes(kind):
    golden, content = GOLDEN[kind]
    assert encode_image(KINDS[kind], content).hex() == golden
    assert decode_image(KINDS[kind], bytes.fromhex(golden), "x") == content


def test_raw_bytes_stand_behind_the_record_that_counts_them():
    entries = [pb.pipe_data_entry(pipe_id=1, bytes=3), pb.pipe_data_entry(pipe_id=2, bytes=0)]
    data = encode_image(KINDS["pipes-data"], entries, [b"abc", b""])
    assert data.hex() == "194356540937455604000000080110036162630400000008021000"
    assert [(m.pipe_id, bytes(p)) for m, p in decode_records(KINDS["pipes-data"], data, "x")] == [(1, b"abc"), (2, b"")]


def test_a_ghost_file_is_one_record_and_then_its_bytes():
    entry = pb.ghost_file_entry(uid=1, gid=2, mode=0o100600)
    data = encode_image(KINDS["ghost-file"], [entry]) + b"content"
    assert [(m, bytes(p)) for m, p in decode_records(KINDS["ghost-file"], data, "x")] == [(entry, b"content")]


def test_an_empty_image_is_its_magic_alone():
    assert decode_image(KINDS["files"], encode_head(KINDS["files"]), "files.img") == []


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.payload == PAYLOAD_NONE], ids=lambda kind: kind.name)
@settings(max_examples=20)
@given(data=st.data())
def test_whatever_is_written_is_read_back(kind, data):
    first = [data.draw(messages(kind.head))] if kind.head else []
    content = first + data.draw(st.lists(messages(kind.message), max_size=2))
    assert decode_image(kind, encode_image(kind, content), "x") == content


def _decodes_or_says_why(kind, data):
    why = refusal(decode_image, kind, data, "name.img")
    assert why is None or why.startswith("name.img: damaged at byte ")


SAMPLES = {
    "inventory": [build_inventory(ids(), ["a", "b"])],
    "pstree": [PSTREE, PSTREE],
    "core": [core("sample")],
    "pagemap": [pb.pagemap_head(pages_id=1), pb.pagemap_entry(vaddr=4096, compat_nr_pages=1, flags=4, nr_pages=1)],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_image_truncated_anywhere_is_an_error_or_a_shorter_image(name):
    kind, content = KINDS[name], SAMPLES[name]
    data = encode_image(kind, content)
    ends = [len(encode_image(kind, content[:count])) for count in range(len(content) + 1)]
    for length in range(len(data)):
        if length in ends:
            assert decode_image(kind, data[:length], "x") == content[: ends.index(length)]
        else:
            with pytest.raises(ImageError, match="x: damaged at byte"):
                decode_image(kind, data[:length], "x")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_flipped_bit_anywhere_is_an_error_or_another_valid_image(name):
    data = bytearray(encode_image(KINDS[name], SAMPLES[name]))
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            _decodes_or_says_why(KINDS[name], bytes(data))
            data[index] ^= 1 << bit


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
@settings(max_examples=30)
@given(body=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_behind_the_magic_give_an_image_error_or_messages(kind, body, framed):
    _decodes_or_says_why(kind, encode_head(kind) + (struct.pack("<I", len(body)) if framed else b"") + body)


def test_a_size_beyond_the_file_is_refused_before_memory_is_taken():
    with pytest.raises(ImageError, match=r"x: damaged at byte 8: a record of 4294967295 bytes.*ends after 0"):
        decode_image(KINDS["mm"], encode_head(KINDS["mm"]) + b"\xff\xff\xff\xff", "x")


def test_another_kind_of_image_is_named():
    with pytest.raises(ImageError, match="where a mm image has 0x57492820"):
        decode_image(KINDS["mm"], encode_head(KINDS["fs"]), "mm-1.img")


def test_a_missing_required_field_is_an_error_that_names_it():
    data = encode_head(KINDS["fs"]) + struct.pack("<I", 2) + bytes.fromhex("0801")
    with pytest.raises(ImageError, match="fs_entry lacks root_id"):
        decode_image(KINDS["fs"], data, "fs-1.img")
    with pytest.raises(ValueError, match="fs_entry lacks cwd_id"):
        encode_image(KINDS["fs"], [pb.fs_entry(root_id=1)])


def test_a_string_that_is_no_text_is_refused_wherever_it_stands():
    entry = core("sam")
    data = encode_image(KINDS["core"], [entry]).replace(b"sam", b"\xff\xfe\xfd")
    with pytest.raises(ImageError, match=r"task_core_entry\.comm is not text"):
        decode_image(KINDS["core"], data, "core-1.img")


def test_payloads_may_not_reach_beyond_the_file():
    assert KINDS["pipes-data"].payload == PAYLOAD_RECORD
    data = encode_image(KINDS["pipes-data"], [pb.pipe_data_entry(pipe_id=1, bytes=4_000_000_000)], [b"abc"])
    with pytest.raises(ImageError, match="4000000000 bytes of data expected, 3 are left"):
        decode_image(KINDS["pipes-data"], data, "x")


def test_our_messages_live_beside_another_copy_of_the_format():
    from google.protobuf import descriptor_pb2, descriptor_pool

    foreign = descriptor_pb2.FileDescriptorProto(name="core.proto", syntax="proto2")
    foreign.message_type.add(name="core_entry")
    descriptor_pool.Default().AddSerializedFile(foreign.SerializeToString())
    assert pb.core_entry.DESCRIPTOR.full_name == "gpurestore.images.core_entry"


@pytest.mark.parametrize(
    ("kind", "ident", "name"),
    [
        ("core", 17, "core-17.img"),
        ("pagemap-shmem", 9, "pagemap-shmem-9.img"),
        ("ghost-file", 31, "ghost-file-1f.img"),
        ("files", None, "files.img"),
        ("stats-dump", None, "stats-dump"),
    ],
)
def test_a_file_name_and_its_kind_belong_together(kind, ident, name):
    assert KINDS[kind].file_name(ident) == name
    assert parse_file_name(name) == (KINDS[kind], ident)


@pytest.mark.parametrize("name", ["core.img", "core-07.img", "core-x.img", "files-1.img", "pages-1.img", "", "core-1"])
def test_other_names_are_of_no_kind(name):
    assert parse_file_name(name) is None


@pytest.mark.parametrize(("version", "word"), [(1, "older"), (3, "newer")])
def test_images_of_another_version_are_refused(version, word):
    with pytest.raises(ImageError, match=f"image version {version} is {word} than 2"):
        check_inventory(pb.inventory_entry(img_version=version, fdinfo_per_id=True))


def test_an_inventory_that_needs_no_plugin_says_so():
    assert build_inventory(ids()).HasField("plugins_entry")
