"""The report on what this machine allows."""

from __future__ import annotations

import errno
import json
import os

import pytest

from gpurestore import check
from gpurestore.check import CHECKS, Check, check_all, format_report
from gpurestore.cli import main


def fails() -> str | None:
    raise OSError(errno.EPERM, "x")


def test_every_check_has_a_name_of_its_own_a_purpose_and_a_remedy() -> None:
    assert len({c.name for c in CHECKS}) == len(CHECKS)
    assert all(c.purpose and c.remedy for c in CHECKS)


def test_all_checks_run_anywhere_and_leave_no_child_behind() -> None:
    results = check_all()
    assert [r.name for r in results] == [c.name for c in CHECKS]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_is_missing_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (
        Check("good", lambda: None, "for this", "do nothing"),
        Check("bad", lambda: "it is off", "for that", "switch it on"),
        Check("nice", fails, "for fun", "ask root", required=False),
    )
    monkeypatch.setattr(check, "CHECKS", checks)
    assert format_report(check_all()).splitlines() == [
        "ok      good  for this",
        "MISSING bad   it is off; for that",
        "              -> switch it on",
        "missing nice  Operation not permitted; for fun",
        "              -> ask root",
        "",
        "not ready: bad",
    ]


@pytest.mark.parametrize(("missing", "code"), [(None, 0), ("gone", 1)])
def test_the_command_ends_with_1_when_something_required_is_missing(
    missing: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CHECKS", (Check("thing", lambda: missing, "for this", "get one"),))
    assert main(["check", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is (code == 0)
    assert report["checks"][0]["name"] == "thing"
    assert main(["check"]) == code
    assert capsys.readouterr().out.endswith("not ready: thing\n" if code else "ready to dump and restore\n")


def test_an_old_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "5.10.0-28-amd64")
    assert check._kernel() == "this is 5.10.0-28-amd64"
    monkeypatch.setattr("platform.release", lambda: "6.1-rc3")
    assert check._kernel() is None
