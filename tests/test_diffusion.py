"""The diffusion family: its kernels and the numerics contract, guidance, noise, and use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern import ops
from mmkern.diffusion import solvers
from mmkern.diffusion.solvers import Level
from mmkern.ops._define import OPS
from mmkern.reference.diffusion import Column
from mmkern.reference.philox import normal
from tests import contract
from tests.cases.case import Case
from tests.cases.diffusion import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OF_EVERY_DTYPE = ("2x70x20", "sliced", "2x7x64")
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label.startswith(OF_EVERY_DTYPE)
]
HERE, THERE = Level(0.6, 0.8), Level(0.8, 0.6)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


# A step has the gradients of its reference.
OF_GRADIENTS = [run for run in RUNS if run[0].op == "masked_squared_error" or run[0].label.endswith(("-all", "-known"))]


@pytest.mark.parametrize(("case", "dtype"), OF_GRADIENTS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


@pytest.mark.parametrize("case", [case for case in CASES if case.label.endswith(("-all", "sliced-frames"))], ids=str)
def test_opcheck(case: Case) -> None:
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and i in OPS[case.op].tensors else a
        for i, a in enumerate(case.arguments(torch.float32))
    ]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


# ---- Guidance --------------------------------------------------------------------------------------------------------


def outputs(count: int) -> tuple[Tensor, ...]:
    return torch.randn(count, 3, 5, 7, dtype=torch.float64).unbind()


def guided(*given: Tensor, guidance: ops.Guidance) -> Tensor:
    """What guidance makes of the outputs: a step to no noise of a model that says x₀."""
    coefficients = solvers.euler(HERE, Level(1.0, 0.0), "sample")
    return ops.euler_step(given, torch.zeros_like(given[0]), coefficients, guidance=guidance)


def test_cfg() -> None:
    g = outputs(2)
    torch.testing.assert_close(guided(*g, guidance=ops.Guidance("cfg", 3.0)), g[0] + 3 * (g[1] - g[0]))
    scales = torch.tensor([[1.0], [2.0], [-0.5]], dtype=torch.float64)
    expected = g[0] + scales[:, :, None] * (g[1] - g[0])
    torch.testing.assert_close(guided(*g, guidance=ops.Guidance("cfg", scales)), expected)


def test_cfg_in_one_batch() -> None:
    g = outputs(2)
    both = torch.cat(g)
    coefficients = solvers.euler(HERE, Level(1.0, 0.0), "sample")
    got = ops.euler_step(both, torch.zeros_like(g[0]), coefficients, guidance=ops.Guidance("cfg", 3.0))
    torch.testing.assert_close(got, g[0] + 3 * (g[1] - g[0]))


def test_guidance_first_used_in_inference_mode() -> None:
    guidance, (g, h) = ops.Guidance("cfg", 3.0), outputs(2)
    with torch.inference_mode():
        expected = guided(g, h, guidance=guidance)
    got = guided(g.requires_grad_(), h, guidance=guidance)
    torch.testing.assert_close(got, expected.clone())
    torch.testing.assert_close(torch.autograd.grad(got.sum(), g)[0], torch.full_like(g, -2.0))


def test_several_conditions() -> None:
    g = outputs(4)
    got = guided(*g, guidance=ops.Guidance("multi", (1.5, -2.0, 0.25)))
    expected = g[0] + 1.5 * (g[1] - g[0]) - 2.0 * (g[2] - g[0]) + 0.25 * (g[3] - g[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 1), (5, 1), (1, 1, 7)])
def test_masked_conditions(nested: bool, shape: tuple[int, ...]) -> None:
    g, mask = outputs(3), torch.rand(shape) > 0.5
    got = guided(*g, guidance=ops.Guidance("mask_cfg", (2.0, 1.5), mask, nested))
    expected = g[0] + 2.0 * (g[1] - g[0]) + 1.5 * mask * (g[2] - (g[1] if nested else g[0]))
    torch.testing.assert_close(got, expected)


def test_rescaled_cfg() -> None:
    """As diffusers' rescale_noise_cfg has it; several pieces a sample."""
    g = torch.randn(2, 3, 70, 90, dtype=torch.float64).unbind()
    cfg = g[0] + 7.5 * (g[1] - g[0])
    axes = (1, 2)
    rescaled = cfg * (g[1].std(axes, keepdim=True) / cfg.std(axes, keepdim=True))
    got = guided(*g, guidance=ops.Guidance("cfg_rescale", (7.5, 0.7)))
    torch.testing.assert_close(got, 0.7 * rescaled + 0.3 * cfg)


# ---- Noise -----------------------------------------------------------------------------------------------------------


def drawn(shape: tuple[int, ...], **options: Any) -> Tensor:
    """The noise that a step draws, alone."""
    numbers = torch.zeros(1, len(Column))
    numbers[0, Column.NOISE] = 1
    coefficients = ops.Coefficients("ddpm", numbers, adds_noise=True)
    x = torch.zeros(shape)
    return ops.ddpm_step(x, x, coefficients, **options)


def test_noise_of_a_seed() -> None:
    """Of a position alone: whatever the shape, the layout and the number of threads."""
    expected = normal(torch.tensor([11, 3]), 30000, torch.float64)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in ((30000,), (3, 10000), (300, 4, 25)):
            got = drawn(shape, seed=11, offset=3)
            torch.testing.assert_close(got.flatten().double(), expected, rtol=0, atol=4 * 4.8e-7)
    assert torch.equal(drawn((2, 50), seed=11, offset=4), drawn((104,), seed=11, offset=3)[4:].reshape(2, 50))


def test_noise_is_normal() -> None:
    """Kolmogorov and Smirnov's distance, and the correlation of neighbours."""
    x = drawn((400_000,), seed=1).double().sort().values
    steps = torch.arange(1, len(x) + 1) / len(x)
    distance = (torch.special.ndtr(x) - steps).abs().max().item()
    assert distance * len(x) ** 0.5 < 1.95  # p = 1e-3
    pairs = drawn((400_000,), seed=2).double().reshape(-1, 4).T
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 4.5 / 100_000**0.5
    assert x[-1] > 4
    assert x[0] < -4


def test_noise_of_a_generator() -> None:
    first, second = (drawn((2, 9), generator=torch.Generator().manual_seed(s)) for s in (5, 5))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    a = drawn((2, 9))
    assert not torch.equal(a, drawn((2, 9)))
    torch.manual_seed(0)
    assert torch.equal(a, drawn((2, 9)))


def test_noise_of_rows_out_of_order() -> None:
    x = torch.zeros(4, 6).T
    numbers = torch.zeros(1, len(Column))
    numbers[0, Column.NOISE] = 1
    got = ops.ddpm_step(x, x, ops.Coefficients("ddpm", numbers, adds_noise=True), seed=7)
    assert torch.equal(got, drawn((6, 4), seed=7))


# ---- Limits, and what is known ---------------------------------------------------------------------------------------


def test_clip_and_threshold() -> None:
    x0 = 3 * torch.randn(3, 5, 40)
    coefficients = solvers.euler(HERE, Level(1.0, 0.0), "sample")
    got = ops.euler_step(x0, torch.zeros_like(x0), coefficients, clip=1.5)
    torch.testing.assert_close(got, x0.clamp(-1.5, 1.5))
    s = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(1, 4.0)[:, None, None]
    got = ops.euler_step(x0, torch.zeros_like(x0), coefficients, clip=ops.Threshold(0.9, 4.0))
    torch.testing.assert_close(got, x0.clamp(-s, s) / s)


def test_nan_stays_in_its_place() -> None:
    g = torch.randn(2, 40)
    g[1, 33] = torch.nan
    coefficients = solvers.dpm_solver_pp(HERE, THERE, [], "sample")
    for out in ops.dpm_solver_pp_2m_step(g, torch.zeros_like(g), coefficients, clip=1.0):
        assert out.isnan().nonzero().tolist() == [[1, 33]]


def test_known_regions_keep_their_level() -> None:
    x, clean, noise = torch.randn(3, 2, 4, 6).unbind()
    keep = (torch.rand(6) > 0.5).float()
    coefficients = solvers.ddim(HERE, THERE)
    free = ops.ddim_step(x, x, coefficients)
    got = ops.ddim_step(x, x, coefficients, known=ops.Known(keep, clean, noise))
    expected = torch.where(keep > 0, THERE.alpha * clean + THERE.sigma * noise, free)
    torch.testing.assert_close(got, expected)


# ---- Use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_fewer_bits(dtype: torch.dtype) -> None:
    """A model in 16 bits beside samples in float32: nothing is rounded on the way."""
    x, g = torch.randn(2, 3, 70), torch.randn(2, 3, 70).to(dtype)
    coefficients = solvers.ddim(HERE, THERE)
    torch.testing.assert_close(ops.ddim_step(g, x, coefficients), ops.ddim_step(g.float(), x, coefficients))
    narrow = ops.ddim_step(g.float(), x.to(dtype), coefficients)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow, ops.ddim_step(g.float(), x.to(dtype).float(), coefficients).to(dtype))


def test_finite_differences() -> None:
    g, x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    known = ops.Known(torch.rand(4, dtype=torch.float64), *torch.randn(2, 3, 4, dtype=torch.float64).unbind())
    coefficients = solvers.ddim(HERE, THERE, "v")

    def run(g: Tensor, x: Tensor) -> Tensor:
        return ops.ddim_step(g, x, coefficients, known=known, clip=0.7)

    assert torch.autograd.gradcheck(run, (g, x))
    assert torch.autograd.gradgradcheck(run, (g, x))


def test_compile_without_graph_breaks() -> None:
    g, x = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8)
    coefficients, guidance = solvers.ddim(HERE, THERE), ops.Guidance("cfg", 2.0)

    def run(g: Tensor, x: Tensor) -> Tensor:
        return ops.ddim_step(g, x, coefficients, guidance=guidance)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g[0], x), run(g[0], x))


@pytest.mark.parametrize("seed", [None, 1])
def test_a_compiler_sees_into_a_step_that_draws_no_noise(seed: int | None) -> None:
    """And can fuse it with what stands beside it."""
    coefficients = solvers.ddim(HERE, THERE, eta=0.5)

    def run(g: Tensor, x: Tensor) -> Tensor:
        noise = torch.ones_like(x) if seed is None else None
        step = ops.ddim_step(g, 2 * x, coefficients, seed=seed, clip=0.7, noise=noise)
        return step + ops.denoising_loss(g, x)

    found = contract.kernels_when_compiled(run, *torch.randn(2, 2, 3, 8))
    assert found == ([] if seed is None else ["mmkern.denoise_step"])


def test_same_bits_for_any_number_of_threads() -> None:
    g = torch.randn(2, 3, 50, 301)
    x = torch.randn(3, 50, 301)
    guidance, found = ops.Guidance("cfg_rescale", (7.5, 0.7)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        coefficients = solvers.ddim(HERE, THERE, eta=1.0)
        found.append(ops.ddim_step(g.unbind(), x, coefficients, guidance=guidance, seed=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_no_cache_holds() -> None:
    """Its results are stored past the caches."""
    g, x = torch.randn(2, 4, 1_500_000).unbind()
    got, x0 = ops.dpm_solver_pp_2m_step(g, x, solvers.dpm_solver_pp(HERE, THERE, [], "sample"))
    torch.testing.assert_close(x0, g)
    torch.testing.assert_close(got, 0.75 * x + (0.8 - 0.75 * 0.6) * g)


_X = torch.randn(2, 3, 8)
_DDIM = solvers.ddim(HERE, THERE)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.ddim_step(_X, _X.int(), _DDIM), TypeError, "ddim_step: sample has dtype torch.int32"),
    (lambda: ops.ddim_step(_X, None, _DDIM), TypeError, "ddim_step: sample is NoneType, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ddim_step(_X, None, _DDIM, seed=1), TypeError, "ddim_step: sample is NoneType, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.ddim_step(_X, _X, _X), TypeError, "ddim_step: coefficients is Tensor, expected Coefficients"),  # type: ignore[arg-type]
    (lambda: ops.euler_step(_X, _X, _DDIM), ValueError, "coefficients are those of ddim_step, expected of euler_step"),
    (lambda: ops.ddim_step(_X[:1], _X, _DDIM), ValueError, r"model_output has shape \[1, 3, 8\], expected \[2, 3, 8\]"),
    (lambda: ops.ddim_step((_X, _X), _X, _DDIM), ValueError, "model_output has 2 outputs, expected 1 without guidance"),
    (lambda: ops.ddim_step(_X, _X, _DDIM, clip=-1.0), ValueError, "clip is -1.0, expected a number of at least 0"),
    (lambda: ops.ddim_step(_X, _X, _DDIM, sead=1), TypeError, "ddim_step: got sead, expected guidance, clip, known"),  # type: ignore[call-arg]
    (
        lambda: ops.ddim_step(_X[:1], _X[:1], _DDIM, guidance=ops.Guidance()),
        ValueError,
        r"model_output has shape \[1, 3, 8\], expected 2 outputs along its first axis",
    ),
    (
        lambda: ops.ddim_step((_X,), _X, _DDIM, guidance=ops.Guidance()),
        ValueError,
        "model_output has 1 outputs, expected 2 for guidance of mode 'cfg'",
    ),
    (
        lambda: ops.ddim_step((_X, _X), _X, _DDIM, guidance=ops.Guidance("cfg", torch.ones(3, 1))),
        ValueError,
        r"weights has shape \[3, 10\], expected \[2, 10\] or \[1, 10\]",
    ),
    (
        lambda: ops.ddim_step(_X, _X, _DDIM, known=ops.Known(torch.ones(7), _X, _X)),
        ValueError,
        r"keep has shape \[7\], expected to broadcast to \[2, 3, 8\]",
    ),
    (
        lambda: ops.dpm_solver_pp_2m_step(_X, _X, solvers.dpm_solver_pp(HERE, THERE, [Level(0.5, 0.9)])),
        ValueError,
        "got 0 tensors of earlier steps, expected 1",
    ),
    (lambda: ops.Guidance("cfg", (1.0, 2.0)), ValueError, "got 2 scales, expected 1 for mode 'cfg'"),
    (lambda: ops.Guidance("mask_cfg", (1.0, 2.0)), ValueError, "mask goes with mode 'mask_cfg'"),
    (lambda: ops.Guidance("clip"), ValueError, "mode is 'clip', expected 'cfg', 'multi'"),  # type: ignore[arg-type]
    (lambda: solvers.ddim(Level(0.0, 1.0), THERE), ValueError, "'epsilon' says nothing of x₀ where alpha is 0"),
    (lambda: solvers.dpm_solver_pp(HERE, THERE, [HERE]), ValueError, "expected less noise in each"),
    (lambda: solvers.euler(HERE, THERE, "x0"), ValueError, "prediction is 'x0', expected 'epsilon'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
