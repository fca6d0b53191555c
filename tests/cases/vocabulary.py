"""Cases of the vocabulary family: sizes, layouts, what is done to logits, which rows have a target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import Case
from .hyperbolic import randn

IGNORED = -100
# Rows, tokens, width: one of each, more rows than a chunk, more tokens than a panel, tiles that end within a vector.
SIZES = (
    (1, 1, 3),
    (1, 7, 5),
    (5, 1, 7),
    (17, 33, 64),
    (49, 300, 20),
    (123, 129, 257),
    (70, 1700, 12),
    (600, 50, 8),
    (0, 9, 8),
    (9, 5, 0),
)
# Of the op that makes gradients in chunks: several of them, one that is not whole, tiles of 64 and of 128 rows.
CHUNKS = ((130, 100, 20), (300, 450, 33), (530, 70, 9))


def tensors(
    n: int,
    tokens: int,
    width: int,
    *,
    scale: float = 2.0,
    bias: bool = False,
    weighted: bool = False,
    ignored: float = 0.2,
) -> Any:
    """Input, linear_weight, linear_bias, weight, target, of which a share is left out."""

    def build(g: torch.Generator) -> list[Any]:
        target = torch.randint(tokens, (n,), generator=g)
        target[torch.rand(n, generator=g) < ignored] = IGNORED
        return [
            randn(g, n, width, norm=scale) if width else torch.zeros(n, 0, dtype=torch.float64),
            randn(g, tokens, width, norm=scale) if width else torch.zeros(tokens, 0, dtype=torch.float64),
            randn(g, tokens) if bias else None,
            torch.rand(tokens, generator=g, dtype=torch.float64) if weighted else None,
            target,
        ]

    return build


def rows_case(
    label: str, given: Any, *, softcap: float = 0.0, inverse_temperature: float = 1.0, sums: bool = False
) -> Case:
    options = [softcap, inverse_temperature, IGNORED, sums]
    return Case("linear_logsumexp", label, lambda g: [*given(g), *options], wide=(3,))


def loss_case(
    label: str, given: Any, *, softcap: float = 0.0, smoothing: float = 0.0, z_loss: float = 0.0, mean: bool = True
) -> Case:
    options = [softcap, IGNORED, smoothing, z_loss, mean]
    return Case("linear_cross_entropy", label, lambda g: [*given(g), *options], wide=(3,))


def _changed(given: Any, change: Any) -> Any:
    def build(g: torch.Generator) -> list[Any]:
        args = given(g)
        change(args)
        return args

    return build


def _ignore_all(args: list[Any]) -> None:
    args[4][:] = IGNORED


def _strided(g: torch.Generator) -> list[Any]:
    x, weight = randn(g, 21, 60, norm=2.0)[:, 3:40], randn(g, 37, 51).T / 6
    return [x, weight, None, None, torch.randint(102, (42,), generator=g)[::2] % 51]


def _expanded(g: torch.Generator) -> list[Any]:
    target = torch.randint(12, (1,), generator=g).expand(9)
    return [randn(g, 1, 24).expand(9, 24), randn(g, 12, 24), None, None, target]


def _not_finite(args: list[Any]) -> None:
    """A row with NaN, rows whose logits are infinite, one of these without a target."""
    args[0][3, 1], args[0][5, 0], args[0][7, 0] = torch.nan, torch.inf, torch.nan
    args[4][3], args[4][5], args[4][7] = 1, 2, IGNORED


def _hidden_tokens(args: list[Any]) -> None:
    """Tokens that a bias rules out, of one row all but its target."""
    args[2][:5] = -torch.inf
    args[4][args[4] < 5] = 7


def _cases() -> Iterator[Case]:
    for n, tokens, width in SIZES:
        yield rows_case(f"{n}x{tokens}x{width}", tensors(n, tokens, width))
    middle = (123, 129, 40)
    yield rows_case("bias", tensors(*middle, bias=True))
    yield rows_case("softcap", tensors(*middle, scale=6.0, bias=True), softcap=5.0)
    yield rows_case("temperature", tensors(*middle), inverse_temperature=2.5)
    yield rows_case("softcap and temperature", tensors(*middle, scale=6.0), softcap=5.0, inverse_temperature=0.3)
    yield rows_case("sums", tensors(*middle), sums=True)
    yield rows_case("weighted sums", tensors(70, 1700, 12, bias=True, weighted=True), sums=True, softcap=3.0)
    yield rows_case("no row", _changed(tensors(*middle, bias=True), _ignore_all), sums=True)
    # Logits of thousands: a sum of exponentials would overflow or lose all its terms.
    yield rows_case("large", tensors(60, 70, 64, scale=100.0))
    yield rows_case("strided", _strided)
    yield rows_case("expanded", _expanded)
    for n, tokens, width in CHUNKS:
        yield loss_case(f"{n}x{tokens}x{width}", tensors(n, tokens, width))
    for n, tokens, width in ((1, 1, 3), (0, 9, 8), (9, 5, 0)):
        yield loss_case(f"{n}x{tokens}x{width}", tensors(n, tokens, width, ignored=0.0), mean=False)
    yield loss_case("sum", tensors(130, 100, 20, bias=True), mean=False)
    yield loss_case("everything", tensors(*middle, bias=True, weighted=True), softcap=3.0, smoothing=0.2, z_loss=1e-2)
    yield loss_case("smoothing", tensors(*middle), smoothing=0.1)
    yield loss_case("weighted", tensors(*middle, weighted=True))
    yield loss_case("z_loss", tensors(*middle), z_loss=1e-2, mean=False)
    yield loss_case("large", tensors(60, 70, 64, scale=100.0))
    yield loss_case("strided", _strided)


CASES = tuple(_cases())
NOT_FINITE = (
    rows_case("not finite", _changed(tensors(20, 70, 16, ignored=0.0), _not_finite)),
    rows_case("hidden tokens", _changed(tensors(20, 70, 16, bias=True), _hidden_tokens)),
    loss_case("hidden tokens", _changed(tensors(20, 70, 16, bias=True), _hidden_tokens)),
)
