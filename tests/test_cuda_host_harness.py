"""The harness that runs CUDA kernels on the host, tried on right kernels and on kernels with seeded bugs."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmkern.backends.cuda_launch import Launch
from tests.cuda_on_host.harness import REPOSITORY, HostLauncher, Order, build, sanitizer_environment

CPU = torch.device("cpu")
ORDERS = [(Order.forward, 0), (Order.reverse, 0), *((Order.random, seed) for seed in range(3))]


class Args(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "out", "a", "b")]


@pytest.fixture(scope="module")
def launcher() -> HostLauncher:
    return HostLauncher(build("selftest.cpp"))


def run(
    launcher: HostLauncher,
    kernel: str,
    out: Tensor,
    *,
    threads: int,
    blocks: int = 1,
    shared: int = 0,
    **tensors: Tensor,
) -> Tensor:
    args = Args(out=out.data_ptr(), **{name: x.data_ptr() for name, x in tensors.items()})
    launcher(Launch(kernel, (blocks, 1), threads, bytes(args), shared), CPU)
    return out


def nans(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


# ---- Right kernels give right results, in every order ----------------------------------------------------------------


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_barriers_and_dynamic_shared_memory(launcher: HostLauncher, order: Order, seed: int) -> None:
    x = torch.arange(96.0)
    with launcher.order(order, seed):
        out = run(launcher, "reverse<Bug::none>", nans(96), threads=96, shared=4 * 96, input=x)
    assert torch.equal(out, x.flip(0) + x.flip(0).roll(-1))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_shuffles(launcher: HostLauncher, order: Order, seed: int) -> None:
    x = torch.arange(64.0)
    with launcher.order(order, seed):
        out = run(launcher, "warp_sum<Bug::none>", nans(64), threads=64, input=x)
    assert torch.equal(out, x.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(64))


def test_votes_and_shuffles_as_the_manual_says(launcher: HostLauncher) -> None:
    lane = torch.arange(32)
    out = run(launcher, "intrinsics", nans(6, 32), threads=32).int()
    assert out[0].tolist() == [sum(1 << i for i in range(0, 16, 3))] * 32
    assert out[1].tolist() == [1] * 32
    assert torch.equal(out[2], torch.where(lane >= 3, lane - 3, lane).int())
    assert torch.equal(out[3], torch.where(lane % 8 < 5, lane + 3, lane).int())
    assert torch.equal(out[4], (lane // 4 * 4 + (lane + 1) % 4).int())
    assert out[5].tolist() == [105] * 32


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_cp_async(launcher: HostLauncher, order: Order, seed: int) -> None:
    x = torch.arange(2 * 64 * 4.0)
    stages = x.view(2, 64, 4)
    with launcher.order(order, seed):
        out = run(launcher, "pipeline<Bug::none>", nans(64), threads=64, input=x)
    assert torch.equal(out, stages[0, :, 0].flip(0) + stages[1, :, 1].flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_and_ldmatrix(launcher: HostLauncher, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    kernel = f"matrix_product<Bug::none, {str(dtype == torch.bfloat16).lower()}>"
    out = run(launcher, kernel, nans(16, 8), threads=32, a=a, b=b)
    assert torch.equal(out, a.float() @ b.float())


@pytest.mark.parametrize(("name", "dtype"), [("kBfloat16", torch.bfloat16), ("kFloat16", torch.float16)])
def test_sixteen_bit_numbers(launcher: HostLauncher, name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randn(1000, generator=generator) * 10.0 ** torch.randint(-9, 6, (1000,), generator=generator),
            torch.tensor(
                [0.0, -0.0, math.inf, -math.inf, math.nan, 1.00390625, 1.01171875, 65519.0, 65520.0, 3.4e38, 1e-45]
            ),
        ]
    )
    out = run(launcher, f"round_trip<{name}>", nans(len(x)), threads=len(x), input=x)
    assert torch.equal(out.nan_to_num(12345.0), x.to(dtype).float().nan_to_num(12345.0))


def test_static_shared_memory_is_poisoned_for_every_block(launcher: HostLauncher) -> None:
    assert run(launcher, "shared_once<Bug::none>", nans(3), threads=2, blocks=3).tolist() == [1, 1, 1]
    stale = run(launcher, "shared_once<Bug::stale_shared>", torch.zeros(3), threads=2, blocks=3)
    assert stale[0] == 1
    assert stale[1:].isnan().all()


# ---- Seeded bugs are caught ------------------------------------------------------------------------------------------


def test_a_lost_barrier_shows_in_every_order(launcher: HostLauncher) -> None:
    x = torch.arange(96.0)
    for order, seed in ORDERS:
        with launcher.order(order, seed):
            out = run(launcher, "reverse<Bug::lost_barrier>", torch.zeros(96), threads=96, shared=4 * 96, input=x)
        assert out.isnan().any()


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        (
            "reverse<Bug::early_exit>",
            96,
            r"deadlock.*\n  threads 5 exited\n  threads 0-4, 6-95 wait at __syncthreads \(.*selftest.cpp:\d+\)",
        ),
        ("reverse<Bug::divergent_barrier>", 96, r"(?s)deadlock.*wait at __syncthreads \(.*wait at __syncthreads \("),
        ("warp_sum<Bug::missing_lane>", 32, r"thread 30 at .*: __shfl_xor_sync reads a lane outside its mask"),
        ("warp_sum<Bug::early_exit>", 32, r"(?s)threads 3 exited\n.*wait at __shfl_xor_sync \(.*, mask ffffffff\)"),
        ("warp_sum<Bug::lane_outside>", 32, r"__shfl_sync reads a lane outside its mask"),
        ("pipeline<Bug::no_wait>", 64, r"exits with copies by cp.async under way"),
        ("matrix_product<Bug::early_exit, true>", 32, r"(?s)threads 31 exited\n  threads 0-30 wait at ldmatrix"),
    ],
)
def test_a_kernel_that_would_hang_is_reported(launcher: HostLauncher, kernel: str, threads: int, message: str) -> None:
    x, half = torch.arange(512.0), torch.zeros(256, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        run(launcher, kernel, nans(128), threads=threads, shared=4 * threads, input=x, a=half, b=half)


def test_a_wrong_wait_reads_poison(launcher: HostLauncher) -> None:
    x = torch.arange(2 * 64 * 4.0)
    assert run(launcher, "pipeline<Bug::wrong_wait>", torch.zeros(64), threads=64, input=x).isnan().any()


@pytest.mark.slow
def test_the_address_sanitizer_sees_shared_memory() -> None:
    code = (
        "import torch, ctypes\n"
        "from tests.cuda_on_host.harness import Build\n"
        "from tests.test_cuda_host_harness import *\n"
        "launcher = HostLauncher(build('selftest.cpp', Build.sanitized))\n"
        "x = torch.arange(96.0)\n"
        "out = run(launcher, 'reverse<Bug::none>', nans(96), threads=96, shared=4 * 96, input=x)\n"
        "assert torch.equal(out, x.flip(0) + x.flip(0).roll(-1))\n"
        "print('clean', flush=True)\n"
        "run(launcher, 'out_of_bounds', nans(1), threads=4, shared=16)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=sanitizer_environment(),
        check=False,
    )
    assert "clean" in done.stdout, done.stderr
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert os.path.basename("selftest.cpp") in done.stderr


def test_bad_launches_are_refused(launcher: HostLauncher) -> None:
    with pytest.raises(RuntimeError, match="bad block"):
        run(launcher, "intrinsics", nans(6, 32), threads=2048)
    with pytest.raises(RuntimeError, match="too much dynamic shared memory"):
        run(launcher, "intrinsics", nans(6, 32), threads=32, shared=1 << 20)
    with pytest.raises(RuntimeError, match="no kernel nothing"):
        run(launcher, "nothing", nans(1), threads=1)
