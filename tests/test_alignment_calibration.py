"""Alignment calibration: its terms one by one, batches in which some are over nothing, and use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import mmkern
from mmkern import ops
from tests import contract
from tests.losses import check, clip_loss, pair

Geometry = Literal["euclidean", "lorentz"]
GEOMETRIES: tuple[Geometry, ...] = ("euclidean", "lorentz")
WEIGHTS = {"alpha": 0.7, "beta": 0.4, "gamma": 1.3}


def some(n: int, share: float = 0.4) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) < share


def options(geometry: Geometry) -> dict[str, Any]:
    """Numbers that need gradients."""
    names = ("logit_scale",) if geometry == "euclidean" else ("curvature", "logit_scale")
    values = {"logit_scale": 4.0, "curvature": 0.6}
    return {name: torch.tensor(values[name], dtype=torch.float64, requires_grad=True) for name in names}


def by_matrices(
    x: Tensor,
    y: Tensor,
    forget: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    logit_scale: Tensor,
    curvature: Tensor | None = None,
    margin: float | None = None,
) -> Tensor:
    """The four terms, of parts of a matrix of distances."""
    if curvature is None:
        distances = 1 - functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T
        scores = logit_scale * (1 - distances)
    else:
        with mmkern.use_backend("reference"):
            distances = ops.lorentz_pairwise_distance(x, y, curvature)
        scores = -logit_scale * distances
    loss = scores.sum() * 0
    kept, (apart,) = (~forget).nonzero()[:, 0], forget.nonzero(as_tuple=True)
    if len(kept):
        loss = loss + clip_loss(scores[kept][:, kept])
    among, own = scores[apart][:, apart], scores.diagonal()[apart]
    if len(apart) > 1:
        loss = loss - alpha * (among.sum() - own.sum()) / (len(apart) * (len(apart) - 1))
    if len(apart):
        aligned = own if margin is None else (margin - distances.diagonal()[apart]).clamp_min(0)
        loss = loss + beta * aligned.mean()
    if len(apart) and len(kept):
        ways = scores[apart][:, kept].logsumexp(1) + scores[kept][:, apart].logsumexp(0)
        loss = loss + gamma * ways.mean() / 2
    return loss


def numbers_of(given: dict[str, Any]) -> list[Tensor]:
    return [value for value in given.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("margin", [None, 1.1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("n", [2, 20, 131])
def test_it_is_the_sum_of_its_terms(n: int, geometry: Geometry, margin: float | None) -> None:
    x, y = pair(n)
    given = options(geometry) | WEIGHTS | {"margin": margin}
    got = ops.alignment_calibration_loss(x, y, some(n), geometry=geometry, **given)
    check(got, by_matrices(x, y, some(n), **given), x, y, *numbers_of(given))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), forgotten=st.integers(0, 31), scale=st.sampled_from([0.0, 4.0, 900.0]))
def test_a_term_over_nothing_is_nothing(backend: str, geometry: Geometry, n: int, forgotten: int, scale: float) -> None:
    """Nothing to retain, nothing to forget, one of them, no rows, one; also where scores outweigh each other."""
    x, y = pair(n, 3)
    forget = (forgotten >> torch.arange(n)) & 1 == 1
    given = options(geometry) | WEIGHTS | {"logit_scale": torch.tensor(scale, dtype=torch.float64, requires_grad=True)}
    with mmkern.use_backend(backend):
        got = ops.alignment_calibration_loss(x, y, forget, geometry=geometry, **given)
        check(got, by_matrices(x, y, forget, **given), x, y, *numbers_of(given))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_rows_to_forget_it_is_the_loss_of_clip(geometry: Geometry) -> None:
    x, y = pair()
    given = options(geometry)
    nothing = torch.zeros(20, dtype=torch.bool)
    got = ops.alignment_calibration_loss(x, y, nothing, geometry=geometry, **given, **WEIGHTS)
    if geometry == "euclidean":
        expected = ops.info_nce_loss(x, y, given["logit_scale"], normalize=True)
    else:
        expected = ops.lorentz_contrastive_loss(x, y, given["curvature"], given["logit_scale"])
    check(got, expected, x, y, *numbers_of(given))


def test_coinciding_pairs() -> None:
    """Forgotten images on their texts: a distance has no slope there, and the loss no NaN."""
    x, _ = pair(dtype=torch.float32)
    y = x.detach().clone().requires_grad_()
    for margin in (None, 1.0):
        loss = ops.alignment_calibration_loss(
            x, y, some(20), geometry="lorentz", curvature=1.0, logit_scale=10.0, margin=margin, **WEIGHTS
        )
        assert all(g.isfinite().all() for g in (loss, *torch.autograd.grad(loss, (x, y))))


def test_rows_of_nothing() -> None:
    """Have no direction: their cosines are 0."""
    x, y = pair(6, 3)
    given = {"logit_scale": 4.0, "margin": 1.5, **WEIGHTS}
    with torch.no_grad():
        x[2], y[4] = 0.0, 0.0
        got = ops.alignment_calibration_loss(x, y, some(6), **given)
        torch.testing.assert_close(got, by_matrices(x, y, some(6), **given))
        flat = torch.zeros(6, 0, dtype=torch.float64)
        assert ops.alignment_calibration_loss(flat, flat, some(6), **given).isfinite()


def test_a_margin_lets_go() -> None:
    """What is as far apart as it asks is pushed no further."""
    x, y = pair()
    given = {"logit_scale": 4.0, "alpha": 0.0, "gamma": 0.0}
    forget = torch.ones(20, dtype=torch.bool)
    for margin, pushes in ((0.0, False), (3.0, True)):
        loss = ops.alignment_calibration_loss(x, y, forget, beta=1.0, margin=margin, **given)
        (gradient,) = torch.autograd.grad(loss, x)
        assert (loss.item() > 0) == pushes
        assert gradient.any() == pushes


@pytest.mark.parametrize("margin", [None, 1.1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradcheck(geometry: Geometry, margin: float | None) -> None:
    x, y = pair(7, 5)
    given = options(geometry)

    def loss(x: Tensor, y: Tensor, *numbers: Tensor) -> Tensor:
        named = dict(zip(given, numbers, strict=True))
        return ops.alignment_calibration_loss(x, y, some(7), geometry=geometry, **named, **WEIGHTS, margin=margin)

    torch.autograd.gradcheck(loss, (x, y, *given.values()))


def test_nothing_of_all_pairs_is_saved() -> None:
    x, y = pair(600, 8, torch.float32)
    saved = contract.saved_bytes(
        lambda: ops.alignment_calibration_loss(
            x, y, some(600), geometry="lorentz", curvature=1.0, logit_scale=4.0, **WEIGHTS
        )
    )
    assert max(saved) == x.untyped_storage().nbytes()
    assert sum(saved) < 600 * 600


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_compiles_whole(geometry: Geometry) -> None:
    """And for any share of rows to forget at once: no shape depends on it."""
    x, y = pair(dtype=torch.float32)
    given = {name: value.detach().float() for name, value in options(geometry).items()}
    for forget in (some(20), some(20, 0.0), some(20, 2.0)):
        kernels = contract.kernels_when_compiled(
            lambda x, y, forget=forget: ops.alignment_calibration_loss(
                x, y, forget, geometry=geometry, **given, **WEIGHTS, margin=0.9
            ),
            x.detach(),
            y.detach(),
        )
        prefix = "lorentz_" if geometry == "lorentz" else ""
        assert f"mmkern.{prefix}retained_pairwise_logsumexp" in kernels


def call(x: Tensor, y: Tensor, forget: Any = None, **changed: Any) -> Tensor:
    forget = some(20) if forget is None else forget
    return ops.alignment_calibration_loss(x, y, forget, **({"logit_scale": 1.0} | WEIGHTS | changed))


REFUSED: tuple[tuple[Callable[[Any, Any], Any], type[Exception], str], ...] = (
    (lambda x, y: call(x, y[:5]), ValueError, r"alignment_calibration_loss: y has shape \[5, 12\], expected"),
    (lambda x, y: call(x, y, [True]), TypeError, "alignment_calibration_loss: forget is list, expected a Tensor"),
    (lambda x, y: call(x, y, some(20).int()), TypeError, "forget has dtype torch.int32, expected bool"),
    (lambda x, y: call(x, y, some(19)), ValueError, r"forget has shape \[19\], expected \[20\]"),
    (lambda x, y: call(x, y, geometry="poincare"), ValueError, "geometry is 'poincare', expected \"euclidean\" or"),
    (lambda x, y: call(x, y, curvature=1.0), ValueError, "curvature is 1.0, expected None of a euclidean geometry"),
    (lambda x, y: call(x, y, geometry="lorentz"), TypeError, "alignment_calibration_loss: curvature is NoneType"),
    (lambda x, y: call(x, y, geometry="lorentz", curvature=-1.0), ValueError, "curvature is -1.0, expected a number"),
    (lambda x, y: call(x, y, logit_scale="1"), TypeError, "alignment_calibration_loss: logit_scale is str, expected"),
    (lambda x, y: call(x, y, beta=None), TypeError, "alignment_calibration_loss: beta is NoneType, expected a float"),
    (lambda x, y: call(x, y, margin=-1.0), ValueError, "margin is -1.0, expected None or a float of at least 0"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
