"""The CPU: which instructions the dumped tasks may have come to rely on, and where it keeps extended registers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from gpurestore.errors import Finding
from gpurestore.tasks.registers import XstateLayout

# What code may use after asking CPUID: libraries choose their kernels once, so all of it must be there at restore.
# Names as in /proc/cpuinfo. Features of the kernel or of virtual machines are left out on purpose.
_NAMES = """
    cx8 cmov mmx fxsr sse sse2 pni ssse3 sse4_1 sse4_2 cx16 lahf_lm syscall rdtscp popcnt movbe abm pclmulqdq
    aes vaes vpclmulqdq gfni sha_ni sha512 sm3 sm4 xsave xsavec xsaveopt xgetbv1 osxsave fsgsbase rdrand rdseed
    avx avx2 fma f16c fma4 xop tbm sse4a misalignsse 3dnow 3dnowext 3dnowprefetch bmi1 bmi2 adx erms fsrm rdpid
    clflushopt clwb clzero cldemote movdiri movdir64b serialize rtm waitpkg monitorx mwaitx pku ospke pconfig
    ptwrite avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2
    avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_bf16 avx512_fp16
    avx512_vp2intersect avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert avx10 avx10_128 avx10_256
    avx10_512 apx amx_tile amx_int8 amx_bf16 amx_fp16 amx_complex cmpccxadd enqcmd uintr lwp prefetchi
    prefetchwt1 raoint
"""
INSTRUCTION_SETS = frozenset(_NAMES.split())


_FIRST_CPU_BYTES = 4096


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The lines of the first CPU in /proc/cpuinfo."""
    first = text.split("\n\n", 1)[0]
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


@cache
def _here() -> dict[str, str]:
    # One CPU tells for all, and on a large machine the whole file takes long: the kernel asks every CPU for its clock.
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        text = b""
        while b"\n\n" not in text and (more := file.read(_FIRST_CPU_BYTES)):
            text += more
    return parse_cpuinfo(text.decode())


def record() -> dict[str, Any]:
    """What the manifest keeps about the CPU."""
    info = _here()
    return {
        "vendor": info.get("vendor_id", ""),
        "family": info.get("cpu family", ""),
        "model": info.get("model", ""),
        "name": info.get("model name", ""),
        "features": sorted(INSTRUCTION_SETS & set(info.get("flags", "").split())),
    }


def check(recorded: Mapping[str, Any]) -> list[Finding]:
    """What the dump's CPU had and this one lacks."""
    features = recorded.get("features", [])
    if not isinstance(features, list):
        return [Finding("gpurestore.json", "CPU features", "not a list")]
    here = _here()
    lacking = sorted({str(f) for f in features} - set(here.get("flags", "").split()))
    if not lacking:
        return []
    name = str(recorded.get("name", "another CPU"))
    why = f"the images come from {name}, and their code may use it"
    return [Finding(f"CPU {here.get('model name', '')}", f"lacks {', '.join(lacking)}", why)]


@cache
def xstate_layout() -> XstateLayout:
    """Where this CPU keeps extended registers."""
    from gpurestore import core

    size, parts = core.xstate_layout()
    return XstateLayout(size, parts)


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
