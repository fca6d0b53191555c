"""mmkern._C on its own: NumPy arrays alone can test the kernels, and no call with wrong arguments reaches one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

kernels = pytest.importorskip("mmkern._C", reason="mmkern._C is not built")


def test_numpy_arrays_run() -> None:
    v = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    out = np.empty_like(v)
    kernels.lorentz_exp_map0(v, 2.0, out, 1)
    r = np.sqrt(2.0) * np.linalg.norm(v, axis=-1, keepdims=True)
    np.testing.assert_allclose(out, np.sinh(r) / r * v, rtol=1e-5)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_the_gradient_of_a_row_may_have_any_stride() -> None:
    points = [torch.randn(9, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def gradients(grad: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty(9, 5), torch.empty(9, 5), torch.empty(())]
        kernels.lorentz_distance_backward(grad, *points, 0.7, *out, 1)
        return out

    every_second = torch.randn(18)[::2]
    for grad in (every_second, torch.tensor(0.5).expand(9)):
        for strided, dense in zip(gradients(grad), gradients(grad.contiguous()), strict=True):
            assert torch.equal(strided, dense)


def attend(heads: int = 4, width: int = 8) -> tuple[Any, ...]:
    q, kv = x(1, heads, 5, width), x(1, 2, 6, width)
    options = (1.0, 0.0, -1, -1, 0, 0.0)
    return q, kv, kv, *[None] * 6, *options, x(1, heads, 5, width), x(1, heads, 5), 1


def two_sources(groups: int = 2, gate: torch.Tensor | None = None) -> tuple[Any, ...]:
    q, first, second = x(1, 4, 5, 8), x(1, 2, 6, 8), x(1, groups, 7, 8)
    places = (first, first, None, None, None, second, second, gate, None, None)
    return q, *places, *[None] * 11, 1.0, 0.0, 0, 0.0, q, 1


WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    ("lorentz_exp_map0", (x(2, 3), 1.0, 1), "takes 4 arguments, got 3"),
    ("lorentz_exp_map0", (x(2, 3), 0.0, x(2, 3), 1), "curvature must be above 0"),
    ("lorentz_exp_map0", (x(2, 3), float("nan"), x(2, 3), 1), "curvature must be above 0"),
    ("lorentz_exp_map0", (x(2, 3), x(1), x(2, 3), 1), "curvature must be a number or a 0-d tensor"),
    ("lorentz_exp_map0", (x(2, 3), 1.0, None, 1), "out is None"),
    ("lorentz_exp_map0", (x(2, 3), 1.0, x(2, 4), 1), "out has size 4 on axis 1, expected 3"),
    ("lorentz_exp_map0", (x(2, 3), 1.0, x(3, 3), 1), "out has size 3 on axis 0, expected 2"),
    ("lorentz_exp_map0", (x(2, 3), 1.0, x(2, 3, dtype=torch.float64), 1), "out has another dtype"),
    ("lorentz_exp_map0", (x(2, 3, dtype=torch.int64), 1.0, x(2, 3, dtype=torch.int64), 1), "v has|x has another dtype"),
    ("lorentz_exp_map0", (x(2, 3, dtype=torch.int32), 1.0, x(2, 3), 1), "has dtype torch.int32"),
    ("lorentz_exp_map0", (x(3, 2).T, 1.0, x(2, 3), 1), "last axis that is not dense"),
    ("lorentz_exp_map0", (x(3, 4, 5)[:, :2], 1.0, x(3, 2, 5), 1), "leading axes that do not collapse"),
    ("lorentz_exp_map0", ([1.0], 1.0, x(1), 1), "is a list, not a plain tensor"),
    ("lorentz_exp_map0", (x(2, 3).to("meta"), 1.0, x(2, 3), 1), "must be on the CPU"),
    ("lorentz_exp_map0", (x(*[1] * 13), 1.0, x(2, 3), 1), "more than 12 axes"),
    ("lorentz_distance", (x(2, 3), x(2, 3), 1.0, x(2, 1), 1), "out has"),
    ("lorentz_pairwise_distance", (x(2, 3), x(4, 3), 1.0, x(4, 2), 1), "out has size 4 on axis 0, expected 2"),
    ("lorentz_pairwise_distance", (x(2, 2, 3), x(4, 3), 1.0, x(2, 4), 1), "x has 3 axes"),
    (
        "lorentz_centroid",
        (x(4, 5, 3), x(4, 9)[:, :5], 1.0, x(4, 3), 1),
        "weights has leading axes that do not collapse",
    ),
    ("cross_attention", attend(heads=3), "q has size 3 on axis 1, expected a multiple of 2"),
    ("cross_attention", attend(width=0), "q has size 0 on axis 3, expected at least 1"),
    ("multi_source_attention", two_sources(groups=3), "q has size 4 on axis 1, expected a multiple of 3"),
    ("multi_source_attention", two_sources(gate=x(1, 1, 1, 2)), "gate1 has size 2 on axis 3, expected 1"),
    ("mobius_scalar_mul", (x(2, dtype=torch.bfloat16), x(2, 3), 1.0, x(2, 3), 1), "r has another dtype"),
]


@pytest.mark.parametrize(("name", "args", "message"), WRONG, ids=[f"{i}-{w[2][:40]}" for i, w in enumerate(WRONG)])
def test_wrong_arguments_never_reach_a_kernel(name: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*({message})"):
        getattr(kernels, name)(*args)


def test_threads_must_be_a_number() -> None:
    with pytest.raises(TypeError):
        kernels.lorentz_exp_map0(x(2, 3), 1.0, x(2, 3), "two")


@pytest.mark.slow
@pytest.mark.parametrize("level", kernels.isa_levels)
def test_every_level_that_this_cpu_runs(level: str) -> None:
    code = (
        "import torch, mmkern._C as kernels; from mmkern import ops; torch.manual_seed(0); x = torch.randn(9, 37);"
        "assert kernels.isa == LEVEL; import mmkern;"
        "from contextlib import nullcontext\n"
        "with mmkern.verify(): ops.lorentz_log_map(x, x.flip(0), 0.7); ops.lorentz_pairwise_distance(x, x.flip(0), 0.7)"
    ).replace("LEVEL", repr(level))
    environment = os.environ | {"MMKERN_CPU_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if "does not run on this CPU" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_unknown_level_is_refused_and_seen() -> None:
    environment = os.environ | {"MMKERN_CPU_ISA": "mmx"}
    for code in (
        "import torch, mmkern._C",
        "import torch; from mmkern import ops; ops.lorentz_exp_map0(torch.ones(3))",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert "MMKERN_CPU_ISA=mmx was not built" in done.stderr


@pytest.mark.slow
def test_an_empty_level_is_none() -> None:
    environment = os.environ | {"MMKERN_CPU_ISA": ""}
    subprocess.run([sys.executable, "-c", "import torch, mmkern._C"], env=environment, check=True)
