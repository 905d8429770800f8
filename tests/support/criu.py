"""CRIU as a reference, where there is one: ``CRIU=`` names the program, else ``criu`` on the path.

``crit`` is ``CRIT=``, else ``crit`` on the path, else it is made out of the source tree that ``CRIU=`` was built in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Criu:
    """The program, and how it is run."""

    program: Path

    def run(self, command: str, images: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a command on an image folder; its log becomes the standard output."""
        log = images / f"{command}.log"
        result = subprocess.run(
            [self.program, command, "-D", images, "-v4", "-o", log.name, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        result.stdout = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        return result


@dataclass(frozen=True)
class Crit:
    """The image tool."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def decode(self, image: Path) -> dict[str, Any]:
        """An image file as JSON."""
        result = subprocess.run(
            [*self.command, "decode", "-i", image],
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment},
            check=False,
        )
        assert result.returncode == 0, f"crit cannot decode {image.name}: {result.stderr[-2000:]}"
        decoded: dict[str, Any] = json.loads(result.stdout)
        return decoded


def find_criu() -> Criu | None:
    """CRIU, if it runs here."""
    named = os.environ.get("CRIU") or shutil.which("criu")
    if not named:
        return None
    try:
        check = subprocess.run([named, "check"], capture_output=True, timeout=30, check=False)
    except OSError:
        return None
    return Criu(Path(named)) if check.returncode == 0 else None


def find_crit(folder: Path) -> Crit | None:
    """crit; one that is made out of CRIU's source tree lies in ``folder``."""
    named = os.environ.get("CRIT") or shutil.which("crit")
    if named:
        return Crit((named,), {})
    criu = os.environ.get("CRIU")
    if not criu:
        return None
    source = Path(criu).resolve().parent.parent
    if not (source / "crit" / "crit").is_dir() or importlib.util.find_spec("grpc_tools") is None:
        return None
    return _make_crit(source, folder)


def _make_crit(source: Path, folder: Path) -> Crit:
    """What CRIU's makefiles do for its Python parts, outside of its tree."""
    shutil.copytree(source / "lib" / "pycriu", folder / "pycriu")
    shutil.copytree(source / "crit" / "crit", folder / "crit")
    for package in ("pycriu", "crit"):
        (folder / package / "version.py").write_text("__version__ = '0'\n")
    protos = sorted(path.name for path in (source / "images").glob("*.proto"))
    images = folder / "pycriu" / "images"
    for names, target in ((protos, images), (["rpc.proto"], folder / "pycriu")):
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", f"-I{source / 'images'}", f"--python_out={target}", *names],
            check=True,
            cwd=source / "images",
        )
    generator = source / "scripts" / "magic-gen.py"
    header = source / "criu" / "include" / "magic.h"
    subprocess.run([sys.executable, generator, header, images / "magic.py"], check=True, stdout=subprocess.DEVNULL)
    modules = [
        name.removesuffix(".proto").replace("-", "_") for name in protos if name not in ("opts.proto", "rpc.proto")
    ]
    _suit_new_protobuf(images / "pb2dict.py")
    (images / "pb.py").write_text("".join(f"from .{name}_pb2 import *\n" for name in modules))
    return Crit((sys.executable, "-W", "ignore", "-m", "crit"), {"PYTHONPATH": str(folder)})


def _suit_new_protobuf(module: Path) -> None:
    """Descriptors of protobuf 7 have ``is_repeated`` in place of ``label``; crit still asks the old way."""
    text = module.read_text()
    module.write_text(text.replace("field.label == FD.LABEL_REPEATED", "field.is_repeated"))
