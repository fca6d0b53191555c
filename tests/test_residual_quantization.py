"""Codes level by level, and back: held to the plain loop; gradients; tables of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import mmkern
from mmkern import ops
from mmkern.ops import Projections
from mmkern.ops._define import OPS
from tests import contract


def problem(
    n: int = 60, sizes: tuple[int, int, int] = (4, 50, 8), width: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Projections]:
    g = torch.Generator().manual_seed(n + width)
    levels, _, narrow = sizes

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    codebooks = 0.5 * randn(*sizes) * 0.7 ** torch.arange(levels)[:, None, None].to(dtype)
    weights = randn(levels, narrow, width) / 5, randn(levels, width, narrow) / 8
    return randn(n, width), codebooks, Projections(*weights, 0.1 * randn(levels, narrow), 0.1 * randn(levels, width))


def plain(
    x: Tensor, codebooks: Tensor, given: Projections | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As one writes it: DAC's ResidualVectorQuantize. How far ahead of the next one each code was, too."""
    left, total, codes, commitment, of_codes, ahead = x, torch.zeros_like(x), [], [], [], []
    for q, codebook in enumerate(codebooks):
        z = left if given is None else functional.linear(left, given.in_weight[q], given.in_bias[q])  # type: ignore[index]
        rows, points = (z, codebook)
        if normalize:
            rows, points = functional.normalize(z, dim=-1), functional.normalize(codebook, dim=-1)
        nearest = torch.topk(torch.cdist(rows.double(), points.double()), 2, largest=False)
        ahead.append(nearest.values[:, 1] - nearest.values[:, 0])
        codes.append(nearest.indices[:, 0])
        e = codebook[codes[-1]]
        commitment.append(functional.mse_loss(z, e.detach()))
        of_codes.append(functional.mse_loss(e, z.detach()))
        step = z + (e - z).detach()
        if given is not None:
            step = functional.linear(step, given.out_weight[q], given.out_bias[q])  # type: ignore[index]
        left, total = left - step, total + step
    return torch.stack(codes, -1), total, torch.stack(commitment), torch.stack(of_codes), torch.stack(ahead, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_is_the_plain_loop(projected: bool, normalize: bool, dtype: torch.dtype) -> None:
    """Codes but where rounding decides, and outputs and gradients of the rows where it does not."""
    for n in (7, 500):
        x, codebooks, given = problem(n, (6, 90, 8 if projected else 24), dtype=dtype)
        projections = given if projected else None
        leaves = [x, codebooks, *(given if projected else ())]
        for leaf in leaves:
            leaf.requires_grad_()
        expected = plain(x, codebooks, projections, normalize)
        found = ops.residual_quantize(x, codebooks, projections, normalize, return_codebook_loss=True)
        is_clear = (expected[4] > 1e-5).cummin(1).values
        assert is_clear.float().mean() > 0.98
        assert torch.equal(found[0][is_clear], expected[0][is_clear])
        if not is_clear.all():
            continue
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(found[1:], expected[1:4], **tolerance)
        upstream = [torch.randn_like(out) for out in found[1:]]
        for one, other in zip(
            torch.autograd.grad(found[1:], leaves, upstream),
            torch.autograd.grad(expected[1:4], leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_without_projections_are_the_same_on_each_backend(normalize: bool) -> None:
    """What is left is a difference of float32, and codes are told in float64: there is nothing to round otherwise."""
    for n, width in ((3, 8), (300, 8), (130, 200)):
        x, codebooks, _ = problem(n, (8, 60, width), width)
        found = ops.residual_quantize(x, codebooks, None, normalize)
        with mmkern.use_backend("reference"):
            expected = ops.residual_quantize(x, codebooks, None, normalize)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        left = x
        for q, codebook in enumerate(codebooks):
            codes = ops.nearest_code(left, codebook, "cosine" if normalize else "l2")
            assert torch.equal(found[0][:, q], codes)
            left = left - codebook[codes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantize_is_the_reconstruction(dtype: torch.dtype) -> None:
    x, codebooks, given = problem(60, dtype=dtype)
    codes, reconstruction, _ = ops.residual_quantize(x, codebooks, given)
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(ops.residual_dequantize(codes, codebooks, given), reconstruction, **tolerance)
    without_bias = given[:2]
    codes, reconstruction, _ = ops.residual_quantize(x, codebooks, without_bias)
    torch.testing.assert_close(ops.residual_dequantize(codes, codebooks, without_bias), reconstruction, **tolerance)
    x, codebooks, _ = problem(60, (4, 50, 24), dtype=dtype)
    codes, reconstruction, _ = ops.residual_quantize(x, codebooks)
    assert torch.equal(ops.residual_dequantize(codes, codebooks), reconstruction)


def test_dequantize_of_fewer_levels_and_of_none() -> None:
    for projected in (False, True):
        x, codebooks, given = problem(20, (4, 50, 8 if projected else 24))
        projections = given if projected else None
        codes, _, _ = ops.residual_quantize(x.reshape(4, 5, 24), codebooks, projections)
        assert codes.shape == (4, 5, 4)
        first = ops.residual_dequantize(codes[..., :2], codebooks, projections)
        assert first.shape == (4, 5, 24)
        for none in (-1, 50):
            dropped = codes.clone().int()
            dropped[..., 2:] = none
            torch.testing.assert_close(ops.residual_dequantize(dropped, codebooks, projections), first)
        two = Projections(*(p[:2] for p in given)) if projected else None
        torch.testing.assert_close(ops.residual_quantize(x, codebooks[:2], two)[1], first.flatten(0, 1))


def test_straight_through() -> None:
    """Without projections the gradient passes as it is, once and not once for each level."""
    x, codebooks, _ = problem(60, (4, 50, 24))
    upstream = torch.randn(60, 24)
    leaves = x.requires_grad_(), codebooks.requires_grad_()
    _, reconstruction, _ = ops.residual_quantize(*leaves)
    found = torch.autograd.grad(reconstruction, leaves, upstream)
    assert torch.equal(found[0], upstream)
    assert torch.equal(found[1], torch.zeros_like(codebooks))


@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_losses(normalize: bool, which: int) -> None:
    """Away from boundaries: of the commitment loss what is not the code's, of the codes' loss what is not the row's."""
    x, codebooks, given = problem(6, (3, 7, 4), 5, torch.float64)
    clear = plain(x, codebooks, given, normalize)[4].min(1).values > 0.01
    x, weights = x[clear], tuple(v.requires_grad_() for v in given)
    assert len(x) > 3

    def loss_of_z(x: Tensor, *given: Tensor) -> Tensor:
        return ops.residual_quantize(x, codebooks, Projections(*given), normalize, return_codebook_loss=True)[2]

    def first_loss_of_codes(codebooks: Tensor) -> Tensor:
        # Of the first level: those behind it see its codes in what is left.
        return ops.residual_quantize(x, codebooks, given, normalize, return_codebook_loss=True)[3][0]

    if which == 3:
        torch.autograd.gradcheck(first_loss_of_codes, codebooks.requires_grad_())
        return
    # Of one level, whose loss has no path through a code that is taken for z.
    one = [w[:1].detach().requires_grad_() for w in weights]
    codebooks = codebooks[:1]
    torch.autograd.gradcheck(loss_of_z, (x.requires_grad_(), *one))


def test_losses_teach_what_they_say() -> None:
    x, codebooks, given = problem(60)
    for leaf in (x, codebooks):
        leaf.requires_grad_()
    found = ops.residual_quantize(x, codebooks, given, return_codebook_loss=True)
    assert torch.equal(found[2], found[3])
    (of_codes,) = torch.autograd.grad(found[2].sum(), codebooks, retain_graph=True)
    assert (of_codes == 0).all()
    (of_codes,) = torch.autograd.grad(found[3].sum(), codebooks, retain_graph=True)
    used = torch.zeros(4, 50, dtype=torch.bool)
    used[torch.arange(4), found[0]] = True
    assert torch.equal((of_codes != 0).any(-1), used)


@pytest.mark.parametrize("projected", [False, True])
def test_nan_stays_in_its_row(projected: bool) -> None:
    x, codebooks, given = problem(60, (4, 50, 8 if projected else 24))
    projections = given if projected else None
    clean = ops.residual_quantize(x, codebooks, projections)
    broken = x.clone()
    broken[7, 3] = torch.nan
    codes, reconstruction, loss = ops.residual_quantize(broken, codebooks, projections)
    others = torch.arange(60) != 7
    assert torch.equal(codes[others], clean[0][others])
    assert torch.equal(reconstruction[others], clean[1][others])
    assert (codes[7] == 0).all()
    assert reconstruction[7, 3].isnan()
    assert loss.isnan().all()
    with mmkern.use_backend("reference"):
        expected = ops.residual_quantize(broken, codebooks, projections)
    assert torch.equal(codes, expected[0])
    assert torch.equal(reconstruction.isnan(), expected[1].isnan())


def test_codes_that_float32_takes_for_one() -> None:
    """In each level: rows of which keys do not tell are held against all codes in float64."""
    g = torch.Generator().manual_seed(2)
    codebooks = 100 + torch.randint(-8, 9, (2, 300, 24), generator=g) / 64.0
    codebooks[1] -= 100
    x = 100 + torch.randint(-8, 9, (130, 24), generator=g) / 64.0
    codes, reconstruction, _ = ops.residual_quantize(x, codebooks)
    left = x
    for q in range(2):
        squares = (left[:, None].double() - codebooks[q].double()).square().sum(-1)
        assert torch.equal(codes[:, q], squares.argmin(1))
        left = left - codebooks[q][codes[:, q]]
    torch.testing.assert_close(reconstruction, x - left)


def test_same_bits_for_any_number_of_threads() -> None:
    x, codebooks, given = problem(500)
    tables, codes = torch.randn(5, 70, 33), torch.randint(-1, 71, (900, 5))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = tables.clone().requires_grad_()
        mean = ops.codes_embedding_mean(codes, leaf)
        (grad,) = torch.autograd.grad(mean.square().sum(), leaf)
        sums = OPS["code_sums"](x, codes[:500, 0].contiguous(), 70)
        found.append((*ops.residual_quantize(x, codebooks, given), mean, grad, *sums))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_compiles_whole() -> None:
    x, codebooks, given = problem(20)

    def run(x: Tensor, codebooks: Tensor, *given: Tensor) -> Tensor:
        _, out, loss, of_codes = ops.residual_quantize(x, codebooks, Projections(*given), return_codebook_loss=True)
        return torch.cat([out.flatten(), loss, of_codes])

    assert any("residual_quantize" in kernel for kernel in contract.kernels_when_compiled(run, x, codebooks, *given))
    codes = ops.residual_quantize(x, codebooks, given)[0]

    def back(codebooks: Tensor, *out: Tensor) -> Tensor:
        return ops.residual_dequantize(codes, codebooks, Projections(given.in_weight, out[0], None, out[1]))

    contract.kernels_when_compiled(back, codebooks, given.out_weight, given.out_bias)  # type: ignore[arg-type]


# ---- Tables and sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_embedding_is_a_mean_of_embeddings(dtype: torch.dtype) -> None:
    tables = torch.randn(12, 90, 40, requires_grad=True)
    codes = torch.randint(0, 90, (3, 7, 12)).to(dtype)
    found = ops.codes_embedding_mean(codes, tables)
    expected = torch.stack([functional.embedding(codes[..., q].long(), tables[q]) for q in range(12)]).mean(0)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(3, 7, 40)
    for one, other in zip(
        torch.autograd.grad(found, tables, upstream), torch.autograd.grad(expected, tables, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_codes_that_are_none_add_nothing() -> None:
    tables = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([[0, -1, 4], [5, 2**40, -(2**40)]])
    found = ops.codes_embedding_mean(codes, tables)
    torch.testing.assert_close(found[0], (tables[0, 0] + tables[2, 4]) / 3)
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))
    torch.autograd.gradcheck(lambda tables: ops.codes_embedding_mean(codes, tables), tables)
    torch.autograd.gradgradcheck(lambda tables: ops.codes_embedding_mean(codes, tables), tables)


def test_embedding_compiles_whole() -> None:
    codes = torch.randint(-1, 9, (6, 3))
    kernels = contract.kernels_when_compiled(lambda t: ops.codes_embedding_mean(codes, t), torch.randn(3, 8, 5))
    assert any("codes_embedding" in kernel for kernel in kernels)


# ---- Refused ---------------------------------------------------------------------------------------------------------

Q, D = "residual_quantize", "residual_dequantize"
REFUSED: tuple[tuple[Callable[..., Any], type[Exception], str], ...] = (
    (
        lambda x, c, p: ops.residual_quantize(x, c),
        ValueError,
        rf"{Q}: codebooks has shape \[4, 50, 8\], expected \[Q, K, 24\]",
    ),
    (
        lambda x, c, p: ops.residual_quantize(x, c[:0], p),
        ValueError,
        rf"{Q}: codebooks has shape \[0, 50, 8\], expected",
    ),
    (
        lambda x, c, p: ops.residual_quantize(x, c[0], p),
        ValueError,
        rf"{Q}: codebooks has shape \[50, 8\], expected \[Q, K, d",
    ),
    (lambda x, c, p: ops.residual_quantize(x.double(), c, p), TypeError, f"{Q}: codebooks has dtype torch.float32"),
    (lambda x, c, p: ops.residual_quantize(x, c, p[:3]), TypeError, f"{Q}: projections is 3 entries, expected"),
    (lambda x, c, p: ops.residual_quantize(x, c, p[0]), TypeError, f"{Q}: projections is Tensor, expected"),
    (lambda x, c, p: ops.residual_quantize(x, c, (p[0], None)), TypeError, f"{Q}: out_weight is NoneType"),
    (lambda x, c, p: ops.residual_quantize(x, c, (p[1], p[1])), ValueError, rf"{Q}: in_weight has shape \[4, 24, 8\]"),
    (lambda x, c, p: ops.residual_quantize(x, c, (p[0], p[0])), ValueError, rf"{Q}: out_weight has shape \[4, 8, 24\]"),
    (
        lambda x, c, p: ops.residual_quantize(x, c, p._replace(in_bias=p[3])),
        ValueError,
        rf"{Q}: in_bias has shape \[4, 24\]",
    ),
    (
        lambda x, c, p: ops.residual_quantize(x, c, p._replace(out_bias=x[0])),
        ValueError,
        rf"{Q}: out_bias has shape \[24\]",
    ),
    (lambda x, c, p: ops.residual_quantize(x, c, p, 1), TypeError, f"{Q}: normalize is int, expected a bool"),
    (
        lambda x, c, p: ops.residual_dequantize(x, c, p),
        TypeError,
        f"{D}: codes has dtype torch.float32, expected int64",
    ),
    (lambda x, c, p: ops.residual_dequantize(None, c, p), TypeError, f"{D}: codes is NoneType"),
    (
        lambda x, c, p: ops.residual_dequantize(x.long(), c, p),
        ValueError,
        rf"{D}: codes has shape \[60, 24\], expected \[..., n",
    ),
    (
        lambda x, c, p: ops.residual_dequantize(x.long(), c[0]),
        ValueError,
        f"{D}: codebooks has shape .* expected at least 3",
    ),
    (
        lambda x, c, p: ops.residual_dequantize(x[:, :2].long(), c, (p[0], p[0])),
        ValueError,
        rf"{D}: out_weight has shape",
    ),
    (
        lambda x, c, p: ops.codes_embedding_mean(x[:, :3].long(), c),
        ValueError,
        r"codes_embedding_mean: codes has shape \[60, 3\]",
    ),
    (
        lambda x, c, p: ops.codes_embedding_mean(x[:, :4], c),
        TypeError,
        "codes_embedding_mean: codes has dtype torch.float32",
    ),
    (
        lambda x, c, p: ops.codes_embedding_mean(x[:, :4].long(), c[0]),
        ValueError,
        r"codes_embedding_mean: tables has shape \[50, 8",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*problem())
