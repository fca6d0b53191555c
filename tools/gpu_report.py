"""What the GPU kernels ask of a GPU, found out without one: registers, spills, occupancy, matrix instructions, width
of accesses, bytes.

    python tools/gpu_report.py            # a table; build/gpu_report/report.json and report.md
    python tools/gpu_report.py --all      # every Triton op in every type, not one type each

Triton kernels are compiled for sm_80, sm_90, sm_100 and gfx942, CUDA kernels by nvcc where there is one. gfx942 is
compiled only. Exit code 1 where a kernel spills. Nothing here is a speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import gpu_report_cuda, gpu_report_triton  # noqa: E402
from tools.gpu_report_rows import KernelRow, cache_folder, write_atomically  # noqa: E402

OUTPUT = ROOT / "build" / "gpu_report"


def cuda_rows() -> Iterable[KernelRow]:
    """The CUDA half; nothing without nvcc."""
    if not shutil.which("nvcc"):
        print("no nvcc: the CUDA kernels are left out", file=sys.stderr)
        return
    kernels = gpu_report_cuda.kernels()
    bytes_of = gpu_report_cuda.traffic([kernel.name for kernel in kernels])
    for kernel in kernels:
        moved, least = bytes_of.get(kernel.name, (None, None))
        yield KernelRow(
            backend="cuda",
            kernel=kernel.name,
            variant="",
            target=kernel.architecture,
            registers=kernel.registers,
            stack_bytes=kernel.stack_bytes,
            spills=kernel.local_accesses,
            shared_bytes=kernel.shared_bytes,
            threads=kernel.threads,
            occupancy=kernel.occupancy,
            matrix={"MMA": kernel.matrix_instructions} if kernel.matrix_instructions else {},
            moved_bytes=moved,
            least_bytes=least,
            note=f"{kernel.wide_accesses} of {kernel.global_accesses} accesses of 16 bytes",
        )


_HEADER = (
    "backend", "kernel", "call", "target", "registers", "spills", "stack B", "shared B", "threads", "occupancy",
    "matrix instructions", "16-byte accesses", "bytes moved / least", "note",
)  # fmt: skip


def _cells(row: KernelRow) -> tuple[str, ...]:
    moved = "" if row.moved_bytes is None or not row.least_bytes else f"{row.moved_bytes / row.least_bytes:.2f}"
    wide = "" if row.accesses is None else f"{row.wide_accesses} of {row.accesses}"
    matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items())
    return (
        row.backend, row.kernel, row.variant, row.target, str(row.registers), str(row.spills), str(row.stack_bytes),
        str(row.shared_bytes), str(row.threads), f"{row.occupancy:.0%}", matrix, wide, moved, row.note,
    )  # fmt: skip


def table(rows: Sequence[KernelRow]) -> str:
    """Columns aligned for a terminal."""
    lines = [_HEADER, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Sequence[KernelRow]) -> str:
    lines = [_HEADER, ("---",) * len(_HEADER), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every Triton op in every type")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    start = time.monotonic()
    rows = [*gpu_report_triton.triton_rows(options.all), *cuda_rows()]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_atomically(OUTPUT / "report.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    write_atomically(OUTPUT / "report.md", markdown(rows))
    print(table(rows))
    spilled = [row for row in rows if row.spilled]
    for row in spilled:
        print(f"spills: {row.kernel} of {row.variant or row.backend} on {row.target}", file=sys.stderr)
    print(f"{len(rows)} kernels, {len(spilled)} spill; {time.monotonic() - start:.0f} s; {OUTPUT / 'report.md'}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
