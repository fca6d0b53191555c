"""Builds CUDA sources as plain C++ and runs their kernels on CPU tensors: see ``shim.h``."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmkern.backends.cuda_launch import FAMILIES, Launch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "cuda_on_host"


class Order(enum.IntEnum):
    """In which order blocks, and the threads of a block, run."""

    forward = 0
    reverse = 1
    random = 2


_SANITIZERS = "-fsanitize=address,undefined"
_TRAFFIC = HERE / "traffic.cpp"


class Build(enum.Enum):
    """How a library is compiled, and what it is linked with."""

    plain = ("-O2",), ()
    sanitized = ("-O0", _SANITIZERS, "-fno-sanitize-recover=all"), (_SANITIZERS,)
    counted = ("-O2", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"), (str(_TRAFFIC),)


def _flags(kind: Build) -> tuple[str, ...]:
    cpuinfo = Path("/proc/cpuinfo")
    fma = cpuinfo.exists() and " fma " in cpuinfo.read_text(encoding="utf-8")
    # Products are contracted into FMAs, as nvcc does, where the host has them and the optimiser runs.
    return (
        "-std=c++17",
        "-ffp-contract=fast",
        "-g1",
        "-fPIC",
        "-fno-gnu-unique",  # two libraries in one process keep their statics apart
        *(("-mfma", "-mavx2") if fma else ()),
        *kind.value[0],
    )


def sanitizer_environment() -> dict[str, str]:
    """The environment of a Python that loads a sanitized library."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return os.environ | {
        "LD_PRELOAD": str(Path(runtime.stdout.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(REPOSITORY),
    }


@functools.cache
def build(source: str, kind: Build = Build.plain) -> Path:
    """The shared library of ``source`` (a file of this folder), compiled unless an equal one is there."""
    flags = _flags(kind)
    csrc = REPOSITORY / "csrc"
    read = sorted([HERE / source, _TRAFFIC, *HERE.glob("*.h"), *csrc.glob("*.h"), *(csrc / "cuda").glob("*.cuh")])
    key = hashlib.sha256(" ".join(flags).encode())
    for path in read:
        key.update(path.name.encode() + path.read_bytes())
    kept = f"{Path(source).stem}{'' if kind is Build.plain else f'-{kind.name}'}"
    library = BUILD / f"{kept}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{kept}-????????????????.so"):
            old.unlink(missing_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiled = partial.with_suffix(f"{partial.suffix}.o")
        _run_compiler(*flags, "-include", str(HERE / "shim.h"), "-c", str(HERE / source), to=compiled)
        _run_compiler("-shared", "-fPIC", str(compiled), *kind.value[1], to=partial)
        compiled.unlink()
        partial.replace(library)
    return library


def _run_compiler(*arguments: str, to: Path) -> None:
    command = ["g++", *arguments, "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def every_family(kind: Build = Build.plain) -> HostLauncher:
    """All kernels of the CUDA backend."""
    return HostLauncher(*(build(f"{family}.cpp", kind) for family in FAMILIES))


class HostLauncher:
    """The kernels of some libraries, launched as mmkern.backends.cuda_launch launches on a device."""

    def __init__(self, *libraries: Path) -> None:
        self._libraries = [ctypes.CDLL(str(library)) for library in libraries]
        self._owners: dict[str, ctypes.CDLL] = {}
        self.kernels: dict[str, int] = {}  # the bytes of arguments that each takes
        self.launched: set[str] = set()
        for library in self._libraries:
            library.cuda_on_host_kernels.restype = ctypes.c_char_p
            library.cuda_on_host_launch.restype = ctypes.c_char_p
            for line in library.cuda_on_host_kernels().decode().splitlines():
                size, _, name = line.partition(" ")
                self.kernels[name] = int(size)
                self._owners[name] = library

    def __call__(self, launch: Launch, device: torch.device) -> None:
        assert device.type == "cpu", "the host runs kernels on CPU tensors"
        self.launched.add(launch.kernel)
        error = self._owners.get(launch.kernel, self._libraries[0]).cuda_on_host_launch(
            launch.kernel.encode(),
            *launch.grid,
            launch.threads,
            ctypes.c_size_t(launch.shared_bytes),
            launch.arguments,
            ctypes.c_size_t(len(launch.arguments)),
        )
        if error:
            raise RuntimeError(error.decode())

    @contextlib.contextmanager
    def order(self, order: Order, seed: int = 0) -> Iterator[None]:
        self._set_order(order, seed)
        try:
            yield
        finally:
            self._set_order(Order.forward, 0)

    def _set_order(self, order: Order, seed: int) -> None:
        for library in self._libraries:
            library.cuda_on_host_set_order(int(order), seed)

    def bytes_moved(self, run: Callable[[], None], watched: Sequence[Tensor]) -> int:
        """What ``run`` reads and writes of some tensors; of a library that counts."""
        (library,) = self._libraries
        count = library.cuda_on_host_bytes
        count.restype = ctypes.c_longlong
        library.cuda_on_host_watch(None, ctypes.c_size_t(0))
        for x in watched:
            room = library.cuda_on_host_watch(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes))
            assert room >= 0, "too many tensors to watch"
        run()
        return int(count())
