"""What a report says of a kernel, and where a report keeps what it has compiled."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class KernelRow:
    """One kernel compiled for one target. The bytes are those of the whole call that it is part of."""

    backend: str
    kernel: str
    variant: str
    target: str
    registers: int
    stack_bytes: int
    spills: int  # local loads and stores (NVIDIA), spilled vector registers (AMD)
    shared_bytes: int
    threads: int
    occupancy: float
    matrix: dict[str, int] = field(default_factory=dict)
    accesses: int | None = None  # instructions that load from or store to global memory
    wide_accesses: int | None = None  # of 16 bytes a thread or more
    moved_bytes: int | None = None
    least_bytes: int | None = None
    note: str = ""

    @property
    def spilled(self) -> bool:
        return bool(self.spills or self.stack_bytes)


@dataclass(frozen=True)
class Multiprocessor:
    """What its threads share."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_reserved: int  # of each block, by the driver


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 65536, 164 << 10, 1024),
    "sm_90": Multiprocessor(64, 32, 65536, 228 << 10, 1024),
    "sm_100": Multiprocessor(64, 32, 65536, 228 << 10, 1024),
}


def occupancy(limits: Multiprocessor, registers: int, shared_bytes: int, threads: int) -> float:
    """The share of a multiprocessor's warps that fit; registers are given out by 256 to a warp."""
    warps = -(-threads // 32)
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared_bytes // (shared_bytes + limits.shared_reserved)
    return min(by_registers, by_shared, limits.blocks, limits.warps // warps) * warps / limits.warps


def cache_folder() -> Path:
    """A folder that only this user may enter."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "mmkern" / "gpu_report"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads ``path`` sees all of ``text`` or what was there before."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
