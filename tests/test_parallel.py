"""csrc/cpu/parallel.h: every row once, whatever the threads, and no hang after a fork."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from tests import probe

LEVEL = next(iter(probe.LEVELS))
BIG = 1 << 30


@pytest.fixture
def library() -> ctypes.CDLL:
    return probe.load("simd_probe.cpp", LEVEL)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
def test_rows_are_visited_once(library: ctypes.CDLL, rows: int, threads: int) -> None:
    visits, block = np.zeros(rows, np.int32), np.zeros(rows, np.int64)
    library.visit_rows(ctypes.c_int64(rows), ctypes.c_int64(BIG), threads, probe.address(visits), probe.address(block))
    assert (visits == 1).all()
    assert block.max() == -(-rows // min(rows, threads))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 57])
def test_blocks_are_visited_once(library: ctypes.CDLL, count: int, threads: int) -> None:
    visits = np.zeros(count, np.int32)
    library.visit_blocks(ctypes.c_int64(count), threads, probe.address(visits))
    assert (visits == 1).all()


def test_little_work_stays_on_one_thread(library: ctypes.CDLL) -> None:
    visits, block = np.zeros(8, np.int32), np.zeros(8, np.int64)
    library.visit_rows(ctypes.c_int64(8), ctypes.c_int64(1), 4, probe.address(visits), probe.address(block))
    assert (block == 8).all()
    assert not library.shares(ctypes.c_int64(8), 4)
    assert library.shares(ctypes.c_int64(BIG), 4)
    assert not library.shares(ctypes.c_int64(BIG), 1)


FORKED = """
import ctypes, os, signal, sys
{start_threads}
library = ctypes.CDLL({path!r})
assert library.shares(ctypes.c_int64(1 << 30), 2)
{run_region}
if os.fork() == 0:
    signal.alarm(20)
    shares = library.shares(ctypes.c_int64(1 << 30), 2)
    visits, block = (ctypes.c_int * 64)(), (ctypes.c_int64 * 64)()
    library.visit_rows(ctypes.c_int64(64), ctypes.c_int64(1 << 30), 2, visits, block)
    assert list(visits) == [1] * 64
    os._exit(40 + shares)
status = os.wait()[1]
assert os.WIFEXITED(status), "the child hung"
print(os.WEXITSTATUS(status) - 40)
"""
OWN_REGION = "library.visit_blocks(ctypes.c_int64(64), 2, (ctypes.c_int * 64)())"
TORCH_REGION = "import torch; torch.set_num_threads(2); torch.ones(1 << 22).add_(1)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_threads", "run_region", "shares"),
    [("", "", 1), ("", OWN_REGION, 0), (TORCH_REGION, "", 0), ("", TORCH_REGION, 0)],
    ids=["no threads", "own threads", "torch's threads, loaded after", "torch's threads, loaded before"],
)
def test_child_of_a_fork(start_threads: str, run_region: str, shares: int) -> None:
    path = str(probe.shared_object("simd_probe.cpp", LEVEL))
    script = FORKED.format(start_threads=start_threads, run_region=run_region, path=path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == shares
