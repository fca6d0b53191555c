"""EgoNCE: the formula of its two forms, packed and multi-hot labels, and use."""

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
from mmkern.ops.hyperbolic import Reduction
from tests import contract
from tests.losses import check, clip_loss, pair

Form = Literal["inside", "outside"]
FORMS: tuple[Form, ...] = ("inside", "outside")


def labels(n: int, verbs: int = 118, nouns: int = 582, share: float = 0.02) -> tuple[Tensor, Tensor]:
    """As many classes as EgoVLP has."""
    g = torch.Generator().manual_seed(n)
    return torch.rand(n, verbs, generator=g) < share, torch.rand(n, nouns, generator=g) < share


def paper_loss(scores: Tensor, verbs: Tensor, nouns: Tensor, form: Form) -> Tensor:
    """Of each row, by the matrices of scores and of positive pairs."""
    v, n = verbs.double(), nouns.double()
    positive = ((v @ v.T) * (n @ n.T) > 0) | torch.eye(len(scores), dtype=torch.bool)
    ways = []
    for s, mask in ((scores, positive), (scores.T, positive.T)):
        if form == "inside":
            ways.append(-(s.softmax(1) * mask).sum(1).log())
        else:
            ways.append(-(s.log_softmax(1) * mask).sum(1) / mask.sum(1))
    return (ways[0] + ways[1]) / 2


@pytest.mark.parametrize("n", [1, 2, 20, 131])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_the_loss_of_the_paper(n: int, form: Form, reduction: Reduction) -> None:
    x, y = pair(n)
    verbs, nouns = labels(n)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    got = ops.ego_nce_loss(x, y, temperature, verbs, nouns, form=form, normalize=True, reduction=reduction)
    scores = functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T / temperature
    expected = paper_loss(scores, verbs, nouns, form)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    check(got, expected, x, y, temperature)


@pytest.mark.parametrize("form", FORMS)
def test_without_labels_it_is_the_loss_of_clip(form: Form) -> None:
    x, y = pair()
    nothing = torch.zeros(20, 5, dtype=torch.bool)
    check(ops.ego_nce_loss(x, y, 0.5, nothing, ~nothing, form=form), clip_loss(2 * x @ y.T), x, y)


def test_inside_is_info_nce_with_a_mask() -> None:
    x, y = pair(60)
    verbs, nouns = labels(60, 7, 9, 0.3)
    positive = ((verbs[:, None] & verbs).any(-1) & (nouns[:, None] & nouns).any(-1)).fill_diagonal_(True)
    got = ops.ego_nce_loss(x, y, 0.5, verbs, nouns, reduction="none")
    check(got, ops.info_nce_loss(x, y, 2.0, positive_mask=positive, reduction="none"), x, y)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 9), classes=st.integers(0, 200), seed=st.integers(0, 9), step=st.sampled_from([1, 2]))
def test_labels_are_packed_bit_by_bit(n: int, classes: int, seed: int, step: int) -> None:
    multi_hot = (torch.rand(n, step * classes, generator=torch.Generator().manual_seed(seed)) < 0.3)[:, ::step]
    words = ops.pack_labels(multi_hot)
    assert words.shape == (n, -(-classes // 64))
    assert words.dtype == torch.int64
    for v in range(classes):
        assert torch.equal((words[:, v // 64] >> (v % 64)) & 1 == 1, multi_hot[:, v])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_labels_are_those_of_multi_hot(form: Form, backend: str) -> None:
    x, y = pair(70)
    verbs, nouns = labels(70)
    with mmkern.use_backend(backend):
        found = [
            ops.ego_nce_loss(x, y, 0.1, v, n, form=form, reduction="none")
            for v in (verbs, ops.pack_labels(verbs))
            for n in (nouns, ops.pack_labels(nouns))
        ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_well_separated_batch_keeps_its_digits() -> None:
    """A positive pair outweighs the rest by e^30: the loss of both forms is what is left, no difference of scores."""
    x = torch.eye(16)
    verbs = nouns = torch.eye(16, dtype=torch.bool)
    exact = (15 * torch.tensor(-30.0, dtype=torch.float64).exp()).log1p().item()
    for form in FORMS:
        assert ops.ego_nce_loss(x, x, 1 / 30, verbs, nouns, form=form).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    x, y = pair(7, 5)
    verbs, nouns = labels(7, 5, 6, 0.4)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda *args: ops.ego_nce_loss(*args, verbs, nouns, form=form, reduction="none"), (x, y, temperature)
    )


def test_nothing_of_all_pairs_is_saved() -> None:
    x, y = pair(600, 8, torch.float32)
    saved = contract.saved_bytes(
        lambda: ops.ego_nce_loss(x, y, 0.1, *map(ops.pack_labels, labels(600, 64, 64)), form="outside")
    )
    assert max(saved) == x.untyped_storage().nbytes()
    assert sum(saved) < 600 * 600


def test_of_no_rows() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    verbs = torch.zeros(0, 3, dtype=torch.bool)
    assert ops.ego_nce_loss(x, x, 0.1, verbs, verbs).isnan()
    assert ops.ego_nce_loss(x, x, 0.1, verbs, verbs, reduction="sum").item() == 0


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form: Form) -> None:
    x, y = pair(dtype=torch.float32)
    verbs, nouns = labels(20, 70, 5, 0.3)
    kernels = contract.kernels_when_compiled(
        lambda x, y: ops.ego_nce_loss(x, y, torch.tensor(0.2), verbs, nouns, form=form, normalize=True),
        x.detach(),
        y.detach(),
    )
    assert "mmkern.labelled_pairwise_logsumexp" in kernels


V = torch.ones(20, 3, dtype=torch.bool)
REFUSED: tuple[tuple[Callable[[Any, Any], Any], type[Exception], str], ...] = (
    (lambda x, y: ops.ego_nce_loss(x, y[:5], 0.1, V, V), ValueError, r"ego_nce_loss: y has shape \[5, 12\], expected"),
    (lambda x, y: ops.ego_nce_loss(x, y, 0.0, V, V), ValueError, "ego_nce_loss: temperature is 0.0, expected a number"),
    (lambda x, y: ops.ego_nce_loss(x, y, "1", V, V), TypeError, "ego_nce_loss: temperature is str, expected a float"),
    (lambda x, y: ops.ego_nce_loss(x, y, 0.1, V, None), TypeError, "ego_nce_loss: nouns is NoneType, expected a Ten"),
    (
        lambda x, y: ops.ego_nce_loss(x, y, 0.1, V.int(), V),
        TypeError,
        "ego_nce_loss: verbs has dtype torch.int32, expected bool or int64",
    ),
    (lambda x, y: ops.ego_nce_loss(x, y, 0.1, V, V[:9]), ValueError, r"nouns has shape \[9, 3\], expected \[20, lab"),
    (lambda x, y: ops.ego_nce_loss(x, y, 0.1, V[:, 0], V), ValueError, r"verbs has shape \[20\], expected \[20, lab"),
    (lambda x, y: ops.ego_nce_loss(x, y, 0.1, V, V, form="in"), ValueError, "form is 'in', expected \"inside\" or"),  # type: ignore[arg-type]
    (lambda x, y: ops.ego_nce_loss(x, y, 0.1, V, V, reduction="max"), ValueError, "reduction is 'max'"),  # type: ignore[arg-type]
    (lambda x, y: ops.pack_labels(V.long()), TypeError, "pack_labels: multi_hot has dtype torch.int64, expected bool"),
    (lambda x, y: ops.pack_labels(V[0]), ValueError, r"pack_labels: multi_hot has shape \[3\], expected \[N, V\]"),
    (lambda x, y: ops.pack_labels([True]), TypeError, "pack_labels: multi_hot is list, expected a Tensor"),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
