"""The compiled part of the build: the agent blob first, then the C core that carries it. The rest is pyproject.toml."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

CORE = runpy.run_path(str(Path(__file__).parent / "cext" / "build_core.py"))


class BuildCore(build_ext):
    """Builds the agent before the extension that includes it."""

    def build_extensions(self) -> None:
        """Compile the agent to a flat binary, then everything else."""
        CORE["build_agent"]()
        super().build_extensions()


class SourceArchive(sdist):
    """A source archive whose files are never hard links to the tree they came from."""

    def run(self) -> None:
        """Drop generated files of an earlier build first: the list of files is made afresh."""
        Path("gpurestore.egg-info/SOURCES.txt").unlink(missing_ok=True)
        super().run()


setup(
    cffi_modules=["cext/build_core.py:ffi"],
    cmdclass={"build_ext": BuildCore, "sdist": SourceArchive},
    # One wheel for every CPython from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
