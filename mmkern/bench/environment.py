"""Where a measurement runs: the allocator, the machine's fingerprint, its rates."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmkern import memory

# Holds what the tuned environment replaced, so that a plain one can be had back; None stands for "was not set".
_REPLACED = "MMKERN_BENCH_REPLACED"


def tuned_environment() -> dict[str, str]:
    """The environment of a process that allocates as well as this machine can; remembers the plain one."""
    if _REPLACED in os.environ:
        return dict(os.environ)
    changes = memory.tuned_environment()
    replaced = {name: os.environ.get(name) for name in changes}
    return {**os.environ, **changes, _REPLACED: json.dumps(replaced)}


def plain_environment() -> dict[str, str]:
    """The environment as it was found."""
    environment = dict(os.environ)
    for name, value in json.loads(environment.pop(_REPLACED, "{}")).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def is_tuned() -> bool:
    return _REPLACED in os.environ


def restart_tuned() -> None:
    """Replace this process by itself in the tuned environment."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], tuned_environment())


def fingerprint() -> dict[str, Any]:
    """What must be equal for two measurements to be comparable."""
    try:
        from mmkern import _C

        isa = str(_C.isa)
    except ImportError:
        isa = "none"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": isa,
        "allocator": memory.describe().splitlines()[0].partition(":")[2].strip(),
    }


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


# Twelve chains of multiply-adds: enough to fill two units of five cycles' latency with the widest vectors.
_FMA_SOURCE = r"""
#if defined(__AVX512F__)
enum { bytes = 64 };
#elif defined(__AVX__)
enum { bytes = 32 };
#else
enum { bytes = 16 };
#endif
typedef float vec __attribute__((vector_size(bytes)));
double fma_loop(long n, float scale, float step) {
  vec a[12], s = scale - (vec){0}, t = step - (vec){0};
  for (int i = 0; i < 12; ++i) a[i] = t * (float)i;
  for (long k = 0; k < n; ++k)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = a[i] * s + t;
  double sum = 0;
  for (int i = 0; i < 12; ++i) sum += a[i][0];
  return sum;
}
int fma_flops(void) { return 12 * 2 * (int)(bytes / sizeof(float)); }
"""


def fma_peak() -> float | None:
    """Multiply-adds of one thread, in FLOP/s, from a loop in registers; None without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(_FMA_SOURCE)
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
        if subprocess.run([compiler, *flags, source, "-o", target], capture_output=True).returncode:
            return None
        probe = ctypes.CDLL(str(target))
    probe.fma_loop.argtypes = (ctypes.c_long, ctypes.c_float, ctypes.c_float)
    probe.fma_loop.restype = ctypes.c_double
    turns, times = 1_000_000, []
    for _ in range(9):
        start = time.perf_counter()
        probe.fma_loop(turns, 0.5, 0.25)
        times.append(time.perf_counter() - start)
    return float(turns * probe.fma_flops() / statistics.median(times[2:]))
