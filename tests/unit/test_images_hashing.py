"""Checksums of image files, by several threads at once."""

from __future__ import annotations

import os

import pytest

from gpurestore.errors import ImageError
from gpurestore.images import hashing


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, (1 << 18) - 1])
def test_a_checksum_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch, size):
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(hashing, "_INLINE_BYTES", 0)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        records = [hashing.hash_files(fd, {"file": size}, jobs)["file"] for jobs in (1, 3, 8)]
    finally:
        os.close(fd)
    assert len(set(records)) == 1
    if size <= 1 << 16:
        assert records[0].xxh3_128 == hashing.xxhash.xxh3_128_hexdigest(data)


def test_the_first_failure_of_a_thread_ends_the_others():
    done = []

    def fail():
        raise ImageError("first")

    with pytest.raises(ImageError, match="first"):
        hashing.run_in_threads([fail, *[lambda: done.append(1)] * 1000], 1)
    assert done == []
