"""What a command loads before it begins: start-up is most of what a small restore takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = """
from gpurestore.cli.deferred import NAMES, defer
defer()
import sys
from gpurestore.cli import build_parser
build_parser("restore")
import gpurestore.cli.restore, gpurestore.cli.running, gpurestore.namespaces, gpurestore.pipeline.restore
lazy = {name for name in NAMES if type(sys.modules.get(name)).__name__ == "_LazyModule"}
print(*sorted(sys.modules.keys() - lazy))
"""
LIBRARY = "import gpurestore, sys; gpurestore.restore_sync; print(*sorted(sys.modules))"

# Packages and modules with all that lies below them.
OTHERS = ("check", "cli.dump", "cli.inspect", "cli.plugins", "cli.timeline", "demo", "images.inspect", "images.writer")
OTHERS += ("pipeline.collect", "pipeline.drawing", "pipeline.dump", "pipeline.timeline", "pipeline.tracefile")
PLUGINS = ("devplugins.cplugin", "devplugins.cuda", "devplugins.load", "devplugins.pyplugin", "devplugins.softaccel")
HEAVY = ("asyncio", "concurrent", "email", "html", "http", "importlib.metadata", "cramjam", "multiprocessing", "numpy")
HEAVY += ("PIL", "pkg_resources", "pynvml", "setuptools", "trio.testing", "unittest", "uuid", "xml", "zstandard")


def _loaded(code: str) -> set[str]:
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def _below(loaded: set[str], names: tuple[str, ...]) -> set[str]:
    return {module for module in loaded if any(f"{module}.".startswith(f"{name}.") for name in names)}


@pytest.mark.parametrize("code", [COMMAND, LIBRARY], ids=["command", "library"])
def test_a_restore_loads_nothing_of_other_commands_and_no_plugin(code: str) -> None:
    loaded = _loaded(code)
    assert "gpurestore.pipeline.restore" in loaded
    assert _below(loaded, tuple(f"gpurestore.{name}" for name in OTHERS + PLUGINS)) == set()
    assert _below(loaded, HEAVY) == set()


def test_the_command_leaves_unloaded_what_only_our_libraries_name() -> None:
    loaded = _loaded(COMMAND)
    assert {"trio", "google.protobuf.message"} <= loaded
    assert loaded.isdisjoint({"google.protobuf.internal.python_message", "hmac", "idna"})


def test_a_deferred_module_is_whole_once_it_is_used() -> None:
    code = (
        "from gpurestore.cli.deferred import defer; defer(); import trio, idna; print(idna.encode('bücher').decode())"
    )
    assert _loaded(code) == {"xn--bcher-kva"}


def test_the_library_defers_nothing_in_a_process_that_is_not_its_own() -> None:
    loaded = _loaded(LIBRARY)
    assert "gpurestore.cli.deferred" not in loaded and not _below(loaded, ("gpurestore.cli",))


@pytest.mark.parametrize(
    "words",
    [["dump", "-t", "999999999", "-D", "x"], ["restore", "-D", "x", "--dry-run"], ["inspect", "x"]],
    ids=lambda words: words[0],
)
def test_ctrl_c_waits_while_messages_are_loaded(words: list[str]) -> None:
    program = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "gpurestore.images.common_pb2":
            os.kill(os.getpid(), signal.SIGINT)
            print("held back" if signal.SIGINT in signal.sigpending() else "taken")
sys.meta_path.insert(0, Finder())
from gpurestore.cli import main
sys.exit(main(sys.argv[1:]))
"""
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("held back\n", f"gpurestore: {words[0]}: interrupted\n")
    assert result.returncode == 130
