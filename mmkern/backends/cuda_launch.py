"""Launching a kernel of ``csrc/cuda`` by name.

A kernel's name is its C++ expression, ``rows<Radial<LorentzExpMap0>::Forward>``, and it takes one struct. Two
launchers find it: mmkern._cuda, built with nvcc, and CuPy, which has NVRTC compile the same sources at the first call.
Tests bring a third, which runs the kernels on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FAMILIES = ("attention", "attention_rows", "contrastive", "decoding", "diffusion", "hyperbolic", "modulation")
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes of dynamic shared memory; more must be asked for, once a kernel
_MAX_DYNAMIC_SHARED_BYTES = 8  # of CUfunction_attribute
NVRTC_OPTIONS = ("-std=c++17", "-default-device")  # the latter: constexpr functions are device functions too


class Launch(NamedTuple):
    """A kernel by its C++ name, over ``grid`` blocks of ``threads``; its one argument is the struct ``arguments``."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    arguments: bytes
    shared_bytes: int = 0  # dynamic


Launcher = Callable[[Launch, torch.device], None]


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """The handle of torch's stream on ``device``, which is CUDA's current device inside."""
    if torch.cuda.current_device() == device.index:
        yield torch.cuda.current_stream(device).cuda_stream
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream


class BuiltLauncher:
    """Kernels in mmkern._cuda."""

    def __init__(self) -> None:
        self._launch = importlib.import_module("mmkern._cuda").launch

    def __call__(self, launch: Launch, device: torch.device) -> None:
        with _current_stream(device) as stream:
            self._launch(launch.kernel, *launch.grid, launch.threads, launch.shared_bytes, stream, launch.arguments)


class RuntimeLauncher:
    """Kernels compiled by NVRTC through CuPy, which keeps them on disk, each at its first call."""

    def __init__(self) -> None:
        self._cupy = importlib.import_module("cupy")
        self._driver = importlib.import_module("cupy_backends.cuda.api.driver")
        self._compiled = functools.cache(self._compile)

    def __call__(self, launch: Launch, device: torch.device) -> None:
        struct = ctypes.create_string_buffer(launch.arguments, len(launch.arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        with _current_stream(device) as stream:
            function = self._compiled(launch.kernel).kernel.ptr
            shared = launch.shared_bytes
            if shared > _SHARED_WITHOUT_ASKING:
                self._driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared)
            grid_and_block = *launch.grid, 1, launch.threads, 1, 1
            self._driver.launchKernel(function, *grid_and_block, shared, stream, ctypes.addressof(pointers), 0)

    def _compile(self, kernel: str) -> Any:
        module = self._cupy.RawModule(code=nvrtc_source(), options=NVRTC_OPTIONS, name_expressions=(kernel,))
        return module.get_function(kernel)


@functools.cache
def nvrtc_source() -> str:
    """All kernels as one text without includes: NVRTC needs no search path, and CuPy's cache sees every change."""
    package = Path(__file__).resolve().parents[1]
    roots = (package / "csrc", package.parent / "csrc")
    root = next((root for root in roots if (root / "cuda").is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"the CUDA sources are in neither of {', '.join(map(str, roots))}")
    seen: set[Path] = set()
    text = "".join(_inlined(root / "cuda" / f"{family}.cuh", seen) for family in FAMILIES)
    return text + "using namespace mmkern;\n"


def _inlined(path: Path, seen: set[Path]) -> str:
    path = path.resolve()
    if path in seen:
        return ""
    seen.add(path)
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        include = re.match(r'\s*#include "(.+)"', line)
        if include:
            lines.append(_inlined(path.parent / include[1], seen))
        elif line != "#pragma once":
            lines.append(line + "\n")
    return "".join(lines)


_replacement: Launcher | None = None


@contextlib.contextmanager
def replaced(launcher: Launcher) -> Iterator[None]:
    """Send all launches to ``launcher``: how tests run the kernels on the host."""
    global _replacement
    before, _replacement = _replacement, launcher
    try:
        yield
    finally:
        _replacement = before


@functools.cache
def _default_launcher() -> Launcher:
    try:
        return BuiltLauncher()
    except ImportError as not_built:
        try:
            return RuntimeLauncher()
        except ImportError as no_cupy:
            raise RuntimeError(f"no CUDA kernels: {not_built}; {no_cupy}") from no_cupy


def launch(
    kernel: str, grid: tuple[int, int], threads: int, arguments: bytes, device: torch.device, shared_bytes: int = 0
) -> None:
    """Run a kernel on torch's current stream of ``device``; ``arguments`` is copied before this returns."""
    (_replacement or _default_launcher())(Launch(kernel, grid, threads, arguments, shared_bytes), device)
