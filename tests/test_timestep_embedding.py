"""Embeddings of timesteps: diffusers' bits, the accuracy of far angles, and use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import timestep_embedding as reference

TIMESTEPS = {
    "int64": torch.tensor([0, 1, 37, 999, 1000]),
    "int32": torch.tensor([981, 3], dtype=torch.int32),
    "float32": torch.tensor([0.25, 999.5, -3.0, 0.0, 1e6]),
    "float64": torch.tensor([1 / 3, 700.125], dtype=torch.float64),
    "float16": torch.tensor([0.5, 512.0], dtype=torch.float16),
    "strided": torch.arange(0, 1000, 7)[::3],
    "none": torch.empty(0),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as Ho et al.": {},
    "as Stable Diffusion": {"flip_sin_to_cos": True, "downscale_freq_shift": 0},
    "scaled": {"scale": 1000, "max_period": 100},
}


@pytest.mark.parametrize("width", [1, 4, 7, 320, 321])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_has_the_bits_of_diffusers(timesteps: str, options: str, width: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t, given = TIMESTEPS[timesteps], OPTIONS[options]
    for _ in range(2):  # frequencies made, and found
        got = ops.timestep_embedding(t, width, **given)
        assert got.dtype == torch.float32
        assert torch.equal(got, embeddings.get_timestep_embedding(t, width, **given))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_far_angles(scale: float) -> None:
    """What is lost is the rounding of the angle: its sine and cosine are as exact as those of a near one."""
    t, width = torch.arange(1000), 256
    got = ops.timestep_embedding(t, width, scale=scale, downscale_freq_shift=0)
    options = width, False, 0.0, scale, 10000.0
    oracle = reference.timestep_embedding(t.double(), *options)
    largest = scale * t.double()[:, None]
    allowed = 4 * torch.finfo(torch.float32).eps * (1 + largest)  # of the frequency, and of two products
    assert ((got.double() - oracle).abs() <= allowed).all()
    frequencies = reference._frequencies(width // 2, 0.0, 10000.0, torch.float32, t.device)
    angles = (scale * (t.float()[:, None] * frequencies)).double()
    torch.testing.assert_close(got.double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1.2e-7)


def test_is_what_the_formula_says() -> None:
    got = ops.timestep_embedding(torch.tensor([3.0]), 6, downscale_freq_shift=1, max_period=100, scale=2.0)
    angles = [6.0 * 100 ** (-i / 2) for i in range(3)]
    expected = [f(a) for f in (math.sin, math.cos) for a in angles]
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_first_used_in_inference_mode() -> None:
    """Frequencies that are kept from there serve autograd later."""
    reference._kept_frequencies.cache_clear()
    with torch.inference_mode():
        ops.timestep_embedding(torch.arange(3), 18)
    t = torch.randn(3, requires_grad=True)
    ops.timestep_embedding(t, 18).sum().backward()
    assert t.grad is not None
    assert reference._kept_frequencies.cache_info().hits == 1


def test_what_a_mode_makes_is_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ops.timestep_embedding(torch.arange(3), 22).shape == (3, 22)
    assert type(ops.timestep_embedding(torch.arange(3), 22)) is Tensor


def test_finite_differences() -> None:
    t = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(t: Tensor) -> Tensor:
        return OPS["timestep_embedding"](t, 7, True, 0.0, 2.0, 50.0)

    assert torch.autograd.gradcheck(run, (t,))
    assert torch.autograd.gradgradcheck(run, (t,))


@pytest.mark.parametrize("width", [7, 8])
def test_opcheck(width: int) -> None:
    args = (torch.randn(4, requires_grad=True), width, True, 0.0, 1.0, 1e4)
    torch.library.opcheck(torch.ops.mmkern.timestep_embedding.default, args)


def test_compile_without_graph_breaks() -> None:
    t = torch.arange(5)

    def run(t: Tensor) -> Tensor:
        return 2 * ops.timestep_embedding(t, 9)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(t), run(t))


_T = torch.arange(3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.timestep_embedding(3, 8), TypeError, "timestep_embedding: timesteps is int, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.timestep_embedding(_T > 1, 8), TypeError, "timesteps has dtype torch.bool, expected an integer or a"),
    (lambda: ops.timestep_embedding(_T[None], 8), ValueError, r"timesteps has shape \[1, 3\], expected \[samples\]"),
    (lambda: ops.timestep_embedding(_T[0], 8), ValueError, r"timesteps has shape \[\], expected at least 1 axes"),
    (lambda: ops.timestep_embedding(_T, 8.0), TypeError, "embedding_dim is float, expected an int"),  # type: ignore[arg-type]
    (lambda: ops.timestep_embedding(_T, 0), ValueError, "embedding_dim is 0, expected at least 1"),
    (lambda: ops.timestep_embedding(_T, 8, flip_sin_to_cos=1), TypeError, "flip_sin_to_cos is int, expected a bool"),  # type: ignore[arg-type]
    (lambda: ops.timestep_embedding(_T, 2), ValueError, "downscale_freq_shift is 1, expected another number than half"),
    (lambda: ops.timestep_embedding(_T, 8, scale=math.nan), ValueError, "scale is nan, expected a finite number"),
    (lambda: ops.timestep_embedding(_T, 8, max_period=0), ValueError, "max_period is 0, expected a number above 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
