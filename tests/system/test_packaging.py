"""What users install: one package, whole, that runs without the tree it was built from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source archive, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("archives")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_source_archive_holds_all_sources_and_no_links(archives: Path) -> None:
    with tarfile.open(only(archives, "*.tar.gz")) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if "/" in member.name}
    assert {"cext/build_core.py", "cext/agent.c", "cext/agent.lds", "cext/gr_error.h", "Makefile", "LICENSE"} <= names
    assert {"pipeline/__init__.py", "devplugins/__init__.py"} <= names
    assert not any(name.startswith(("gpurestore/pipeline", "gpurestore/devplugins")) for name in names)
    assert not any(member.issym() for member in members)


def test_the_wheel_is_for_every_python_from_3_11_and_holds_one_package(archives: Path) -> None:
    wheel = only(archives, "*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpurestore"}
    modules = {
        str(path.relative_to(ROOT))
        for layer in ("gpurestore", "pipeline", "devplugins")
        for path in (ROOT / layer).rglob("*.py")
        if not path.is_relative_to(ROOT / "gpurestore/images/proto")
        and not path.is_relative_to(ROOT / "gpurestore/pipeline")
        and not path.is_relative_to(ROOT / "gpurestore/devplugins")
    }
    expected = {name if name.startswith("gpurestore/") else f"gpurestore/{name}" for name in modules}
    assert {name for name in names if name.endswith(".py")} == expected
    others = {"gpurestore/py.typed", "gpurestore/_core.abi3.so", "gpurestore/include/gpurestore-plugin.h"}
    assert others <= set(names)


def test_the_installed_package_works_without_the_tree(archives: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(only(archives, "*.whl"))], check=True, capture_output=True, timeout=120)
    assert {path.name.split("-")[0] for path in target.iterdir()} <= {"gpurestore", "bin"}
    code = (
        "import gpurestore._core, gpurestore.cli, gpurestore.pipeline.trace, gpurestore.devplugins as d, sys\n"
        "print(gpurestore._core.__file__, gpurestore.pipeline.trace.__file__, d.__file__, sep='\\n')\n"
        "sys.exit(gpurestore.cli.main(['check', '--json']) not in (0, 1))"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    files = done.stdout.splitlines()[:3]
    assert all(Path(file).is_relative_to(target / "gpurestore") for file in files), files
