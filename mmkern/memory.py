"""Memory on the CPU: a pool for the outputs of mmkern's ops, and the allocator behind the rest of a model.

A fresh block costs a page fault for every 4 KB, which takes longer than most kernels; ``docs/memory.md`` has the
measurements. ``MMKERN_POOL=0`` turns the pool off, ``MMKERN_POOL_LIMIT`` (bytes, or ``512M``, ``4G``) bounds it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

try:
    from mmkern._C import memory as _pool
except ImportError:  # `python -m mmkern info` says why there is no mmkern._C
    _pool = None

# ---- The pool --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stats:
    """The pool of this process. The sizes are in bytes; the other three count calls of :func:`empty` above 1 MB."""

    limit: int
    in_use: int
    idle: int
    reused: int
    mapped: int
    declined: int


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A contiguous tensor of any content, with the dtype and the device of ``like``.

    On the CPU and from 1 MB on, its memory comes from the pool, and returns to it with the last tensor that uses it.
    Such a tensor behaves as any other but for one thing: its storage cannot grow (``resize_`` to more elements than it
    has raises RuntimeError, as for a tensor from NumPy); ``clone()`` it first.
    """
    pooled = _pooled(shape, like)
    if pooled is not None:
        return pooled
    # Unpacked, it takes half the time: torch tries a tuple against every signature.
    return like.new_empty(*shape) if shape else like.new_empty(())


def _empty_strided(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")


# For small outputs what compiled models call: torch's public functions take 0.6 µs more to read their arguments.
empty_strided: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided)


def stats() -> Stats:
    """What the pool holds, and what it did so far."""
    return Stats(*_pool.stats()) if _pool else Stats(0, 0, 0, 0, 0, 0)


def release() -> int:
    """Give the idle blocks back to the system; returns their bytes. Tensors in use are not touched."""
    return int(_pool.release()) if _pool else 0


def _torch_allocates(shape: tuple[int, ...], like: Tensor) -> None:
    return None


def _limit() -> int:
    if os.environ.get("MMKERN_POOL") == "0":
        return 0
    wanted = os.environ.get("MMKERN_POOL_LIMIT")
    if not wanted:
        return min(4 << 30, _memory_of_this_process() // 4)
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?)i?B?", wanted.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"MMKERN_POOL_LIMIT is {wanted!r}, expected bytes, or a number with K, M or G, such as 512M")
    return min(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()], 1 << 62)


def _memory_of_this_process() -> int:
    """Physical memory, or less where a container or a batch system allows less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents[: len(inner.parts) - len(root.parts)]):
            try:
                text = (folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                yield int(text)


def _open_pool() -> Callable[[tuple[int, ...], Tensor], Tensor | None]:
    if _pool is None or not (limit := _limit()):
        return _torch_allocates
    _pool.set_limit(limit)
    pooled: Callable[[tuple[int, ...], Tensor], Tensor | None] = _pool.empty
    return pooled


_pooled = _open_pool()

# ---- The allocator behind everything else ----------------------------------------------------------------------------

Setting = Literal["heap", "huge_pages"]

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_GLIBC = "glibc"
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_JEMALLOC = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"

_tuning_lock = threading.Lock()
_in_force: AllocatorTuning | None = None


@dataclass(frozen=True)
class AllocatorTuning:
    """What :func:`tune_cpu_allocator` did. ``setting`` is None where it changed nothing."""

    setting: Setting | None
    message: str
    _restore: Callable[[], str] | None = field(default=None, repr=False, compare=False)

    def undo(self) -> str:
        """Put back what was changed; says what. Does nothing the second time."""
        global _in_force
        with _tuning_lock:
            if self._restore is None or _in_force is not self:
                return "nothing to undo"
            _in_force = None
            return self._restore()

    def __str__(self) -> str:
        return self.message


def tune_cpu_allocator(setting: Setting = "heap") -> AllocatorTuning:
    """Keep the large blocks of torch's CPU tensors mapped, so that only the first use of memory pays for page faults.

    Args:
        setting: "heap" is the fastest: glibc's malloc takes large blocks from its heap and never shrinks it. It costs
            memory: the process keeps its largest heap, fragments included. "huge_pages" keeps nothing: torch asks for
            huge pages, 2 MB a fault; it must come before torch's first block of 2 MB and lasts as long as the process.
    Returns: what was done, as a message, and its ``undo()``. Does nothing and says so where malloc is not glibc's, is
        replaced (jemalloc preloaded is better than both settings), or is tuned already: the two settings together make
        the first calls three times as long and keep the most memory.
    Raises: ValueError for another setting.
    """
    global _in_force
    if setting not in ("heap", "huge_pages"):
        raise ValueError(f"tune_cpu_allocator: setting is {setting!r}, expected 'heap' or 'huge_pages'")
    with _tuning_lock:
        if _in_force:
            return _in_force
        why_not = _why_not_tune()
        if why_not:
            return AllocatorTuning(None, why_not)
        tuning = _keep_heap() if setting == "heap" else _use_huge_pages()
        if tuning.setting:
            _in_force = tuning
        return tuning


def _why_not_tune() -> str | None:
    malloc = _malloc()
    if malloc != _GLIBC:
        return f"nothing done: malloc is from {malloc}, not from glibc"
    if os.environ.get(_HUGE_PAGES, "0") not in ("", "0"):
        return f"nothing done: {_HUGE_PAGES} is set, and the heap beside huge pages has the slowest first calls"
    if os.environ.get("MALLOC_MMAP_MAX_") == "0":
        return "nothing done: MALLOC_MMAP_MAX_=0 keeps the heap already"
    return None


def _keep_heap() -> AllocatorTuning:
    libc = ctypes.CDLL(None)
    # A thread with an arena of its own would go on mapping large blocks: an arena's heap ends at 64 MB.
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        libc.mallopt(parameter, value)

    def restore() -> str:
        # Once set, these no longer adapt; so take the values at which a program with large blocks ends up.
        for parameter, value in ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
            libc.mallopt(parameter, value)
        libc.mallopt(_M_ARENA_MAX, 0)
        libc.malloc_trim(0)
        return "large blocks are mapped again, one by one, and the heap was trimmed; its threshold no longer adapts"

    return AllocatorTuning(
        "heap",
        f"glibc {_glibc_version()} takes large blocks from its heap and keeps the heap "
        "(M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1, M_ARENA_MAX=1)",
        restore,
    )


def _use_huge_pages() -> AllocatorTuning:
    os.environ[_HUGE_PAGES] = "1"
    if not _new_block_has_huge_pages():
        del os.environ[_HUGE_PAGES]
        return AllocatorTuning(
            None,
            f"nothing done: torch read {_HUGE_PAGES} at its first block of 2 MB, which has been, or the kernel gives "
            "no huge pages; set it before the program starts",
        )

    def restore() -> str:
        os.environ.pop(_HUGE_PAGES, None)
        return f"{_HUGE_PAGES} is no longer set for child processes; this one keeps huge pages"

    return AllocatorTuning("huge_pages", f"torch asks for huge pages ({_HUGE_PAGES}=1)", restore)


def _new_block_has_huge_pages() -> bool:
    block = torch.empty(64 << 20, dtype=torch.uint8, device="cpu")  # never written, so it costs no memory
    middle = block.data_ptr() + block.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split() and "[never]" not in _kernel_huge_pages()
    return False


def _kernel_huge_pages() -> str:
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "[never]"


def _glibc_version() -> str:
    version = ctypes.CDLL(None).gnu_get_libc_version
    version.restype = ctypes.c_char_p
    return str(version().decode())


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _malloc() -> str:
    """Whose malloc this process calls: _GLIBC, or the name of the library that has it."""
    if sys.platform != "linux":
        return f"the system library of {sys.platform}"
    process = ctypes.CDLL(None)
    info = _SymbolInfo()
    found = process.dladdr(ctypes.cast(process.malloc, ctypes.c_void_p), ctypes.byref(info))
    library = Path(os.fsdecode(info.file)).name if found else "an unknown library"
    return _GLIBC if library.startswith("libc.so") and hasattr(process, "gnu_get_libc_version") else library


def _find_jemalloc() -> str | None:
    beside_python = Path(sys.prefix, "lib", "libjemalloc.so.2")
    return str(beside_python) if beside_python.exists() else ctypes.util.find_library("jemalloc")


def tuned_environment(jemalloc: bool = True) -> dict[str, str]:
    """Environment variables under which a new process has the best allocator there is here.

    A process started with them gets the same answer again, so a program that re-executes itself knows when to stop.

    Args:
        jemalloc: whether to preload it where it is installed; glibc's own variables otherwise.
    Returns: the variables; none where malloc is neither glibc's nor jemalloc.
    """
    preloaded, malloc = os.environ.get("LD_PRELOAD", ""), _malloc()
    if "jemalloc" in malloc:
        return {"LD_PRELOAD": preloaded, "MALLOC_CONF": _JEMALLOC}
    if malloc != _GLIBC:
        return {}
    library = _find_jemalloc() if jemalloc else None
    if library and library not in preloaded:  # where it is preloaded and malloc is glibc's all the same, it cannot load
        return {"LD_PRELOAD": f"{library} {preloaded}".strip(), "MALLOC_CONF": _JEMALLOC}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 50), "MALLOC_ARENA_MAX": "1"}


def describe() -> str:
    """The allocator and the pool in force, and the line that goes further; what ``python -m mmkern info`` prints."""
    return "\n".join([f"allocator: {_describe_allocator()}", f"pool:      {_describe_pool()}"])


def _describe_allocator() -> str:
    malloc = _malloc()
    if "jemalloc" in malloc:
        conf = os.environ.get("MALLOC_CONF")
        return f"{malloc}, MALLOC_CONF={conf}" if conf else f"{malloc}; faster with MALLOC_CONF={_JEMALLOC}"
    if malloc != _GLIBC:
        return malloc
    state = f"glibc {_glibc_version()}, as found; mmkern.tune_cpu_allocator() speeds up torch's large blocks"
    if _in_force:
        state = _in_force.message
    elif _why_not_tune():
        names = (_HUGE_PAGES, "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
        state = f"glibc {_glibc_version()} with {' '.join(f'{n}={os.environ[n]}' for n in names if n in os.environ)}"
    jemalloc = _find_jemalloc()
    further = f"LD_PRELOAD={jemalloc or 'libjemalloc.so.2'} MALLOC_CONF={_JEMALLOC} python ..."
    return f"{state}\n           to go further: {further}" + ("" if jemalloc else "  (after apt install libjemalloc2)")


def _describe_pool() -> str:
    if _pool is None:
        return "none, since mmkern._C is not built"
    if _pooled is _torch_allocates:
        return "off (MMKERN_POOL=0 or MMKERN_POOL_LIMIT=0)"
    now = stats()
    mb = 1 << 20
    return f"{now.in_use // mb} MB in use, {now.idle // mb} MB idle, {now.limit // mb} MB at most"
