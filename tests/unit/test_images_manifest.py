"""gpurestore.json: strict, sealed, and never more than an ImageError away from nonsense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.image_samples import refusal

from gpurestore.errors import ImageError
from gpurestore.images import manifest as manifests
from gpurestore.images.hashing import FileRecord, Stamp
from gpurestore.images.manifest import Manifest, PluginRecord, decode, encode

SAMPLE = Manifest(
    tool_version="0.1.0",
    created="2026-01-02T03:04:05+00:00",
    hostname="node7",
    kernel="6.18.0",
    machine="x86_64",
    root_pid=12,
    files={
        "core-12.img": FileRecord(99, "0123456789abcdef" * 2),
        "pages-1.img": FileRecord(8192, "", "f" * 16, Stamp(7, 8, 9)),
    },
    machine_id="0123456789abcdef",
    cpu={"vendor": "x"},
    plugins=(PluginRecord("cuda", "1"),),
    extension={"threads": {"12": [1, 2]}},
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(st.characters(codec="ascii", exclude_characters="/", min_codepoint=33), min_size=1, max_size=20)
SIZES = st.integers(0, 2**63)
STAMPS = st.none() | st.builds(Stamp, SIZES, SIZES, SIZES)
HASHED = st.builds(
    lambda size, digest, stamp: FileRecord(size, digest.hex(), "", stamp),
    SIZES,
    st.binary(min_size=16, max_size=16),
    STAMPS,
)
SUMMED = st.builds(lambda size, crc, stamp: FileRecord.of_pages(size, crc)._replace(stamp=stamp), SIZES, SIZES, STAMPS)
RECORDS = HASHED | SUMMED
MANIFESTS = st.builds(
    Manifest,
    tool_version=st.text(),
    created=st.text(),
    hostname=st.text(),
    kernel=st.text(),
    machine=st.text(),
    root_pid=st.integers(0, 2**22),
    files=st.dictionaries(NAMES.filter(lambda name: manifests.is_plain_name(name)), RECORDS, max_size=4),
    cpu=st.dictionaries(st.text(), JSON, max_size=3),
    plugins=st.lists(st.builds(PluginRecord, st.text(), st.text()), max_size=2).map(tuple),
    extension=st.dictionaries(st.text(), JSON, max_size=3),
)


def test_what_is_written_is_read_back():
    assert decode(encode(SAMPLE)) == SAMPLE
    assert encode(SAMPLE) == encode(SAMPLE)


@given(MANIFESTS)
def test_any_manifest_is_read_back(manifest):
    assert decode(encode(manifest)) == manifest


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_image_error(data):
    with pytest.raises(ImageError, match=r"^gpurestore\.json: "):
        decode(data)


def test_truncated_anywhere_it_is_an_image_error():
    data = encode(SAMPLE).rstrip()
    for length in range(len(data)):
        with pytest.raises(ImageError, match=r"^gpurestore\.json: damaged: "):
            decode(data[:length])


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm():
    data = bytearray(encode(SAMPLE))
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            why = refusal(decode, bytes(data))
            if why is None:
                assert decode(bytes(data)) == SAMPLE
            else:
                assert why.startswith("gpurestore.json: ")
            data[index] ^= 1 << bit


def test_pretty_printing_does_no_harm():
    assert decode(json.dumps(json.loads(encode(SAMPLE)), indent=4, sort_keys=True).encode()) == SAMPLE


def _changed(**members):
    """A manifest with other members and a seal that fits them."""
    document = {**json.loads(encode(SAMPLE)), **members}
    document["seal"] = manifests._seal(document)
    return json.dumps(document).encode()


def test_a_member_that_we_do_not_know_is_ignored():
    assert decode(_changed(added_later={"x": 1})) == SAMPLE


def test_a_newer_format_says_which_version_reads_it():
    with pytest.raises(ImageError, match=r"format 3 is newer than 2.*restore with version 9\.1 or later"):
        decode(_changed(format=3, tool_version="9.1"))


def test_format_1_which_has_no_sums_of_pages_is_still_read():
    document = json.loads(_changed(format=1, files={"a.img": {"bytes": 1, "xxh3_128": "0" * 32}}))
    del document["machine_id"]
    document["seal"] = manifests._seal(document)
    assert decode(json.dumps(document).encode()).files == {"a.img": FileRecord(1, "0" * 32)}


@pytest.mark.parametrize(
    "members",
    [
        {"format": 0},
        {"format": "1"},
        {"format": True},
        {"root_pid": -1},
        {"root_pid": 1.0},
        {"hostname": None},
        {"chunk_bytes": 1},
        {"plugins": {}},
        {"plugins": ["cuda"]},
        {"plugins": [{"name": "cuda"}]},
        {"files": []},
        {"files": {"a": 1}},
        {"files": {"a": {"bytes": -1, "xxh3_128": "0" * 32}}},
        {"files": {"a": {"bytes": 1, "xxh3_128": "0" * 31}}},
        {"files": {"a": {"bytes": 1, "xxh3_128": "X" * 32}}},
        {"files": {"a": {"bytes": 1, "crc64_nvme": "0" * 32}}},
        {"files": {"a": {"bytes": 1, "crc64_nvme": "0" * 16, "stamp": 1}}},
        {"files": {"a": {"bytes": 1, "crc64_nvme": "0" * 16, "stamp": {"device": 1, "inode": 2}}}},
        {"machine_id": None},
        *({"files": {name: {"bytes": 1, "xxh3_128": "0" * 32}}} for name in ("", ".", "..", "a/b", "/a", "a\0b", "\n")),
        {"files": {"gpurestore.json": {"bytes": 1, "xxh3_128": "0" * 32}}},
    ],
)
def test_a_member_of_the_wrong_shape_is_refused(members):
    with pytest.raises(ImageError, match=r"^gpurestore\.json: damaged: "):
        decode(_changed(**members))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": 1' + b"0" * 10_000 + b"}",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'"\\ud800"',
        b'{"\\ud800": 1}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_hostile_json_is_an_image_error(data):
    with pytest.raises(ImageError, match=r"^gpurestore\.json: "):
        decode(data)


@pytest.mark.parametrize("value", [{1: 2}, {"a": b"x"}, {"a": float("nan")}, {"a": {"b": [object()]}}, {"a": {1, 2}}])
def test_facts_that_json_would_change_are_refused_when_written(value):
    with pytest.raises(TypeError, match=r"^extension"):
        manifests.check_plain_json(value)
