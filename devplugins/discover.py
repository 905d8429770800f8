"""Where plugins are: a folder of shared objects and Python files, and the entry points of installed packages.

Looking must cost next to nothing where there is none, so the metadata of packages is read here without importlib's
machinery (tens of milliseconds), and nothing is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpurestore.errors import PluginNotFoundError, PluginOpenError

GROUP = "gpurestore.devplugins"
FOLDER_VARIABLE = "CRIU_LIBS_DIR"
DEFAULT_FOLDER = Path("/usr/lib/criu")


class Found(NamedTuple):
    """A plugin that may be loaded: a file, or an entry point's ``target``.

    ``asked_for``: somebody named the folder. One that merely lies in CRIU's own folder and needs CRIU's inside is
    passed over instead of ending the operation.
    """

    name: str
    path: Path | None = None
    target: str = ""
    asked_for: bool = True


def find(libdir: Path | None, *, packages: bool = True) -> list[Found]:
    """All plugins, in the order in which they are loaded and asked: the folder's by file name, then the packages'.

    Without ``packages`` only the folder's: nobody asks for the others, and looking takes some milliseconds.
    """
    return [*_in_folder(libdir), *(entry_points() if packages else [])]


def _in_folder(libdir: Path | None) -> Iterator[Found]:
    asked_for = True
    if libdir is None:
        variable = os.environ.get(FOLDER_VARIABLE)
        libdir = Path(variable) if variable else DEFAULT_FOLDER
        asked_for = bool(variable)
    try:
        names = sorted(os.listdir(libdir))
    except (FileNotFoundError, NotADirectoryError) as error:
        if not asked_for:
            return
        raise PluginNotFoundError(str(libdir), "there is no such folder (-L, or CRIU_LIBS_DIR)") from error
    except OSError as error:
        raise PluginOpenError(str(libdir), f"the folder cannot be read: {error.strerror}") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix == ".so" or (suffix == ".py" and not name.startswith(("_", "."))):
            yield Found(stem, Path(os.path.abspath(libdir / name)), asked_for=asked_for)


def entry_points() -> list[Found]:
    """Entry points of :data:`GROUP` in the packages on sys.path, by name."""
    folders: dict[str, str] = {}  # of each distribution the metadata
    for suffix in (".dist-info", ".egg-info"):  # the latter also lies in source trees, often out of date
        for folder in dict.fromkeys(path or "." for path in sys.path):
            for name in _listed(folder):
                if name.endswith(suffix):
                    distribution = name[: -len(suffix)].split("-")[0].lower().replace(".", "_")
                    folders.setdefault(distribution, os.path.join(folder, name))
    found = {Found(name, target=target) for folder in folders.values() for name, target in _points(folder)}
    return sorted(found, key=lambda item: (item.name, item.target))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _points(folder: str) -> Iterator[tuple[str, str]]:
    try:
        with open(os.path.join(folder, "entry_points.txt"), "rb") as file:
            data = file.read()
    except OSError:
        return
    if GROUP.encode() not in data:
        return
    section = ""
    for line in data.decode("utf-8", "replace").splitlines():
        text = line.strip()
        if text.startswith("[") and text.endswith("]"):
            section = text[1:-1].strip()
        elif section == GROUP and "=" in text and not text.startswith(("#", ";")):
            name, _, target = text.partition("=")
            yield name.strip(), target.split("[")[0].strip()
