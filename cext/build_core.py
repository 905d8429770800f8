"""Builds gpurestore._core: the C units of this folder behind cffi's API mode, and the agent as a flat binary inside.

Run by setup.py. A unit is a name: ``gr_NAME.h`` is what Python may call and ``gr_NAME.c``, if there is one, its code.
A header is at once valid C and, without the lines that start with ``#``, a cffi declaration.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from cffi import FFI

# In the order in which later headers use the types of earlier ones.
UNITS = (
    "gr_error",
    "gr_region",
    "gr_tracer",
    "gr_outside",
    "gr_cpu",
    "gr_pagemap_codec",
    "gr_runs",
    "gr_pagescan",
    "gr_frames",
    "gr_crc64",
    "gr_pages_out",
    "gr_placing",
    "gr_pump",
    "gr_chunk_read",
    "gr_scatter",
    "gr_stage",
    "gr_lazy",
    "gr_plugin",
)
# C units that Python does not see, such as the one that carries the agent.
INTERNAL_UNITS = (
    "gr_agent_blob",
    "gr_tracee",
    "gr_freeze",
    "gr_gadget",
    "gr_sigframe",
    "gr_inject",
    "gr_spawn",
    "gr_workers",
    "gr_read_pieces",
    "gr_zeros",
    "gr_pump_queue",
    "gr_pump_fill",
    "gr_lazy_source",
    "gr_lazy_mm",
    "gr_lazy_serve",
    "gr_lazy_faults",
    "gr_lazy_fill",
    "gr_lazy_views",
    "gr_lazy_handler",
    "gr_lazy_keeper",
    "gr_plugin_crash",
    "gr_plugin_symbols",
)
# What C calls in Python.
CALLBACKS = """
extern "Python" void gr_plugin_log_python(int level, const char *plugin, const char *text);
"""

ROOT = Path(__file__).resolve().parent.parent
CEXT = ROOT / "cext"
BUILD = ROOT / "build"
AGENT_SOURCE = CEXT / "agent.c"
AGENT_SCRIPT = CEXT / "agent.lds"

WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("GPURESTORE_WERROR") == "1" else [])]
CORE_FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-fvisibility=hidden", "-pthread", *WARNINGS]
# No instruction beyond the general registers: the agent must not disturb what XSTATE holds. -fcf-protection=none
# keeps endbr64 and the property note away, -z text turns any need for a relocation into a link error.
AGENT_FLAGS = [
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-fPIE",
    "-static-pie",
    "-nostdlib",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fcf-protection=none",
    *WARNINGS,
    "-Wl,-z,text",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
]
# cffi's generated code is not ours to mend.
IGNORED = ("unused-parameter", "missing-field-initializers", "cast-function-type", "sign-compare", "unused-function")
PREAMBLE_PRAGMAS = "".join(f'#pragma GCC diagnostic ignored "-W{name}"\n' for name in IGNORED)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL).stdout


def build_agent() -> None:
    """Compile the agent to ``build/agent.bin``; fail if it is anything but code that runs wherever it lies."""
    if not AGENT_SOURCE.exists():
        return
    cc = os.environ.get("CC", "gcc").split()
    BUILD.mkdir(exist_ok=True)
    elf, flat = BUILD / "agent.elf", BUILD / "agent.bin"
    _run(*cc, *AGENT_FLAGS, f"-I{CEXT}", f"-Wl,-T,{AGENT_SCRIPT}", str(AGENT_SOURCE), "-o", str(elf))
    relocations = _run("readelf", "-rW", str(elf))
    if "There are no relocations" not in relocations:
        raise SystemExit(f"cext/agent.c needs relocations, so it would only run where it was linked:\n{relocations}")
    partial = flat.with_name(f"agent.bin.{os.getpid()}")
    _run(os.environ.get("OBJCOPY", "objcopy"), "-O", "binary", str(elf), str(partial))
    partial.replace(flat)


def declarations() -> str:
    """What Python may call: the headers without their preprocessor lines."""
    lines = [line for unit in UNITS for line in (CEXT / f"{unit}.h").read_text().splitlines()]
    return "\n".join(line for line in lines if not line.startswith("#"))


def sources() -> list[str]:
    """C files of the core, relative to the tree as setuptools wants them."""
    units = [CEXT / f"{unit}.c" for unit in (*UNITS, *INTERNAL_UNITS)]
    return [str(path.relative_to(ROOT)) for path in units if path.exists()]


def _make_ffi() -> FFI:
    for tool in (os.environ.get("CC", "gcc").split()[0], "objcopy", "readelf"):
        if shutil.which(tool) is None:
            raise SystemExit(f"building gpurestore needs {tool}: apt-get install gcc binutils libc6-dev")
    builder = FFI()
    builder.cdef(declarations() + CALLBACKS)
    includes = "".join(f'#include "{unit}.h"\n' for unit in UNITS)
    builder.set_source(
        "gpurestore._core",
        f"{PREAMBLE_PRAGMAS}#include <stdint.h>\n{includes}",
        sources=sources(),
        depends=[str(p.relative_to(ROOT)) for p in sorted(CEXT.glob("*")) if p.suffix in {".h", ".c", ".lds"}],
        include_dirs=["cext"],
        extra_compile_args=[*CORE_FLAGS, f"-Wa,-I,{BUILD}"],
        extra_link_args=["-pthread", "-Wl,-z,now"],
    )
    return builder


ffi = _make_ffi()
