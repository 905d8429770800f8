"""The pagemap codec: it agrees with protobuf on every image that a writer makes, and refuses the rest."""

from __future__ import annotations

import struct
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.image_samples import refusal

from gpurestore.errors import ImageError
from gpurestore.images import pagemap, pb
from gpurestore.images.container import decode_image, encode_head, encode_image, encode_record
from gpurestore.images.folder import ImageFolder
from gpurestore.images.inventory import build_inventory
from gpurestore.images.magic import KINDS
from gpurestore.images.writer import ImageWriter

HEAD = encode_head(KINDS["pagemap"])
PAGES = st.integers(0, 2**52 - 2)


@st.composite
def runs(draw):
    """(vaddr, nr_pages, flags), all of them possible."""
    page = draw(PAGES)
    nr_pages = draw(st.integers(1, min(2**52 - 1 - page, draw(st.sampled_from([9, 2**31, 2**33, 2**51])))))
    return page * 4096, nr_pages, draw(st.integers(0, 2**32 - 1))


def _columns(entries):
    return ([e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries])


def test_a_pagemap_has_these_bytes():
    data = pagemap.encode(3, [0x7F0000001000], [2], [pagemap.PRESENT])
    assert data.hex() == "0200000008030e0000000880a0808080e01f100220042802"


@given(st.integers(0, 2**32 - 1), st.lists(runs(), max_size=8))
def test_what_is_encoded_is_what_protobuf_reads(pages_id, entries):
    data = HEAD + pagemap.encode(pages_id, *_columns(entries))
    head, *rest = decode_image(KINDS["pagemap"], data, "x")
    assert head.pages_id == pages_id
    assert [(e.vaddr, e.nr_pages, e.flags) for e in rest] == entries
    assert all(e.compat_nr_pages == (e.nr_pages if e.nr_pages < 2**32 else 0) for e in rest)


@given(st.integers(0, 2**32 - 1), st.lists(runs(), max_size=8))
def test_what_is_encoded_is_decoded(pages_id, entries):
    result = pagemap.decode(pagemap.encode(pages_id, *_columns(entries)))
    assert result.pages_id == pages_id
    assert list(zip(result.vaddrs, result.nr_pages, result.flags, strict=True)) == entries
    assert result.present_pages == sum(nr for _, nr, flags in entries if flags & pagemap.PRESENT)
    ends = [vaddr + nr * 4096 for vaddr, nr, _ in entries]
    assert result.ascending == all(entry[0] >= end for entry, end in zip(entries[1:], ends, strict=False))


@st.composite
def foreign_entries(draw):
    """Entries as other writers make them: any field may be missing, and some that we do not know may be there."""
    vaddr, nr_pages, flags = draw(runs())
    small = min(nr_pages, 2**32 - 1)
    entry = pb.pagemap_entry(vaddr=vaddr, compat_nr_pages=small)
    if small != nr_pages or draw(st.booleans()):
        entry.nr_pages = nr_pages
        entry.compat_nr_pages = draw(st.sampled_from([0, small]))
    if draw(st.booleans()):
        entry.flags = flags
    if draw(st.booleans()):
        entry.in_parent = draw(st.booleans())
    unknown = draw(st.sampled_from([b"", b"\x30\x05", b"\x82\x01\x03abc", b"\x49" + bytes(8), b"\x55" + bytes(4)]))
    return entry, unknown


@given(st.lists(foreign_entries(), max_size=6))
def test_entries_of_other_writers_mean_what_protobuf_says(entries):
    data = encode_record(pb.pagemap_head(pages_id=1))
    for entry, unknown in entries:
        body = entry.SerializeToString() + unknown
        data += struct.pack("<I", len(body)) + body
    expected = []
    for e in decode_image(KINDS["pagemap"], HEAD + data, "x")[1:]:
        flags = e.flags if e.HasField("flags") else (0 if e.in_parent else pagemap.PRESENT)
        flags |= pagemap.PARENT if e.in_parent else 0
        expected.append((e.vaddr, e.nr_pages if e.HasField("nr_pages") else e.compat_nr_pages, flags))
    result = pagemap.decode(data)
    assert list(zip(result.vaddrs, result.nr_pages, result.flags, strict=True)) == expected


def test_of_a_field_that_stands_twice_the_last_counts():
    body = pb.pagemap_entry(vaddr=4096, compat_nr_pages=1, nr_pages=1).SerializeToString()
    body += pb.pagemap_entry(vaddr=8192, compat_nr_pages=1, nr_pages=2).SerializeToString()
    result = pagemap.decode(encode_record(pb.pagemap_head(pages_id=1)) + struct.pack("<I", len(body)) + body)
    assert (result.vaddrs[0], result.nr_pages[0]) == (8192, 2)


@given(st.binary(max_size=120))
def test_whatever_the_codec_takes_protobuf_reads_alike(body):
    data = encode_record(pb.pagemap_head(pages_id=1)) + struct.pack("<I", len(body)) + body
    why = refusal(pagemap.decode, data, "x")
    if why is not None:
        assert why.startswith("x: damaged at byte ")
        return
    result = pagemap.decode(data, "x")
    entry = decode_image(KINDS["pagemap"], HEAD + data, "x")[1]
    assert result.vaddrs[0] == entry.vaddr


@given(st.binary(max_size=300))
def test_any_bytes_are_an_image_error_or_a_pagemap(data):
    why = refusal(pagemap.decode, data, "x")
    if why is None:
        assert len(pagemap.decode(data, "x")) * 8 <= len(data)
    else:
        assert why.startswith("x: damaged at byte ")


def _sample() -> bytes:
    return pagemap.encode(1, [0x1000, 0x7F0000000000, 0], [1, 2**34, 1], [4, 6, 1])


def test_a_pagemap_truncated_anywhere_is_an_error_or_shorter():
    data = _sample()
    whole = 0
    for length in range(len(data)):
        why = refusal(pagemap.decode, data[:length], "x")
        assert why is None or why.startswith("x: damaged at byte ")
        whole += why is None
    assert whole == 3  # none, one, two entries


def test_a_flipped_bit_anywhere_is_an_error_or_another_pagemap():
    data = bytearray(_sample())
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            why = refusal(pagemap.decode, bytes(data), "x")
            assert why is None or why.startswith("x: damaged at byte ")
            data[index] ^= 1 << bit


def _entry(vaddr: int, nr_pages: int) -> bytes:
    return encode_record(pb.pagemap_entry(vaddr=vaddr, compat_nr_pages=0, nr_pages=nr_pages))


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (_entry(0x1001, 1), "the address is not that of a page"),
        (_entry(0x1000, 0), "no pages"),
        (_entry(0x1000, 2**52), "pages beyond the address space"),
        (_entry(2**64 - 4096, 1), "pages beyond the address space"),
        (struct.pack("<I", 3) + b"\x08\x01\x10", "a record of 3 bytes, which is too few"),
        (struct.pack("<I", 4) + b"\x08\x00\x20\x04", "pagemap_entry lacks vaddr or compat_nr_pages"),
        (struct.pack("<I", 12) + b"\x08" + b"\xff" * 9 + b"\x02\x10", "a number of more than 64 bits"),
        (struct.pack("<I", 4) + b"\x08\x80\x80\x80", "a number reaches beyond its record"),
        (struct.pack("<I", 8) + b"\x08\x00\x10\xff\xff\xff\xff\x1f", "8589934591 in a field of 32 bits"),
        (struct.pack("<I", 4) + b"\x00\x00\x10\x01", "field number 0"),
        (struct.pack("<I", 4) + b"\x32\x7f\x10\x01", "a field reaches beyond its record"),
        (struct.pack("<I", 4) + b"\x33\x00\x10\x01", "wire type 3"),
        (b"\xff\xff\xff\x7f", "a record of 2147483647 bytes, but the file ends after 0"),
        (b"\x01", "the file ends where a record's size should stand"),
    ],
)
def test_an_impossible_entry_is_refused_with_its_place(entry, why):
    with pytest.raises(ImageError, match=f"^x: damaged at byte [0-9]+: .*{why}"):
        pagemap.decode(encode_record(pb.pagemap_head(pages_id=1)) + entry, "x")


def test_more_pages_than_64_bits_count_are_refused():
    data = encode_record(pb.pagemap_head(pages_id=1)) + _entry(0, 2**52 - 1) * 4100
    with pytest.raises(ImageError, match="more pages altogether"):
        pagemap.decode(data, "x")


def test_an_impossible_run_is_not_written():
    for vaddr, nr_pages in ((1, 1), (0, 0), (2**64 - 4096, 1)):
        with pytest.raises(ValueError, match="pagemap entry 0"):
            pagemap.encode(1, [vaddr], [nr_pages], [4])
    with pytest.raises(ValueError, match="1 addresses, 2 counts"):
        pagemap.encode(1, [0], [1, 1], [4])


def test_a_million_entries_take_well_below_a_second_of_processor_time():
    nr = 1_000_000
    vaddrs = array("Q", range(0x7F0000000000, 0x7F0000000000 + nr * 16384, 16384))
    nr_pages, flags = array("Q", [3]) * nr, array("I", [4]) * nr
    start = time.thread_time()
    data = pagemap.encode(1, vaddrs, nr_pages, flags)
    result = pagemap.decode(data)
    cpu_s = time.thread_time() - start
    assert result.vaddrs == vaddrs
    assert cpu_s < 1


def test_a_pagemap_goes_through_a_folder(tmp_path):
    with ImageWriter(tmp_path / "images") as writer:
        writer.write("inventory", [build_inventory(pb.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1))])
        pagemap.write_pagemap(writer, "pagemap-shmem", 5, 2, [0], [7], [4])
        writer.commit(sync=False)
    with ImageFolder(tmp_path / "images") as folder:
        assert pagemap.read_pagemap(folder, "pagemap-shmem", 5).nr_pages == array("Q", [7])
        assert [type(m) for m in folder.read("pagemap-shmem", 5)] == [pb.pagemap_head, pb.pagemap_entry]
        with pytest.raises(ImageError, match=r"images/pagemap-6\.img: missing"):
            pagemap.read_pagemap(folder, "pagemap", 6)


def test_an_error_in_a_file_counts_from_its_first_byte(tmp_path):
    (tmp_path / "inventory.img").write_bytes(
        encode_image(KINDS["inventory"], [pb.inventory_entry(img_version=2, fdinfo_per_id=True)])
    )
    (tmp_path / "pagemap-1.img").write_bytes(HEAD + encode_record(pb.pagemap_head(pages_id=1)) + b"\0\0\0\0")
    with ImageFolder(tmp_path) as folder, pytest.raises(ImageError, match=r"pagemap-1\.img: damaged at byte 14: "):
        pagemap.read_pagemap(folder, "pagemap", 1)
