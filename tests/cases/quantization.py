"""Cases of the quantization family: few rows and many, equal codes, codes that float32 takes for one, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import Case
from .hyperbolic import randn
from .retrieval import points, whole

NEAREST = ("nearest_code", "cosine_nearest_code")
RESIDUAL, EMBEDDING, SUMS = "residual_quantize", "codes_embedding", "code_sums"
# N, K, D. Few rows and many, more codes than a tile has, parts of a depth, one of anything, none of anything.
SIZES = (
    (1, 1, 3),
    (5, 9, 7),
    (2, 700, 40),
    (17, 33, 64),
    (14, 5, 1),
    (49, 600, 20),
    (97, 130, 200),
    (20, 900, 8),
    (4, 3, 700),
    (30, 21, 700),
    (0, 4, 8),
)


def case(op: str, label: str, x: Any, codebook: Any) -> Case:
    return Case(op, label, lambda g: [x(g), codebook(g)])


def clustered(n: int, width: int) -> Any:
    """Rows beside each other, far from zero: products of float32 tell few of them apart."""

    def build(g: torch.Generator) -> torch.Tensor:
        return 100 + torch.randint(-8, 9, (n, width), generator=g).double() / 64

    return build


def levels(
    label: str,
    x: Any,
    codebooks: tuple[int, int, int],
    *,
    normalize: bool = False,
    has_projections: bool = False,
    has_biases: bool = False,
) -> Case:
    """``codebooks``: Q, K, d. What is left becomes smaller from level to level, and the codes with it."""

    def build(g: torch.Generator) -> list[Any]:
        rows = x(g)
        count, _, narrow = codebooks
        width = rows.shape[-1]
        shrinking = 0.7 ** torch.arange(count, dtype=torch.float64)[:, None, None]
        weights: list[Any] = [None] * 4
        if has_projections:
            weights = [randn(g, count, narrow, width) / width**0.5, None, randn(g, count, width, narrow) / narrow, None]
        if has_biases:
            weights[1::2] = [0.1 * randn(g, count, narrow), 0.1 * randn(g, count, width)]
        return [rows, shrinking * randn(g, *codebooks, norm=1.2), *weights, normalize]

    return Case(RESIDUAL, label, build)


def embedding(label: str, codes: Any, tables: tuple[int, int, int], *, averages: bool = True) -> Case:
    return Case(EMBEDDING, label, lambda g: [randn(g, *tables), codes(g), averages])


def sums(label: str, x: Any, codes: Any, count: int) -> Case:
    return Case(SUMS, label, lambda g: [x(g), codes(g), count])


def any_codes(*shape: int, count: int, beyond: int = 0) -> Any:
    """Codes, and up to ``beyond`` on either side what is none."""
    return lambda g: torch.randint(-beyond, count + beyond, shape, generator=g)


def _of_levels() -> Iterator[Case]:
    projected: dict[str, Any] = {"has_projections": True, "has_biases": True}
    for normalize in (False, True):
        name = ", cosine" if normalize else ""
        yield levels(f"5x7, 3x9{name}", points(5, 7), (3, 9, 7), normalize=normalize)
        yield levels(f"49x270, 2x300{name}", points(49, 270), (2, 300, 270), normalize=normalize)
        yield levels(f"100x24, 4x37x8{name}", points(100, 24), (4, 37, 8), normalize=normalize, **projected)
    yield levels("9x530, 2x40x200", points(9, 530), (2, 40, 200), **projected)
    yield levels("no biases", points(20, 12), (3, 40, 5), has_projections=True)
    yield levels("one code", points(20, 5), (2, 1, 5))
    yield levels("one channel", points(20, 1), (3, 30, 1))
    yield levels("level axes", points(2, 3, 5, 12), (2, 20, 12))
    yield levels("a row of levels", points(12), (2, 20, 12))
    yield levels("strided levels", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], (2, 20, 37))
    yield levels("no row of levels", points(0, 6), (2, 20, 6))


def _of_tables() -> Iterator[Case]:
    for averages in (False, True):
        name = "mean" if averages else "sum"
        yield embedding(f"7x3, {name}", any_codes(7, 3, count=11), (3, 11, 20), averages=averages)
        yield embedding(f"2x5x12, {name}", any_codes(2, 5, 12, count=20), (12, 20, 77), averages=averages)
    yield embedding("none", any_codes(40, 5, count=6, beyond=3), (5, 6, 9))
    yield embedding("one code many times", any_codes(300, 2, count=1), (2, 1, 33))
    yield embedding("one level", any_codes(5, 1, count=9), (1, 9, 4))
    yield embedding("a row of codes", any_codes(4, count=9), (4, 9, 16))
    yield embedding("columns of codes", lambda g: any_codes(4, 30, count=9)(g).T, (4, 9, 16))
    yield embedding("no row of codes", any_codes(0, 4, count=9), (4, 9, 16))
    yield sums("31x5, 7", points(31, 5), any_codes(31, count=7), 7)
    yield sums("none, 40x20, 6", points(40, 20), any_codes(40, count=6, beyond=2), 6)
    yield sums("3x50x70, 300", points(3, 50, 70), any_codes(3, 50, count=300), 300)
    yield sums("500x9, 2", points(500, 9), any_codes(500, count=2), 2)
    yield sums("strided sums", lambda g: randn(g, 37, 90).T[3:60], any_codes(57, count=9), 9)
    yield sums("no row", points(0, 9), any_codes(0, count=2), 2)


def _cases() -> Iterator[Case]:
    yield from _of_levels()
    yield from _of_tables()
    for op in NEAREST:
        for n, k, d in SIZES:
            yield case(op, f"{n}x{k}x{d}", points(n, d), points(k, d))
        for n in (5, 20):
            yield case(op, f"ties of {n}", whole(n, 5), whole(400, 5))
            yield case(op, f"clustered, {n}", clustered(n, 24), clustered(300, 24))
            yield case(op, f"zeros, {n}", lambda g, n=n: torch.zeros(n, 8, dtype=torch.float64), points(31, 8))
        yield case(
            op, "no columns", lambda g: torch.zeros(14, 0, dtype=torch.float64), lambda g: torch.zeros(5, 0).double()
        )
        yield case(op, "zero codes", points(20, 8), lambda g: torch.zeros(40, 8, dtype=torch.float64))
        yield case(op, "axes", points(2, 3, 7, 12), points(40, 12))
        yield case(op, "a row", points(12), points(40, 12))
        yield case(op, "strided", lambda g: randn(g, 21, 60, norm=1.0)[:, 3:40], lambda g: randn(g, 37, 90).T / 6)
        yield case(op, "expanded", lambda g: randn(g, 1, 24).expand(15, 24), points(40, 24))


CASES = list(_cases())
