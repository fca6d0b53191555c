"""Measure what CPU allocators cost torch's large blocks, and rewrite the table in docs/memory.md.

    python tools/measure_allocators.py [--repeats 3] [--print]

Each setting runs in processes of its own, in turn. The times are the calling thread's own (user and system), so that
other programs' turns do not count; what they take of the memory's bandwidth does, so a quiet machine is best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmkern import memory

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SHAPE = (16, 1024, 1152)  # 75 MB in float32
NEVER_INHERITED = ("LD_PRELOAD", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE", "MMKERN_POOL", "MMKERN_POOL_LIMIT")


@dataclass(frozen=True)
class Setting:
    """A row of the table. ``prepare`` is called before the first block, ``clone`` is what is timed."""

    label: str
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None
    clone: Callable[[Tensor], Tensor] = Tensor.clone
    serves_torch: bool = True
    missing: str = ""


def _pooled_clone(x: Tensor) -> Tensor:
    return memory.empty(x.shape, x).copy_(x)


def _settings() -> dict[str, Setting]:
    jemalloc = memory.tuned_environment()
    in_place = torch.empty(0)
    return {
        "found": Setting("as found"),
        "heap": Setting("`mmkern.tune_cpu_allocator()`", prepare=memory.tune_cpu_allocator),
        "variables": Setting("the same by `MALLOC_*` variables", env=memory.tuned_environment(jemalloc=False)),
        "huge_pages": Setting(
            '`mmkern.tune_cpu_allocator("huge_pages")`', prepare=lambda: memory.tune_cpu_allocator("huge_pages")
        ),
        "both": Setting("both together (refused)", env={"THP_MEM_ALLOC_ENABLE": "1"}, prepare=memory._keep_heap),
        "jemalloc": Setting(
            "jemalloc preloaded",
            env=jemalloc,
            missing="" if "LD_PRELOAD" in jemalloc else "jemalloc is not installed here (apt install libjemalloc2)",
        ),
        "pool": Setting("mmkern's pool (its own outputs)", clone=_pooled_clone, serves_torch=False),
        "in_place": Setting(
            "memory in place, for comparison",
            clone=lambda x: torch.mul(x, 1, out=in_place.resize_(x.shape)),
            serves_torch=False,
        ),
    }


# ---- In the process of one setting -----------------------------------------------------------------------------------


def _time(call: Callable[[], object], times: int) -> list[float]:
    milliseconds = []
    for _ in range(times):
        start = time.thread_time()
        call()
        milliseconds.append((time.thread_time() - start) * 1e3)
    return milliseconds


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _in_a_thread(work: Callable[[], list[float]]) -> list[float]:
    answer: list[float] = []
    thread = threading.Thread(target=lambda: answer.extend(work()))
    thread.start()
    thread.join()
    return answer


def measure(setting: Setting) -> dict[str, float]:
    torch.set_num_threads(1)
    setting.prepare()
    x = torch.ones(SHAPE)
    calls = _time(lambda: setting.clone(x), 30)
    steady = statistics.median(calls[-12:])
    figures = {
        "slowest": max(calls),
        "slow_calls": sum(call > 2 * steady for call in calls),
        "steady": steady,
        "thread": statistics.median(_in_a_thread(lambda: _time(lambda: setting.clone(x), 30))[-12:]),
        "resident": _resident(),
    }
    if setting.serves_torch:
        scale, shift = torch.ones(16, 1, 1152), torch.ones(16, 1, 1152)
        norm = torch.nn.functional.layer_norm
        figures["modulation"] = statistics.median(_time(lambda: norm(x, (1152,)) * (1 + scale) + shift, 16)[-8:])
    y = torch.ones(64, 589_824)
    for rows in range(1, 65):
        setting.clone(y[:rows])  # 2.25 MB more each time, up to 144 MB
    figures["resident_after_sizes"] = _resident()
    return figures


# ---- All of them -----------------------------------------------------------------------------------------------------


def _run(name: str, setting: Setting) -> dict[str, float]:
    env = {k: v for k, v in os.environ.items() if k not in NEVER_INHERITED and not k.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--in-process", name]
    done = subprocess.run(command, env=env | setting.env, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _span(runs: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    digits = 1 if max(values) < 20 and isinstance(values[0], float) else 0
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


COLUMNS = {
    "slowest": "slowest",
    "slow_calls": "slow calls of 30",
    "steady": "steady",
    "thread": "in a worker thread",
    "modulation": "LayerNorm + modulation",
    "resident": "resident, MB",
    "resident_after_sizes": "and after sizes up to 144 MB",
}


def table(results: dict[str, list[dict[str, float]]], settings: dict[str, Setting]) -> str:
    lines = [
        f"| ms a call, {'×'.join(map(str, SHAPE))} float32 | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, setting in settings.items():
        cells = [_span(results[name], column) for column in COLUMNS] if name in results else [setting.missing]
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    huge = memory._kernel_huge_pages().strip()
    repeats = max(map(len, results.values()), default=0)
    lines += [
        "",
        f"{platform.machine()}, one thread of {os.cpu_count()} CPUs, torch {torch.__version__}, "
        f"glibc {platform.libc_ver()[1]}, transparent huge pages `{huge}`; {repeats} processes a row.",
    ]
    return "\n".join(lines)


def rewrite(page: str, measured: str) -> str:
    """``page`` with ``measured`` between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{measured}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes a setting")
    parser.add_argument("--print", action="store_true", help="print the table and leave the page as it is")
    parser.add_argument("--in-process", choices=_settings(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = _settings()
    if arguments.in_process:
        print(json.dumps(measure(settings[arguments.in_process])))
        return
    results: dict[str, list[dict[str, float]]] = {}
    runs = [(name, setting) for name, setting in settings.items() if not setting.missing] * arguments.repeats
    for number, (name, setting) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {setting.label}", file=sys.stderr)
        results.setdefault(name, []).append(_run(name, setting))
    measured = table(results, settings)
    print(measured)
    if not arguments.print:
        PAGE.write_text(rewrite(PAGE.read_text(), measured))


if __name__ == "__main__":
    main()
