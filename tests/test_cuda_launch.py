"""How the CUDA backend finds and launches its kernels, with stand-ins for the device."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mmkern.backends import cuda, cuda_launch
from mmkern.backends.cuda_launch import Launch
from tests.cuda_on_host.harness import every_family

DEVICE = torch.device("cuda", 0)
STREAM = 1234


class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int), ("second", ctypes.c_float)]


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[int]:
        assert device == DEVICE
        yield STREAM

    monkeypatch.setattr(cuda_launch, "_current_stream", current)


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


def test_the_built_module_gets_name_grid_stream_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "mmkern._cuda", module("mmkern._cuda", launch=lambda *args: calls.append(args)))
    cuda_launch.BuiltLauncher()(Launch("centroid", (3, 2), 64, bytes(Pair(7, 0.5))), DEVICE)
    cuda_launch.BuiltLauncher()(Launch("attention<Float32, 64>", (5, 1), 128, bytes(Pair(7, 0.5)), 1 << 16), DEVICE)
    assert calls == [
        ("centroid", 3, 2, 64, 0, STREAM, bytes(Pair(7, 0.5))),
        ("attention<Float32, 64>", 5, 1, 128, 1 << 16, STREAM, bytes(Pair(7, 0.5))),
    ]


def test_the_runtime_compiler_gets_the_source_and_the_driver_a_pointer_to_the_struct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, launched = [], []

    def raw_module(*, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> Any:
        compiled.append((code, options, name_expressions))
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=99)))

    def launch_kernel(*args: int) -> None:
        *head, pointers, extra = args
        struct = ctypes.cast(pointers, ctypes.POINTER(ctypes.POINTER(Pair)))[0][0]
        launched.append((*head, struct.first, struct.second, extra))

    monkeypatch.setitem(sys.modules, "cupy", module("cupy", RawModule=raw_module))
    asked: list[tuple[int, ...]] = []
    driver = module(
        "cupy_backends.cuda.api.driver",
        launchKernel=launch_kernel,
        funcSetAttribute=lambda *args: asked.append(args),
    )
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api.driver", driver)
    launcher = cuda_launch.RuntimeLauncher()
    launch = Launch("rows<Radial<LorentzExpMap0>::Forward>", (5, 1), 128, bytes(Pair(7, 0.5)))
    for _ in range(2):
        launcher(launch, DEVICE)
    # f, grid, block, shared memory, stream, parameters, extra: the order of cuLaunchKernel.
    assert launched == [(99, 5, 1, 1, 128, 1, 1, 0, STREAM, 7, 0.5, 0)] * 2
    assert len(compiled) == 1, "compiled once"
    assert not asked
    launcher(launch._replace(shared_bytes=64 << 10), DEVICE)
    assert launched[2][7] == 64 << 10
    assert asked == [(99, 8, 64 << 10)], "more than 48 KiB must be asked for"
    code, options, names = compiled[0]
    assert code == cuda_launch.nvrtc_source()
    assert options == cuda_launch.NVRTC_OPTIONS
    assert names == ("rows<Radial<LorentzExpMap0>::Forward>",)


def test_cupy_has_what_the_runtime_launcher_uses() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed (pip install mmkern[cupy])", exc_type=ImportError)
    driver = importlib.import_module("cupy_backends.cuda.api.driver")
    assert "kernel_params, intptr_t extra" in driver.launchKernel.__doc__
    assert "int attribute, int value" in driver.funcSetAttribute.__doc__
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == cuda_launch._MAX_DYNAMIC_SHARED_BYTES
    assert hasattr(cupy.RawModule, "get_function")
    assert hasattr(cupy.RawKernel, "kernel")
    assert hasattr(importlib.import_module("cupy.cuda.function").Function, "ptr")


def test_without_any_compiler_the_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmkern._cuda", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"no CUDA kernels: .*mmkern._cuda.*; .*cupy"):
        cuda_launch._default_launcher.__wrapped__()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lorentz_nothing'"):
        _ = cuda.lorentz_nothing


def test_the_built_module_has_the_kernels_that_the_host_runs() -> None:
    built = pytest.importorskip("mmkern._cuda", reason="mmkern._cuda is not built", exc_type=ImportError)
    assert built.kernels() == every_family().kernels
    with pytest.raises(ValueError, match="no CUDA kernel is called nothing"):
        built.launch("nothing", 1, 1, 1, 0, 0, b"")
    with pytest.raises(ValueError, match=r"sum_partials: takes 24 bytes of arguments, got 3"):
        built.launch("sum_partials", 1, 1, 1, 0, 0, b"abc")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"sum_partials: \w+"):
            built.launch("sum_partials", 1, 1, 32, 0, 0, bytes(24))
