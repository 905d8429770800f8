"""Reading dump folders: nothing in them is trusted, and what is wrong is named."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import image_samples as samples

from gpurestore.errors import ImageError, UsageError
from gpurestore.images import pb
from gpurestore.images.container import encode_image
from gpurestore.images.folder import GhostRun, ImageFolder
from gpurestore.images.inventory import build_inventory
from gpurestore.images.magic import KINDS


@pytest.fixture
def images(tmp_path):
    return samples.make(tmp_path / "images")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.touch(), "Not a directory"),
        (lambda path: path.mkdir(), "holds no images"),
        (lambda path: (path.mkdir(), (path / "other.img").touch()), "holds no images"),
    ],
)
def test_a_folder_without_images_is_a_usage_error(tmp_path, make, why):
    make(tmp_path / "images")
    with pytest.raises(UsageError, match=why):
        ImageFolder(tmp_path / "images")


def test_every_missing_file_is_named(images):
    for path in images.iterdir():
        if path.name == "gpurestore.json":
            continue
        moved = path.rename(images.parent / path.name)
        with pytest.raises(ImageError, match=f"images/{path.name}: missing"):
            samples.read_everything(images)
        moved.rename(path)


def test_every_truncated_or_longer_file_is_named(images):
    for path in images.iterdir():
        data = path.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 2}:
            path.write_bytes(data[:length])
            with pytest.raises(ImageError, match=f"images/{path.name}: (truncated|damaged)"):
                samples.read_everything(images)
        path.write_bytes(data + b"\0")
        with pytest.raises(ImageError, match=f"images/{path.name}: (too long|damaged)"):
            samples.read_everything(images)
        path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_any_file_is_found(images):
    for path in images.iterdir():
        data = bytearray(path.read_bytes())
        step = max(1, len(data) // 150)
        for index in range(0, len(data), step):
            data[index] ^= 1 << index % 8
            path.write_bytes(data)
            data[index] ^= 1 << index % 8
            why = samples.refusal(samples.read_everything, images)
            if why is None:
                assert path.name == "gpurestore.json"  # white space
            else:
                assert why.startswith(f"{images}/{path.name}: ")
        path.write_bytes(data)
    samples.read_everything(images)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_any_files_of_a_foreign_dump_are_an_image_error_or_valid(images, data):
    samples.like_criu(images)
    name = data.draw(st.sampled_from([n for n in samples.names(images) if not n.startswith("pages-")]))
    path = images / name
    before = path.read_bytes()
    body = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(body)))
        body[where : where + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=6))
    path.write_bytes(body)
    try:
        why = samples.refusal(samples.read_everything, images)
    finally:
        path.write_bytes(before)
    assert why is None or why.startswith(str(images))


def test_an_image_that_is_not_of_this_dump_is_named(images):
    (images / "core-1.img").touch()
    with pytest.raises(ImageError, match=r"core-1\.img: not part of this dump"):
        ImageFolder(images)


def test_other_files_may_lie_beside_the_images(images):
    (images / "restore.log").touch()
    (images / "stats-restore").touch()
    with ImageFolder(images) as folder:
        folder.verify()


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(images, kind):
    samples.like_criu(images)
    path = images / "pstree.img"
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    with (
        ImageFolder(images) as folder,
        pytest.raises(ImageError, match=r"pstree\.img: (not a regular|cannot be opened)"),
    ):
        folder.read("pstree")


def test_an_absurdly_large_image_is_refused_unread(images):
    samples.like_criu(images)
    os.truncate(images / "mm-4242.img", 1 << 40)
    with ImageFolder(images) as folder, pytest.raises(ImageError, match="1099511627776 bytes are too many"):
        folder.read("mm", samples.ROOT_PID)


def test_a_dump_of_criu_has_no_manifest(tmp_path):
    samples.like_criu(tmp_path)
    (tmp_path / "dump.log").touch()
    with ImageFolder(tmp_path) as folder:
        assert folder.manifest is None
        folder.verify()


@pytest.mark.parametrize("records", [0, 2])
def test_one_record_is_one_record(tmp_path, records):
    (tmp_path / "inventory.img").write_bytes(
        encode_image(KINDS["inventory"], [build_inventory(samples.ids())] * records)
    )
    with pytest.raises(ImageError, match=rf"inventory\.img: damaged: {records} records instead of one"):
        ImageFolder(tmp_path)


def test_the_chunks_of_a_ghost_file_are_found_and_checked(tmp_path):
    kind = KINDS["ghost-file"]
    head = encode_image(kind, [pb.ghost_file_entry(uid=0, gid=0, mode=0o100600, chunks=True, size=9000)])
    chunks = b""
    for offset, content in ((0, b"abc"), (8192, b"x" * 100)):
        body = pb.ghost_chunk_entry(len=len(content), off=offset).SerializeToString()
        chunks += len(body).to_bytes(4, "little") + body + content
    samples.like_criu(tmp_path)
    path = tmp_path / "ghost-file-2.img"
    path.write_bytes(head + chunks)
    with ImageFolder(tmp_path) as folder:
        _, runs = folder.read_ghost(2)
        assert runs == [GhostRun(len(head) + 8, 0, 3), GhostRun(len(head) + 8 + 3 + 9, 8192, 100)]
        path.write_bytes((head + chunks)[:-1])
        with pytest.raises(ImageError, match="a chunk of 100 bytes, but 99 are left"):
            folder.read_ghost(2)


def test_a_dump_of_ours_without_its_manifest_is_not_taken_for_one_of_criu(tmp_path):
    folder = samples.make(tmp_path / "images")
    (folder / "gpurestore.json").unlink()
    with pytest.raises(ImageError, match=r"gpurestore\.json: missing"):
        ImageFolder(folder)
