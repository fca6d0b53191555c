"""The quantization family: the numerics contract, codes that are nearest by exact arithmetic, gradients, and use."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.ops._outputs import in_tuple
from mmkern.ops.quantization import Metric
from tests import contract
from tests.cases.case import Case
from tests.cases.quantization import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METRICS: tuple[Metric, ...] = ("l2", "cosine")
IN_ALL_DTYPES = (
    *("5x9x7", "49x600x20", "97x130x200", "ties of 20", "clustered, 20", "strided", "axes"),
    *("5x7, 3x9", "100x24, 4x37x8", "100x24, 4x37x8, cosine", "2x5x12, mean", "none", "none, 40x20, 6", "500x9, 2"),
)
RUNS = [(case, dtype) for case in CASES for dtype in DTYPES if dtype == torch.float32 or case.label in IN_ALL_DTYPES]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    """The codes are those of the reference, whose distances are in float64."""
    outs = in_tuple(contract.check_forward(case, OPS[case.op], dtype, device))
    expected = in_tuple(OPS[case.op].reference(*case.arguments(dtype, device)))
    for found, wanted in zip(outs, expected, strict=True):
        assert found.is_floating_point() or torch.equal(found, wanted)


@pytest.mark.parametrize(("case", "dtype"), [run for run in RUNS if "zero" not in run[0].label], ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


CHECKED = (
    *("5x9x7", "axes", "strided", "100x24, 4x37x8", "level axes", "no biases", "strided levels"),
    *("2x5x12, mean", "columns of codes", "3x50x70, 300", "strided sums"),
)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in CHECKED], ids=str)
def test_opcheck(case: Case) -> None:
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in OPS[case.op]._prepare(case.arguments(torch.float32))
    ]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(args))


def rows(n: int, k: int, width: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, codebook = (torch.randn(count, width, generator=generator, dtype=torch.float64) for count in (n, k))
    return x.to(dtype), codebook.to(dtype)


# ---- Which code is nearest -------------------------------------------------------------------------------------------


def ranks_by_exact_arithmetic(x: Tensor, codebook: Tensor, metric: Metric) -> list[list[Fraction]]:
    """In the order of the distances, of the numbers as they are, without any rounding."""
    rows, codes = ([[Fraction(v) for v in row] for row in matrix.double().tolist()] for matrix in (x, codebook))

    def rank(row: list[Fraction], code: list[Fraction]) -> Fraction:
        if metric == "l2":
            return sum(((a - b) ** 2 for a, b in zip(row, code, strict=True)), Fraction(0))
        product = sum((a * b for a, b in zip(row, code, strict=True)), Fraction(0))
        square = sum((b * b for b in code), Fraction(0))
        return -product * abs(product) / square if square else Fraction(0)

    return [[rank(row, code) for code in codes] for row in rows]


def check_codes(x: Tensor, codebook: Tensor, metric: Metric = "l2", *, exactly: bool = True) -> None:
    """As few rows, and as many, between which the way to the result differs; not ``exactly``: as float64 tells them."""
    ranks = ranks_by_exact_arithmetic(x, codebook, metric)
    least = [min(of_row) for of_row in ranks]
    first = [of_row.index(rank) for of_row, rank in zip(ranks, least, strict=True)]
    repeats = 1 + 12 // len(x)
    few = ops.nearest_code(x[:12], codebook, metric).tolist()
    many = ops.nearest_code(x.repeat(repeats, 1), codebook, metric).tolist()
    with mmkern.use_backend("reference"):
        formula = ops.nearest_code(x, codebook, metric).tolist()
    if exactly:
        assert few == first[:12]
        assert many == first * repeats
        assert formula == first
        return
    for found in (few, many, formula):
        for at, code in enumerate(found):
            row = at % len(x)
            assert ranks[row][code] <= least[row] + abs(least[row]) * Fraction(1, 2**48)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 1500, 1), (40, 1500, 8), (3, 900, 300), (90, 900, 300), (60, 2600, 64)])
def test_is_argmin_of_the_matrix(size: tuple[int, int, int], dtype: torch.dtype, metric: Metric) -> None:
    x, codebook = rows(*size, dtype)
    codes, distances = ops.nearest_code(x, codebook, metric, return_distance=True)
    wide = [v.double() for v in (x, codebook)]
    if metric == "l2":
        matrix = (wide[0][:, None] - wide[1]).square().sum(-1).sqrt()
    else:
        matrix = 1 - torch.nn.functional.cosine_similarity(wide[0][:, None], wide[1], dim=-1, eps=0)
    if size[2] > 1 or metric == "l2":  # else all codes of one sign have one cosine
        assert torch.equal(codes, matrix.argmin(1))
    torch.testing.assert_close(distances.double(), matrix.amin(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [1, 2, 9, 17])
def test_codes_an_ulp_apart(width: int, metric: Metric) -> None:
    """A code and what differs from it by an ulp or two in one place; rows are the codes, and numbers between them."""
    code = rows(1, 1, width)[0][0] + 3
    near = [code]
    for k in range(width):
        for towards in (-torch.inf, torch.inf):
            other = code.clone()
            for _ in range(2):
                other[k] = torch.nextafter(other[k], torch.tensor(towards))
                near.append(other.clone())
    codebook = torch.stack(near)[torch.randperm(len(near))]
    for x in (codebook, 2 * codebook[:7]):
        check_codes(x, codebook, metric, exactly=metric == "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0, -(2.0**20)])
def test_far_from_zero(offset: float, metric: Metric) -> None:
    """There |x|² − 2 x·c + |c|² has lost what tells codes apart."""
    g = torch.Generator().manual_seed(3)
    x, codebook = (offset + torch.randint(-9, 10, (count, 6), generator=g) * 2.0**-3 for count in (9, 60))
    check_codes(x, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 300])
def test_two_codes_that_float32_takes_for_one(width: int, metric: Metric) -> None:
    """Wherever they stand, in one lane of a vector or in one panel or not, with all others far away."""
    g = torch.Generator().manual_seed(width)
    far = -100 - torch.rand(2700, width, generator=g)
    near = 100 + torch.randint(-64, 65, (2, width), generator=g) / 1024
    for first in (0, 5, 2689):
        for apart in (1, 7, 8, 16, 32, 48, 256, 272, 1040, 2688):
            if (other := (first + apart) % len(far)) == first:
                continue
            codebook = far.clone()
            codebook[[first, other]] = near
            for n in (2, 40):
                found = ops.nearest_code(near.repeat(n // 2, 1), codebook, metric)
                assert found.tolist() == [first, other] * (n // 2)


def test_between_two_codes() -> None:
    """x is exactly as far from one as from the other: the lower index, whichever that is."""
    g = torch.Generator().manual_seed(4)
    for width in (1, 3, 8, 40):
        half = torch.randint(-4096, 4097, (10, width), generator=g) * 2.0**-8
        x = torch.randint(-64, 65, (10, width), generator=g).float()
        for far in (1.0, 64.0):
            ends = torch.stack([x + half, x - half], 1).flatten(0, 1)
            others = far * 100 + ends
            check_codes(x, torch.cat([others, ends, ends.flip(0)]))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_codes(metric: Metric) -> None:
    """Of copies the first one, wherever the others stand; two times a code is no other cosine."""
    for n in (3, 50):
        x, codebook = rows(n, 70, 11)
        first = ops.nearest_code(x, codebook, metric)
        for copies in (codebook.repeat(5, 1), codebook.repeat_interleave(3, 0), torch.cat([codebook, codebook[:1]])):
            found = ops.nearest_code(x, copies, metric)
            assert torch.equal(copies[found], codebook[first])
            is_same = (copies[None] == copies[found][:, None]).all(-1)
            assert torch.equal(found, is_same.int().argmax(1))
        scaled = torch.cat([2 * codebook, codebook])
        if metric == "cosine":
            assert torch.equal(ops.nearest_code(x, scaled, metric), first)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e37])
def test_squares_beyond_the_range_of_float32(scale: float, metric: Metric) -> None:
    x, codebook = (v * scale for v in rows(30, 60, 5))
    if metric == "cosine" and scale < 1e-12:
        codebook = codebook / scale  # what is shorter is not brought to the length 1
    check_codes(x, codebook, metric, exactly=metric == "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_numbers_of_any_size(metric: Metric) -> None:
    g = torch.Generator().manual_seed(6)
    for span in (4.0, 30.0):
        x, codebook = (
            torch.randn(n, 4, generator=g) * 10 ** (span * (torch.rand(n, 4, generator=g) - 0.5)) for n in (12, 80)
        )
        check_codes(x, codebook, metric, exactly=False)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    width=st.integers(1, 20),
    metric=st.sampled_from(METRICS),
    data=st.data(),
)
def test_any_shape(n: int, k: int, width: int, metric: Metric, data: st.DataObject) -> None:
    """Of whole numbers, whose ties are many; every other column of a wider matrix."""
    generator = torch.Generator().manual_seed(n + k)
    most = data.draw(st.integers(1, 3))
    x, codebook = (
        torch.randint(-most, most + 1, (count, 2 * width), generator=generator).float()[:, ::2] for count in (n, k)
    )
    if n:
        check_codes(x, codebook, metric)
    assert ops.nearest_code(x, codebook, metric).shape == (n,)


def test_one_code_and_no_row() -> None:
    x, codebook = rows(30, 1, 5)
    assert (ops.nearest_code(x, codebook) == 0).all()
    codes, distances = ops.nearest_code(x[:0].reshape(2, 0, 5), codebook, "cosine", return_distance=True)
    assert codes.shape == distances.shape == (2, 0)
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_zeros(metric: Metric) -> None:
    """Their cosine is 0, below that of a code on their side and above that of one on the other."""
    for n in (2, 30):
        x, codebook = torch.ones(n, 3), torch.tensor([[-1.0, 0, 0], [0, 0, 0], [-2, 1, 0]])
        x[1] = 0
        codes, distances = ops.nearest_code(x, codebook, metric, return_distance=True)
        assert (codes == 1).sum() == n - (metric == "cosine")
        if metric == "cosine":
            assert codes[1] == 0
            assert (distances == 1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [3, 40])
def test_nan_is_the_largest_distance(n: int, metric: Metric) -> None:
    x, codebook = rows(n, 300)
    clean = ops.nearest_code(x, codebook, metric, return_distance=True)
    broken = x.clone()
    broken[1, 3] = torch.nan
    codes, distances = ops.nearest_code(broken, codebook, metric, return_distance=True)
    assert codes[1] == 0
    assert distances[1].isnan()
    others = torch.arange(n) != 1
    for found, expected in zip((codes, distances), clean, strict=True):
        assert torch.equal(found[others], expected[others])
    bad = torch.cat([torch.full_like(codebook[:9], torch.nan), codebook])
    codes, distances = ops.nearest_code(x, bad, metric, return_distance=True)
    assert torch.equal(codes, 9 + clean[0])
    assert torch.equal(distances, clean[1])
    codes, distances = ops.nearest_code(x, bad[:9], metric, return_distance=True)
    assert (codes == 0).all()
    assert distances.isnan().all()
    behind = torch.cat([codebook, torch.full((64, 12), torch.nan), -9 * x[:2].repeat(40, 1)])
    assert torch.equal(ops.nearest_code(x, behind, metric)[others], clean[0][others])


@pytest.mark.parametrize("n", [3, 40])
def test_infinite_numbers(n: int) -> None:
    """An infinite distance is less than none, and the first of several is taken."""
    x, codebook = rows(n, 50)
    clean = ops.nearest_code(x, codebook)
    codebook = torch.cat([codebook[:2].clone(), codebook])
    codebook[0], codebook[1, 5] = torch.nan, torch.inf
    codes, distances = ops.nearest_code(x, codebook, return_distance=True)
    assert torch.equal(codes, 2 + clean)
    assert distances.isfinite().all()
    codes, distances = ops.nearest_code(x, codebook[:2], return_distance=True)
    assert (codes == 1).all()
    assert (distances == torch.inf).all()
    x[2, 5] = torch.inf
    codes, distances = ops.nearest_code(x, codebook, return_distance=True)
    assert codes[2] == 2
    assert distances[2] == torch.inf


def test_a_row_alone_and_among_others() -> None:
    for metric in METRICS:
        x, codebook = rows(40, 1300, 24)
        codes, distances = ops.nearest_code(x, codebook, metric, return_distance=True)
        for n in range(1, 21):
            found = ops.nearest_code(x[:n], codebook, metric, return_distance=True)
            assert torch.equal(found[0], codes[:n])
            assert torch.equal(found[1], distances[:n])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [5, 300])
def test_same_bits_for_any_number_of_threads(n: int, metric: Metric) -> None:
    x, codebook = rows(n, 3000, 40)
    codebook = torch.cat([codebook, codebook])  # of which no key tells
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.nearest_code(x, codebook, metric, return_distance=True))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


# ---- Use -------------------------------------------------------------------------------------------------------------


def distance_of(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, codebook: ops.nearest_code(x, codebook, metric, return_distance=True)[1]


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: Metric) -> None:
    leaves = tuple(v.requires_grad_() for v in rows(5, 9, 4, torch.float64))
    torch.autograd.gradcheck(distance_of(metric), leaves)
    torch.autograd.gradgradcheck(distance_of(metric), leaves)


def test_a_code_itself_has_no_slope() -> None:
    x = rows(3, 1)[0].requires_grad_()
    codes, distances = ops.nearest_code(x, x.detach(), return_distance=True)
    assert codes.tolist() == [0, 1, 2]
    assert torch.equal(torch.autograd.grad(distances.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("metric", METRICS)
def test_vmap_and_grad(metric: Metric) -> None:
    x, codebook = torch.stack([rows(n, 1)[0][:4] for n in (4, 5)]), rows(3, 9)[1]
    codes = torch.func.vmap(lambda x: ops.nearest_code(x, codebook, metric))(x)
    assert torch.equal(codes, ops.nearest_code(x, codebook, metric))
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(distance_of(metric)(leaf, codebook).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: distance_of(metric)(x, codebook).sum())(x[0]), expected)


def test_nothing_of_all_pairs_is_saved() -> None:
    x, codebook = (v.requires_grad_() for v in rows(600, 600, 8))
    saved = contract.saved_bytes(lambda: ops.nearest_code(x, codebook, return_distance=True))
    assert sum(saved) < 600 * 600


@pytest.mark.parametrize("metric", METRICS)
def test_compiles_whole(metric: Metric) -> None:
    kernels = contract.kernels_when_compiled(distance_of(metric), *rows(6, 30))
    assert any("nearest_code" in kernel for kernel in kernels)


# ---- Refused ---------------------------------------------------------------------------------------------------------

REFUSED: tuple[tuple[Callable[..., Any], type[Exception], str], ...] = (
    (lambda x, c: ops.nearest_code(x, c[:0]), ValueError, r"nearest_code: codebook has shape \[0, 4\], expected"),
    (lambda x, c: ops.nearest_code(x, c[:, :3]), ValueError, r"nearest_code: codebook has shape \[9, 3\]"),
    (lambda x, c: ops.nearest_code(x, c[None]), ValueError, r"nearest_code: codebook has shape \[1, 9, 4\]"),
    (lambda x, c: ops.nearest_code(x, c.double()), TypeError, "nearest_code: codebook has dtype torch.float64"),
    (lambda x, c: ops.nearest_code(x.long(), c), TypeError, "nearest_code: x has dtype torch.int64"),
    (lambda x, c: ops.nearest_code(x[0, 0], c), ValueError, r"nearest_code: x has shape \[\], expected at least 1"),
    (lambda x, c: ops.nearest_code(x, None), TypeError, "nearest_code: codebook is NoneType"),
    (lambda x, c: ops.nearest_code(x, c, "dot"), ValueError, "nearest_code: metric is 'dot', expected 'l2', 'cosine'"),
    (lambda x, c: ops.nearest_code(x, c[0], "cosine"), ValueError, r"nearest_code: codebook has shape \[4\]"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*rows(5, 9, 4))
