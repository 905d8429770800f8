"""Compressed pages images: what is written is read back, other tools read it too, and damage is named."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpurestore.errors import GpurestoreError, ImageError, UsageError
from gpurestore.images import chunked, compression
from gpurestore.images.chunked import IndexWriter, checksum, read_index
from gpurestore.images.compression import Compression, Crew, codec

PAGE = 4096
METHODS = ["lz4", "zstd", "zstd:19"]
KINDS = {
    "zeros": bytes(16 * PAGE),
    "text": (b"nothing is trusted that comes out of an image; " * 2000)[: 16 * PAGE],
    "noise": os.urandom(16 * PAGE),
}
CHUNKS = [KINDS["text"], KINDS["noise"], KINDS["zeros"], KINDS["text"][:PAGE]]


def image(method: str, chunks: list[bytes] = CHUNKS) -> bytes:
    """A compressed pages image."""
    made = Compression.parse(method)
    own, index = made.codec(), IndexWriter(made.algorithm, made.chunk_bytes)
    content = index.head
    for chunk in chunks:
        frame = bytes(own.compress(chunk))
        assert index.add(len(frame), len(chunk), checksum(frame)) == len(content)
        content += frame
    assert index.tail()[0] == len(content)
    return content + index.tail()[1]


def open_bytes(content: bytes) -> int:
    fd = os.memfd_create("image")
    os.write(fd, content)
    return fd


def read_all(content: bytes, algorithm: str) -> bytes:
    fd = open_bytes(content)
    try:
        index = read_index(fd, "pages-1.img.x", algorithm)
        return index.read(fd, 0, index.stream_bytes)
    finally:
        os.close(fd)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_comes_back_and_one_that_does_not_shrink_hardly_grows(method: str, kind: str) -> None:
    made, chunk = Compression.parse(method).codec(), KINDS[kind]
    frame = made.compress(bytearray(chunk))
    assert made.decompress(frame, memoryview(bytearray(len(chunk)))) == chunk
    limit = len(chunk) + compression.MAX_FRAME_EXTRA if kind == "noise" else len(chunk) // 4
    assert len(frame) < limit


@pytest.mark.parametrize("method", METHODS)
def test_any_part_of_the_stream_can_be_read(method: str) -> None:
    whole = b"".join(CHUNKS)
    fd = open_bytes(image(method))
    index = read_index(fd, "pages-1.img.x", method.partition(":")[0])
    assert index.stream_bytes == len(whole)
    for start, end in ((0, 1), (15 * PAGE, 17 * PAGE), (PAGE, len(whole)), (len(whole) - 5, len(whole))):
        assert index.read(fd, start, end - start) == whole[start:end]
    os.close(fd)


@pytest.mark.parametrize(("method", "tool"), [("lz4", "lz4"), ("zstd", "zstd")])
def test_the_usual_tools_make_a_plain_pages_image_of_it(tmp_path: Path, method: str, tool: str) -> None:
    path = tmp_path / f"pages-1.img{compression.SUFFIXES[tool]}"
    path.write_bytes(image(method))
    program = shutil.which(tool)
    if program is not None:
        out = subprocess.run([program, "-dc", path], capture_output=True, check=True).stdout
    elif tool == "zstd":
        import zstandard

        with open(path, "rb") as file:
            out = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    else:
        import cramjam

        # It reads no skippable frames, which only come first and last here.
        out = bytes(cramjam.lz4.decompress(path.read_bytes()))
    assert out == b"".join(CHUNKS)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gzip", "there are lz4 and zstd"),
        ("", "there are lz4 and zstd"),
        ("lz4:1", "lz4 has no levels"),
        ("zstd:0", "1 to 19"),
        ("zstd:20", "1 to 19"),
        ("zstd:", "1 to 19"),
        ("zstd:-1", "1 to 19"),
        ("zstd:³", "1 to 19"),
        ("zstd:" + "9" * 5000, "1 to 19"),
    ],
)
def test_what_is_no_method_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Compression.parse(text)


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_a_missing_package_is_named_before_anything_is_written_or_read(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image(method)
    monkeypatch.setitem(sys.modules, {"lz4": "cramjam", "zstd": "zstandard"}[method], None)
    with pytest.raises(UsageError, match=r"pip install 'gpurestore\[compress\]'"):
        Crew(Compression.parse(method), 1)
    with pytest.raises(GpurestoreError, match=r"pages-1\.img\.x: .*pip install"):
        read_all(content, method)


def test_the_crew_stays_within_its_memory_whatever_the_jobs() -> None:
    for method in (*METHODS, "zstd:9", "zstd:10"):
        made = Compression.parse(method)
        crew = Crew(made, 1000)
        assert crew.nr_places == 1 or crew.nr_places * made.worker_bytes <= compression.BUFFER_BYTES
        assert made.worker_bytes < compression.BUFFER_BYTES
    assert Crew(Compression.parse("lz4"), 1).nr_places == 1


# ---- nothing is trusted


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_every_flipped_byte_is_found_and_named(method: str) -> None:
    content = image(method)
    for at in {*range(80), *range(80, len(content) - 200, 997), *range(len(content) - 200, len(content))}:
        damaged = bytearray(content)
        damaged[at] ^= 0x41
        with pytest.raises(ImageError, match=r"^pages-1\.img\.x: "):
            read_all(bytes(damaged), method)


def test_a_damaged_chunk_is_named() -> None:
    content = bytearray(image("zstd"))
    fd = open_bytes(bytes(content))
    index = read_index(fd, "dir/pages-1.img.zst", "zstd")
    os.pwrite(fd, b"!", index.frame_offsets[2] + 4)
    with pytest.raises(ImageError, match=r"dir/pages-1\.img\.zst: chunk 2 of 4 \(bytes \d+ to \d+\) is damaged: its"):
        index.read(fd, 0, index.stream_bytes)
    os.close(fd)


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_every_truncation_is_found(method: str) -> None:
    content = image(method)
    for size in {*range(200), *range(0, len(content), 1009), *range(len(content) - 120, len(content))}:
        with pytest.raises(ImageError, match=r"^pages-1\.img\.x: "):
            read_all(content[:size], method)


def forge(frames: list[tuple[bytes, int]], algorithm: str = "zstd", largest: int = 1 << 19) -> bytes:
    """An image whose checksums are right, whatever its frames are."""
    index = IndexWriter(algorithm, largest)
    content = index.head
    for frame, chunk_bytes in frames:
        index.add(len(frame), chunk_bytes, checksum(frame))
        content += frame
    return content + index.tail()[1]


def frame_of(method: str, chunk: bytes) -> bytes:
    return bytes(Compression.parse(method).codec().compress(chunk))


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_a_frame_that_holds_more_or_less_than_it_says_takes_no_memory(method: str) -> None:
    """A decompression bomb with right checksums: a gigabyte in a frame of some kilobytes."""
    bomb = frame_of(method, bytes(64 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for frame, says in ((bomb, PAGE), (bomb, 1 << 19), (frame_of(method, bytes(PAGE)), 2 * PAGE)):
        with pytest.raises(ImageError, match=r"chunk 0 of 1 .* is damaged"):
            read_all(forge([(frame, says)], method), method)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10


@pytest.mark.parametrize(
    ("frames", "largest", "why"),
    [
        ([(b"x" * 20, 0)], 1 << 19, "a chunk of 0"),
        ([(b"x" * 20, PAGE + 1)], 1 << 19, "no multiple of a page"),
        ([(b"x" * 20, 1 << 20)], 1 << 19, "a chunk of 1048576"),
        ([(b"x" * 20, 1 << 23)], 1 << 23, "chunks of 8388608 bytes"),
        ([(b"x" * 20, PAGE)], 0, "chunks of 0 bytes"),
        ([(b"", PAGE)], 1 << 19, "a frame of 0"),
        ([(b"x" * ((1 << 19) + 2000), PAGE)], 1 << 19, "a frame of"),
    ],
)
def test_impossible_sizes_are_refused_before_any_memory_is_taken(
    frames: list[tuple[bytes, int]], largest: int, why: str
) -> None:
    with pytest.raises(ImageError, match=why):
        read_all(forge(frames, largest=largest), "zstd")


def test_an_index_that_claims_more_chunks_than_the_file_has_bytes_is_refused() -> None:
    content = bytearray(image("zstd"))
    struct.pack_into("<Q", content, len(content) - 24, 1 << 60)
    with pytest.raises(ImageError, match="an index of 1152921504606846976 chunks"):
        read_all(bytes(content), "zstd")


def test_files_of_other_makers_and_of_later_versions_are_told_apart() -> None:
    with pytest.raises(ImageError, match="of other tools"):
        read_all(frame_of("zstd", os.urandom(200)), "zstd")
    with pytest.raises(ImageError, match="algorithm 9, which this version does not know"):
        content = bytearray(image("zstd"))
        struct.pack_into("<I", content, 16, 9)
        read_all(bytes(content), "zstd")
    with pytest.raises(ImageError, match="compressed by zstd"):
        read_all(image("zstd"), "lz4")


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["lz4", "zstd"]),
    st.one_of(st.binary(max_size=200), st.integers(0, 400).map(lambda n: frame_of("zstd", bytes(PAGE))[:n])),
    st.sampled_from([PAGE, 2 * PAGE]),
)
def test_whatever_is_in_a_frame_ends_in_an_image_error_or_a_chunk(method: str, frame: bytes, says: int) -> None:
    try:
        assert len(codec(method).decompress(frame, memoryview(bytearray(says)))) == says
    except ValueError:
        pass


@settings(max_examples=200)
@given(st.data())
def test_damage_to_several_bytes_is_found(data: Any) -> None:
    content = bytearray(SMALL)
    for at, value in data.draw(st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255))).items():
        content[at] = value
    if bytes(content) == SMALL:
        assert read_all(SMALL, "lz4") == b"".join(CHUNKS[2:])
    else:
        with pytest.raises(ImageError, match=r"^pages-1\.img\.x: "):
            read_all(bytes(content), "lz4")


SMALL = image("lz4", CHUNKS[2:])


def test_a_compressed_file_has_these_bytes() -> None:
    content = image("lz4", [bytes(PAGE)])
    assert content[:24].hex() == "502a4d181000000047525041474553010100000000000800"
    assert content[24:31].hex() == "04224d18607073"
    assert content[-40:-32].hex() == "522a4d1820000000"
    assert content[-8:] == chunked.MAGIC
