"""csrc/cpu/score_tiles.h: the scores, their order and their bits, at every ISA level this machine runs."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests import probe

SOURCE = "score_tiles_probe.cpp"
KINDS = {"float": torch.float32, "double": torch.float64, "bf16": torch.bfloat16, "half": torch.float16}
ODD = (1, 5, 123, 129, 257)
ROWS = ((1, 1), (1, 257), (5, 129), (123, 123), (129, 5), (257, 1), (129, 257), (257, 123))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def scores(level: str, x: torch.Tensor, y: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """X Yᵀ by the tile loop; NaN wherever it wrote nothing, a guard behind the last element."""
    library = probe.load(SOURCE, level)
    kind = next(name for name, dtype in KINDS.items() if dtype == x.dtype)
    (n, d), m = x.shape, len(y)
    out = torch.full((n * m + 64,), torch.nan, dtype=torch.float64 if kind == "double" else torch.float32)
    sizes = [ctypes.c_int64(size) for size in (n, m, d)]
    columns = x.stride(1) != 1
    strides = [ctypes.c_int64(t.stride(1 if columns else 0)) for t in (x, y)]
    call = library.scores_of_columns if columns else getattr(library, f"scores_{kind}")
    call(pointer(x), strides[0], pointer(y), strides[1], pointer(out), *sizes, threads)
    assert out[n * m :].isnan().all()
    return out[: n * m].view(n, m)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(result: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Within the error of sums of at most 192 terms and of the partial sums, every product rounded."""
    x, y = x.double(), y.double()
    eps = torch.finfo(result.dtype).eps
    scale = x.abs() @ y.abs().T
    terms = min(x.shape[1], 192) + -(-x.shape[1] // 192)
    assert ((result - x @ y.T).abs() <= terms * eps / 2 * scale + 1e-300).all()


@probe.over_levels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", ODD)
def test_odd_shapes(level: str, kind: str, d: int) -> None:
    for n, m in ROWS:
        x, y = randn(n, d, dtype=KINDS[kind]), randn(m, d, dtype=KINDS[kind]) + 0.5
        check(scores(level, x, y), x, y)


@probe.over_levels
def test_empty_sums_are_zero(level: str) -> None:
    assert torch.equal(scores(level, randn(5, 0), randn(300, 0)), torch.zeros(5, 300))


@probe.over_levels
def test_error_is_that_of_a_blocked_product(level: str) -> None:
    """No worse than 1.5 times torch.mm's: partial sums are kept apart."""
    x, y = randn(128, 2048), randn(192, 2048)
    exact = x.double() @ y.double().T
    error, of_mm = ((s - exact).square().mean().sqrt() for s in (scores(level, x, y), x @ y.T))
    assert error <= 1.5 * of_mm


@probe.over_levels
@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows(level: str, kind: str) -> None:
    x = randn(50, 300, dtype=KINDS[kind])[:, 7:130]
    y = randn(90, 123, dtype=KINDS[kind])[::3]
    expanded = randn(1, 123, dtype=KINDS[kind]).expand(31, 123)
    for a, b in ((x, y), (y, x), (x, expanded), (expanded, y)):
        assert torch.equal(scores(level, a, b), scores(level, a.contiguous(), b.contiguous()))
        check(scores(level, a, b), a, b)


@probe.over_levels
@pytest.mark.parametrize("d", ODD[1:])
def test_transposed_in_memory(level: str, d: int) -> None:
    for n, m in ROWS[1:]:
        x, y = (torch.full((d + 1, rows + 9), torch.nan)[:d, 3 : 3 + rows] for rows in (n, m))
        x[:], y[:] = randn(d, n), randn(d, m)
        assert torch.equal(scores(level, x.T, y.T), scores(level, x.T.contiguous(), y.T.contiguous()))


@probe.over_levels
@pytest.mark.parametrize("kind", [*KINDS, "of_columns"])
def test_reads_only_its_rows(level: str, kind: str) -> None:
    """Memory ends with the last element of X, then with that of Y."""
    library = probe.load(SOURCE, level)
    n, m, d = 61, 71, 123
    itemsize = KINDS.get(kind, torch.float32).itemsize
    shapes = [(d, n), (d, m)] if kind == "of_columns" else [(n, d), (m, d)]
    stride = 130
    memory = [probe.GuardedMemory(rows * stride * itemsize) for rows, _ in shapes]
    starts = [g.before_end(((r - 1) * stride + c) * itemsize) for g, (r, c) in zip(memory, shapes, strict=True)]
    out = torch.empty(n, m, dtype=torch.float64)
    sizes = [ctypes.c_int64(size) for size in (n, m, d)]
    x, y = [(start, ctypes.c_int64(stride)) for start in starts]
    assert probe.survives(lambda: getattr(library, f"scores_{kind}")(*x, *y, pointer(out), *sizes, 1))


@probe.over_levels
def test_non_finite_values_stay_in_their_row_and_column(level: str) -> None:
    x, y = randn(60, 40), randn(70, 40)
    clean = scores(level, x, y)
    x[7, 3], y[11, 5] = torch.nan, torch.inf
    result = scores(level, x, y)
    assert result[7].isnan().all()
    assert not result[:, 11].isfinite().any()
    keep = torch.ones_like(clean, dtype=torch.bool)
    keep[7], keep[:, 11] = False, False
    assert torch.equal(result[keep], clean[keep])


@probe.over_levels
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(level: str, kind: str) -> None:
    x, y = randn(333, 257, dtype=KINDS[kind]), randn(517, 257, dtype=KINDS[kind])
    one = scores(level, x, y)
    for threads in (2, 3, 8):
        assert torch.equal(scores(level, x, y, threads), one)


@probe.over_levels
def test_a_block_of_rows_changes_no_bit(level: str) -> None:
    x, y = randn(200, 129), randn(300, 129)
    whole = scores(level, x, y)
    assert torch.equal(scores(level, x[37:150], y), whole[37:150])
    assert torch.equal(scores(level, x, y[41:299]), whole[:, 41:299])


@probe.over_levels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (100, 700, 3), (97, 2100, 4096)])
def test_order_of_blocks(level: str, n: int, m: int, d: int, threads: int) -> None:
    """Each element once, the columns of a row in order; the last shape needs several panels of Y."""
    library = probe.load(SOURCE, level)
    x = torch.zeros(n, d)
    order, largest = torch.zeros(n, m, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    library.visits(pointer(x), *(ctypes.c_int64(size) for size in (n, m, d)), threads, pointer(order), pointer(largest))
    assert torch.equal(order, (torch.arange(1, m + 1) + (1 << 20)).expand(n, m))
    assert largest[0] <= 96
    assert largest[1] <= 256


@probe.over_levels
def test_epilogue(level: str) -> None:
    library = probe.load(SOURCE, level)
    n, m, d = 123, 257, 64
    x, y = randn(n, d), randn(m, d)
    a, b = ((1 + v.square().sum(1)).sqrt() for v in (x, y))
    out = torch.empty(n, m)
    sizes = [ctypes.c_int64(size) for size in (n, m, d)]
    library.theta(pointer(x), pointer(y), pointer(a), pointer(b), pointer(out), *sizes, 2)
    exact = torch.acosh(a.double()[:, None] * b.double() - x.double() @ y.double().T)
    assert (out - exact).abs().max() <= 1e-5


@probe.over_levels
def test_no_symbol_escapes_its_level(level: str) -> None:
    assert not probe.foreign_symbols(SOURCE, level)
