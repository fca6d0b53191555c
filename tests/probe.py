"""Compiles a C++ probe against csrc/cpu at one ISA level and loads it with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_SOURCES = ROOT / "csrc" / "cpu"
EMULATION = ROOT / "tests" / "avx512_emulated.h"
BUILD = ROOT / "build" / "probes"
COMPILER = os.environ.get("CXX", "g++")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", *WARNINGS]

# march, and the CPU flags without which the level does not run
LEVELS: dict[str, tuple[list[str], set[str]]] = (
    {
        "v2": (["-march=x86-64-v2"], {"sse4_2", "popcnt"}),
        "avx2": (["-march=x86-64-v3"], {"avx2", "fma", "f16c", "bmi2"}),
        "avx512": (["-march=x86-64-v4"], {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        "avx512_emulated": (["-march=x86-64-v3", "-include", str(EMULATION), "-Wno-psabi"], {"avx2", "fma", "f16c"}),
    }
    if platform.machine() == "x86_64"
    else {"baseline": ([], set())}
)


# Tests over every level; `make test-fast` does without the emulation.
over_levels = pytest.mark.parametrize(
    "level", [pytest.param(name, marks=[pytest.mark.slow] if "emulated" in name else []) for name in LEVELS]
)


@functools.cache
def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def _cached(name: str, inputs: list[Path], command: list[str]) -> Path:
    """BUILD/``name`` made by ``command``, unless it is there already from inputs of the same content."""
    digest = hashlib.sha256(repr(command).encode() + b"".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    target = BUILD / f"{digest}.{name}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = BUILD / f"{os.getpid()}.{target.name}"
        subprocess.run([*command, "-o", str(fresh)], check=True)
        fresh.replace(target)
    return target


def object_file(source: str, level: str) -> Path:
    """tests/``source`` compiled for ``level``."""
    path = Path(__file__).with_name(source)
    command = [COMPILER, *FLAGS, *LEVELS[level][0], f"-DMMKERN_ISA={level}", f"-I{CPU_SOURCES}", "-c", str(path)]
    return _cached(f"{path.stem}.{level}.o", [path, EMULATION, *sorted(CPU_SOURCES.glob("*.h"))], command)


def shared_object(source: str, level: str) -> Path:
    compiled = object_file(source, level)
    return _cached(compiled.name.split(".", 1)[1] + ".so", [compiled], [COMPILER, "-shared", "-fopenmp", str(compiled)])


def load(source: str, level: str) -> ctypes.CDLL:
    """The probe of ``level``; skips the test where the CPU does not have its instructions."""
    missing = LEVELS[level][1] - _cpu_flags()
    if missing:
        pytest.skip(f"the CPU has no {', '.join(sorted(missing))}")
    return ctypes.CDLL(str(shared_object(source, level)))


def address(array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


class GuardedMemory:
    """Memory behind whose end lies a page that must not be touched."""

    def __init__(self, size: int) -> None:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, size + mmap.PAGESIZE)
        self.end = np.frombuffer(self.map, np.uint8).ctypes.data + size
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def before_end(self, nbytes: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.end - nbytes)


def survives(call: Callable[[], object]) -> bool:
    """Runs it in a child, which a touch of the guard page would kill."""
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def foreign_symbols(source: str, level: str) -> list[str]:
    """Functions that the linker may take from, or give to, a unit of another level: a crash on a lesser CPU."""
    path = object_file(source, level)
    listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
    rows = [line[17:].split(maxsplit=1) for line in listing.splitlines()]  # 16 digits or blanks of the address
    shared_data = {"DW.ref.__gxx_personality_v0"}  # a pointer to the C++ runtime's function, the same in every unit
    return [
        name
        for kind, name in rows
        if (kind in "WVu" and f"mmkern::{level}::" not in name and name not in shared_data)
        or (kind == "U" and "std::" in name)
    ]
