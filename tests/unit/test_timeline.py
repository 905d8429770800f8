"""The picture of a trace: reading strictly, laying out without overlaps, writing three formats."""

from __future__ import annotations

import builtins
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from gpurestore.cli import main
from gpurestore.errors import TraceFileError, UsageError
from gpurestore.pipeline import drawing, timeline
from gpurestore.pipeline.drawing import Drawing, Rect, Text, text_width
from gpurestore.pipeline.trace import KINDS, Span, Trace, chrome_events
from gpurestore.pipeline.tracefile import TraceFile, read_trace

MS = 1_000_000


def span(name: str, start_ms: float, end_ms: float, track: str = "main", **args: Any) -> Span:
    return Span(name, track, int(start_ms * MS), int(end_ms * MS), dict(args))


def small_restore() -> list[Span]:
    memory = span("memory", 12, 900, "task 30", bytes=1 << 30)
    pump = span("pump", 13, 890, "task 30 worker 1")
    pump.part_of = memory
    device = span("POST_FORKING", 12, 1200, "plugin softaccel", bytes=3 << 30)
    late = span("RESUME_DEVICES_LATE", 1200.1, 1250, "task 30")
    late.after = (memory, device)
    return [span("fork", 0, 12), memory, pump, device, late, span("release", 1250, 1251)]


def write(path: Path, spans: list[Span]) -> Path:
    path.write_text(json.dumps(chrome_events(spans, 0)))
    return path


def trace_of(tmp_path: Path, spans: list[Span]) -> TraceFile:
    return read_trace(write(tmp_path / "trace.json", spans))


# ---- reading


def test_a_trace_is_read_back_as_it_was(tmp_path: Path) -> None:
    spans = small_restore()
    read = sorted(trace_of(tmp_path, spans).spans, key=lambda s: (s.start_ns, s.end_ns or 0, s.name))
    wanted = sorted(spans, key=lambda s: (s.start_ns, s.end_ns or 0, s.name))
    assert [(s.name, s.track, s.start_ns, s.end_ns, s.args, s.kind) for s in read] == [
        (s.name, s.track, s.start_ns, s.end_ns, s.args, s.kind) for s in wanted
    ]
    late = next(s for s in read if s.name == "RESUME_DEVICES_LATE")
    assert {s.name for s in late.after} == {"memory", "POST_FORKING"}
    pump = next(s for s in read if s.name == "pump")
    assert pump.part_of is not None
    assert pump.part_of.name == "memory"


def test_lanes_of_one_track_are_one_track(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [span("a", 0, 10, "task 1"), span("b", 5, 15, "task 1")])
    assert [name for name, _ in trace.rows] == ["task 1", "task 1 (2)"]
    assert {s.track for s in trace.spans} == {"task 1"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data["traceEvents"][-1].update(ph="B"), "ph is 'B'"),
        (lambda data: data["traceEvents"][-1].update(ts=-1), "ts is -1"),
        (lambda data: data["traceEvents"][-1].update(dur=1e300), "dur is 1e\\+300"),
        (lambda data: data["traceEvents"][-1].update(dur=True), "dur is True"),
        (lambda data: data["traceEvents"][-1].update(dur=None), "dur is None"),
        (lambda data: data["traceEvents"][-1].update(tid=99), "track 99 has no name"),
        (lambda data: data["traceEvents"][-1].update(name=""), "name is ''"),
        (lambda data: data["traceEvents"][-1].update(cat="toplevel"), "cat is 'toplevel'"),
        (lambda data: data["traceEvents"][-1].update(args=[]), "not an object with args"),
        (lambda data: data["traceEvents"][-1]["args"].update(span=True), "span is True"),
        (lambda data: data["traceEvents"][-1]["args"].update(after=[77]), "there is no span 77"),
        (lambda data: data["traceEvents"][-1]["args"].update(after=3), "after is not a list"),
        (lambda data: data["traceEvents"][-1]["args"].update(part_of="x"), "there is no span 'x'"),
        (lambda data: data["traceEvents"][-1]["args"].update(bytes=-5), "bytes is -5"),
        (lambda data: data["traceEvents"][-1]["args"].update(what={}), "what is neither"),
        (lambda data: data["traceEvents"].append(data["traceEvents"][-1]), "there are two spans"),
        (lambda data: data["traceEvents"].append(data["traceEvents"][1]), "has a name already"),
        (lambda data: data["traceEvents"].append(None), "not an object"),
        (lambda data: data.update(traceEvents=[]), "no stages"),
        (lambda data: data.pop("traceEvents"), "no list traceEvents"),
    ],
)
def test_anything_odd_is_named_with_its_place(tmp_path: Path, change: Any, complaint: str) -> None:
    data: dict[str, Any] = json.loads(json.dumps(chrome_events(small_restore(), 0)))
    change(data)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    with pytest.raises(TraceFileError, match=rf"odd\.json: .*{complaint}"):
        read_trace(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"traceEvents": [NaN]}', "\udc80", "[]", "3"])
def test_what_is_no_json_object_is_no_trace(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TraceFileError, match=r"odd\.json"):
        read_trace(path)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurestore.pipeline.tracefile.MAX_FILE_BYTES", 100)
    with pytest.raises(TraceFileError, match="is larger than"):
        trace_of(tmp_path, small_restore())


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match=r"cannot read the trace .*No such file"):
        read_trace(tmp_path / "none")


# ---- layout


def texts(picture: Drawing) -> list[tuple[Text, tuple[float, float, float, float]]]:
    boxes = []
    for shape in picture.shapes:
        if isinstance(shape, Text):
            width = text_width(shape.text, shape.size, bold=shape.bold)
            left = shape.x - {"start": 0.0, "middle": width / 2, "end": width}[shape.anchor]
            boxes.append((shape, (left, shape.y - shape.size * 0.75, left + width, shape.y + shape.size * 0.2)))
    return boxes


def overlap(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def random_restore(seed: int) -> list[Span]:
    """Anything from one task to thirty, seconds or microseconds, crowded or empty."""
    dice = random.Random(seed)
    unit = 10 ** dice.uniform(-2, 5)
    spans = [span("verify", 0, unit * dice.random(), bytes=dice.randrange(1 << 36))]
    for number in range(dice.randint(1, 30)):
        track = dice.choice([f"task {dice.randrange(1, 1 << 22)}", f"plugin p{number}", "task 5 worker 2", "main"])
        at = unit * dice.random() ** 2
        for _ in range(dice.randint(1, 12)):
            length = unit * dice.random() ** 6
            name = dice.choice(["memory", "RESUME_DEVICES_LATE", "descriptors", "a rather long name of a stage"])
            spans.append(span(name, at, at + length, track, bytes=dice.randrange(1 << 30)))
            at += length * dice.choice([0.5, 1, 1.01, 3])
    return spans


@pytest.mark.parametrize("seed", range(16))
def test_no_text_lies_on_another_or_leaves_the_picture(tmp_path: Path, seed: int) -> None:
    picture = timeline.draw(trace_of(tmp_path, random_restore(seed)), f"restore {seed}")
    assert picture.width == timeline.WIDTH
    boxes = texts(picture)
    for _, box in boxes:
        assert box[0] >= 0
        assert box[2] <= picture.width
        assert 0 <= box[1] < box[3] <= picture.height
    for (one, first), (two, second) in combinations(boxes, 2):
        assert not overlap(first, second), (one, two)


def test_a_long_title_path_and_track_are_cut_not_spilled(tmp_path: Path) -> None:
    spans = [span("W" * 60, i * 10, i * 10 + 10, "task 123456 " + "x" * 200) for i in range(40)]
    picture = timeline.draw(trace_of(tmp_path, spans), "T" * 500)
    assert all(box[2] <= picture.width for _, box in texts(picture))
    assert any(text.text.endswith("...") for text, _ in texts(picture))


def test_very_many_stages_are_drawn_as_few_bars(tmp_path: Path) -> None:
    spans = [span("memory", i, i + 0.9, f"task {i % 2}") for i in range(20_000)]
    picture = timeline.draw(trace_of(tmp_path, spans), "x")
    assert len(picture.shapes) < 5000


def test_every_track_has_a_row_main_first_and_plugins_last(tmp_path: Path) -> None:
    tracks = ["plugin a", "task 12 worker 10", "task 12 worker 2", "task 9", "task 12", "main"]
    spans = [span("memory", 0, 10, track) for track in tracks]
    picture = timeline.draw(trace_of(tmp_path, spans), "x")
    rows = [text.text for text, _ in texts(picture) if text.size == 12.0 and text.y > 115]
    assert rows == ["main", "task 9", "task 12", "worker 2", "worker 10", "plugin a"]


def test_a_bar_says_stage_bytes_and_speed_and_its_kind_shows(tmp_path: Path) -> None:
    picture = timeline.draw(trace_of(tmp_path, small_restore()), "x")
    labels = [text.text for text, _ in texts(picture)]
    assert "memory 1.0 GiB, 1.21 GB/s" in labels
    assert "POST_FORKING 3.0 GiB, 2.71 GB/s" in labels
    hints = {shape.hint.split(" (")[0]: shape for shape in picture.shapes if isinstance(shape, Rect) and shape.hint}
    assert len({hints[name].fill for name in ("memory", "POST_FORKING")}) == 2
    assert hints["POST_FORKING"].stroke != hints["memory"].stroke  # one is on the critical path
    assert {"host memory", "devices and plugins", "on the critical path"} <= set(labels)
    assert len(KINDS) == 4


def test_failed_stages_say_so(tmp_path: Path) -> None:
    picture = timeline.draw(trace_of(tmp_path, [span("check", 0, 10, error="ImageError")]), "x")
    assert "check failed: ImageError" in [text.text for text, _ in texts(picture)]


def test_stages_without_any_length_can_be_drawn(tmp_path: Path) -> None:
    timeline.draw(trace_of(tmp_path, [span("a", 0, 0), span("b", 0, 0, "task 1")]), "x")


# ---- files


@pytest.mark.parametrize("ending", ["svg", "html", "png"])
def test_the_command_writes_the_same_bytes_each_time(tmp_path: Path, ending: str) -> None:
    if ending == "png":
        pytest.importorskip("PIL", reason="PNG is drawn by the optional package Pillow")
    source = write(tmp_path / "t.json", small_restore())
    written = []
    for name in ("one", "two"):
        target = tmp_path / f"{name}.{ending}"
        assert main(["timeline", str(source), "-o", str(target), "--title", "restore"]) == 0
        written.append(target.read_bytes())
    assert written[0] == written[1]
    assert len(list(tmp_path.iterdir())) == 3
    if ending == "png":
        assert written[0].startswith(b"\x89PNG")


def test_names_from_outside_cannot_break_out_of_the_markup(tmp_path: Path) -> None:
    evil = 'x"><script>alert(1)</script>&\x00\x1b\n'
    trace = trace_of(tmp_path, [span(evil, 0, 10, f"plugin {evil}", why=evil, error=evil)])
    page = timeline.to_html(trace, evil)
    assert "<script" not in page
    root = ElementTree.fromstring(drawing.to_svg(timeline.draw(trace, evil)))
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_the_page_is_whole_in_itself_and_has_tables(tmp_path: Path) -> None:
    page = timeline.to_html(trace_of(tmp_path, small_restore()), "restore")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<td>POST_FORKING</td><td>plugin softaccel</td>" in page


def test_a_name_that_says_no_format_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "t.json", small_restore())
    assert main(["timeline", str(source), "-o", str(tmp_path / "out.pdf")]) == 2
    assert "must end in .svg, .html or .png" in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "t.json", small_restore())
    assert main(["timeline", str(source), "-o", str(tmp_path / "none" / "x.svg")]) == 1
    assert "cannot write the picture to" in capsys.readouterr().err


def test_without_pillow_a_png_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    source = write(tmp_path / "t.json", small_restore())
    with pytest.raises(UsageError, match=r"pip install 'gpurestore\[png\]'"):
        timeline.draw_file(source, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_what_a_trace_writes_can_be_drawn(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("plan") as plan, trace.span("POST_FORKING", track="plugin p", after=[plan], retries=1):
        pass
    trace.write(tmp_path / "t.json")
    timeline.draw_file(tmp_path / "t.json", tmp_path / "t.svg")
    ElementTree.parse(tmp_path / "t.svg")
