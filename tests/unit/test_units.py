"""Numbers as people read them."""

from __future__ import annotations

import pytest

from gpurestore.units import format_bytes, format_seconds, size_and_speed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0.0 ms"), (0.9999, "1.00 s"), (99.4, "99.40 s"), (123.4, "2 min 03 s")]
)
def test_seconds_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_bytes_are_written_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_what_cannot_be_said_of_a_size_and_its_speed_is_left_empty() -> None:
    assert size_and_speed(3_000_000_000, 1.5) == ("2.8 GiB", "2.00 GB/s")
    assert size_and_speed(512, 0.0) == ("512 B", "")
    assert size_and_speed(0, 1.0) == ("", "")
