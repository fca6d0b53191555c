"""The contrastive family: the numerics contract, the losses of other libraries, and use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import mmkern
from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.ops.hyperbolic import Reduction
from tests import contract
from tests.cases.case import Case
from tests.cases.contrastive import CASES, LABELLED, LOG_SUMS, RETAINED, flags, labels
from tests.losses import check, clip_loss, pair

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if dtype == torch.float32 or case.label in ("17x33x64", "positives", "strided", "near", "labels", "forgotten")
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_forward(case, OPS[case.op], dtype, device)


@pytest.mark.parametrize(("case", "dtype"), [run for run in RUNS if run[0].label != "loss alone"], ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    contract.check_backward(case, contract.by_autograd(OPS[case.op]), dtype, device)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in ("17x33x64", "positives")], ids=str)
def test_opcheck(case: Case) -> None:
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in case.arguments(torch.float32)
    ]
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, tuple(OPS[case.op]._prepare(args)))


# ---- The losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 20, 131])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_is_the_loss_of_clip(n: int, label_smoothing: float, reduction: Reduction) -> None:
    x, y = pair(n)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    got = ops.info_nce_loss(x, y, scale, normalize=True, label_smoothing=label_smoothing, reduction=reduction)
    scores = scale * functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T
    check(got, clip_loss(scores, label_smoothing, reduction), x, y, scale)


def test_several_positives() -> None:
    """A row or a column without one counts nothing."""
    x, y = pair()
    positive = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.15
    positive[3] = positive[:, 5] = False
    got = ops.info_nce_loss(x, y, 2.0, positive_mask=positive, reduction="none")
    ways = []
    for scores, mask in ((2 * x @ y.T, positive), (2 * y @ x.T, positive.T)):
        chosen = scores.where(mask, -torch.inf).logsumexp(1)
        ways.append((scores.logsumexp(1) - chosen).where(mask.any(1), 0.0))
    check(got, (ways[0] + ways[1]) / 2, x, y)


@pytest.mark.parametrize("shape", [(9, 12), (20, 9, 12)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_hard_negatives_are_further_columns(shape: tuple[int, ...], label_smoothing: float) -> None:
    x, y = pair()
    hard = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    got = ops.info_nce_loss(x, y, 2.0, hard_negatives=hard, label_smoothing=label_smoothing)
    target = torch.arange(20)
    further = torch.einsum("nd,...kd->nk" if hard.dim() == 2 else "nd,nkd->nk", x, hard)
    of_x = functional.cross_entropy(2 * torch.cat([x @ y.T, further], 1), target, label_smoothing=label_smoothing)
    of_y = functional.cross_entropy(2 * y @ x.T, target, label_smoothing=label_smoothing)
    check(got, (of_x + of_y) / 2, x, y, hard)


@pytest.mark.parametrize("entailment_weight", [0.0, 0.2])
def test_lorentz_is_the_loss_of_meru(entailment_weight: float) -> None:
    x, y = pair()
    curvature, scale = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.6, 5.0))
    got = ops.lorentz_contrastive_loss(x, y, curvature, scale, entailment_weight=entailment_weight)
    with mmkern.use_backend("reference"):
        scores = -scale * ops.lorentz_pairwise_distance(x, y, curvature)
        entailed = ops.lorentz_entailment_loss(y, x, curvature)
    check(got, clip_loss(scores) + entailment_weight * entailed, x, y, curvature, scale)


@pytest.mark.parametrize("n", [1, 20, 131])
def test_siglip_is_the_loss_of_siglip(n: int) -> None:
    x, y = pair(n)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (7.0, -3.0))
    got = ops.siglip_loss(x, y, scale, bias, normalize=True)
    logits = scale * functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T + bias
    labels = 2 * torch.eye(n, dtype=torch.float64) - 1
    check(got, -functional.logsigmoid(labels * logits).sum() / n, x, y, scale, bias)
    with torch.no_grad():
        torch.testing.assert_close(ops.siglip_loss(x, y, scale, bias, normalize=True), got)


@pytest.fixture(scope="module")
def open_clip_loss() -> Any:
    """open_clip's losses, of which no other file is read: the package asks for torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_with_open_clip(open_clip_loss: Any) -> None:
    x, y = (functional.normalize(v, dim=-1).detach().requires_grad_() for v in pair(64, 32, torch.float32))
    scale = torch.tensor(14.0, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    check(ops.info_nce_loss(x, y, scale), open_clip_loss.ClipLoss()(x, y, scale), x, y, scale)
    check(ops.siglip_loss(x, y, scale, bias), open_clip_loss.SigLipLoss()(x, y, scale, bias), x, y, scale, bias)


def test_gradients_that_were_made_serve_every_backward() -> None:
    x, y = pair()
    loss = ops.siglip_loss(x, y, 7.0, -3.0)
    found = [torch.autograd.grad(loss, (x, y), retain_graph=retain) for retain in (True, True, False)]
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_coinciding_pairs() -> None:
    """Every image on its text: the distance has no slope there, and the loss no NaN."""
    x, _ = pair(dtype=torch.float32)
    y = x.detach().clone().requires_grad_()
    loss = ops.lorentz_contrastive_loss(x, y, 1.0, 10.0, entailment_weight=0.2)
    gradients = torch.autograd.grad(loss, (x, y))
    assert all(g.isfinite().all() for g in (loss, *gradients))


def test_a_well_separated_batch_keeps_its_digits() -> None:
    """Where the positive outweighs the rest by e^30, 1 - softmax is 0 in float32; the loss and its slope are not."""
    x = torch.eye(16, requires_grad=True)
    loss = ops.info_nce_loss(x, x.detach(), 30.0)
    (gradient,) = torch.autograd.grad(loss, x)
    exact = torch.tensor(15.0, dtype=torch.float64) * torch.tensor(-30.0, dtype=torch.float64).exp()
    assert loss.item() == pytest.approx(exact.log1p().item(), rel=1e-5)
    assert gradient[0, 0].item() == pytest.approx(-30 * exact.item() / 16, rel=1e-5)


@pytest.mark.parametrize("op", ["info_nce_loss", "lorentz_contrastive_loss"])
def test_gradcheck(op: str) -> None:
    x, y = pair(7, 5)
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.6, 3.0)]
    numbers = numbers[op == "info_nce_loss" :]
    torch.autograd.gradcheck(lambda *args: getattr(ops, op)(*args, reduction="none"), (x, y, *numbers))


def pairs_of(op: str, rows: int) -> list[Any]:
    """What tells ``op`` which pairs are which."""
    g = torch.Generator().manual_seed(0)
    if op in LOG_SUMS:
        return [None]
    if op == LABELLED:
        return [*(labels(rows, 3)(g) for _ in range(2)), 1]
    return [flags(rows)(g) for _ in range(2)]


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("op", [*LOG_SUMS, LABELLED, *RETAINED])
def test_same_bits_for_any_number_of_threads(op: str, keeps: bool) -> None:
    x, y = (torch.randn(1500, 40) / 6 for _ in range(2))
    curvature = [1.0] if op.startswith("lorentz") else []
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        outs = OPS[op](*leaves, *curvature, 9.0, *pairs_of(op, 1500), True, keeps)[: OPS[op].differentiable]
        found.append([*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])])
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", [*LOG_SUMS, LABELLED, *RETAINED])
def test_nan_stays_in_its_row(op: str) -> None:
    x, y = (torch.randn(80, 12) for _ in range(2))
    curvature = [1.0] if op.startswith("lorentz") else []
    pairs = pairs_of(op, 80)
    clean = OPS[op](x, y, *curvature, 2.0, *pairs, True, False)
    for row in (70, 3):
        spoilt = x.clone()
        spoilt[row] = torch.nan
        found = OPS[op](spoilt, y, *curvature, 2.0, *pairs, True, False)
        others = torch.arange(80) != row
        assert found[0][row].isnan()
        counts = op not in RETAINED or not pairs[0][row]  # for the columns
        assert found[1][others].isnan().any() == counts
        last = OPS[op].differentiable
        for one, other in zip(found[:last:2], clean[:last:2], strict=True):
            assert torch.equal(one[others], other[others])


def test_nothing_of_all_pairs_is_saved() -> None:
    x, y = pair(600, 8, torch.float32)
    saved = contract.saved_bytes(lambda: ops.info_nce_loss(x, y, 10.0))
    assert sum(saved) < 600 * 600
    assert max(saved) == x.untyped_storage().nbytes()


def test_compiles_whole() -> None:
    x, y = pair(dtype=torch.float32)
    scale = torch.tensor(5.0)
    for run, expected in (
        (lambda x, y: ops.info_nce_loss(x, y, scale, normalize=True), "mmkern.pairwise_logsumexp"),
        (lambda x, y: ops.siglip_loss(x, y, scale, -2.0), "mmkern.sigmoid_loss"),
        (lambda x, y: ops.lorentz_contrastive_loss(x, y, 1.0, scale), "mmkern.lorentz_pairwise_logsumexp"),
    ):
        assert expected in contract.kernels_when_compiled(run, x.detach(), y.detach())


V = torch.ones(20, 3, dtype=torch.bool)
REFUSED = (
    (lambda x, y: ops.info_nce_loss(x, y[:5], 1.0), ValueError, r"info_nce_loss: y has shape \[5, 12\], expected"),
    (lambda x, y: ops.info_nce_loss(x, y.float(), 1.0), TypeError, "info_nce_loss: y has dtype torch.float32"),
    (lambda x, y: ops.info_nce_loss(x, y, "1"), TypeError, "info_nce_loss: logit_scale is str, expected a float"),
    (lambda x, y: ops.info_nce_loss(x, y, torch.ones(2)), ValueError, r"logit_scale has shape \[2\]"),
    (lambda x, y: ops.info_nce_loss(x, y, 1.0, label_smoothing=2), ValueError, "label_smoothing is 2, expected a num"),
    (lambda x, y: ops.info_nce_loss(x, y, 1.0, reduction="max"), ValueError, "reduction is 'max'"),
    (
        lambda x, y: ops.info_nce_loss(x, y, 1.0, positive_mask=x > 0),
        ValueError,
        r"info_nce_loss: positive_mask has shape",
    ),
    (lambda x, y: ops.info_nce_loss(x, y, 1.0, hard_negatives=x[:, :5]), ValueError, r"hard_negatives has shape"),
    (lambda x, y: ops.siglip_loss(x, y, 1.0, None), TypeError, "siglip_loss: logit_bias is NoneType"),
    (lambda x, y: ops.lorentz_contrastive_loss(x, y, -1.0, 1.0), ValueError, "lorentz_contrastive_loss: curvature is"),
    (lambda x, y: ops.lorentz_contrastive_loss(x, y, 1.0, None), TypeError, "lorentz_contrastive_loss: logit_scale is"),
)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ((V[:, :1], V[:, :1], 0), TypeError, "x_labels has dtype torch.bool, expected int64"),
        ((V.long(), V.long()[:5], 0), ValueError, r"y_labels has shape \[5, 3\], expected \[20, words\]"),
        ((V.long(), V.long()[:, :2], 0), ValueError, r"y_labels has shape \[20, 2\], expected \[20, words\]"),
        ((V.long(), None, 0), TypeError, "y_labels is NoneType, expected a Tensor"),
        ((V.long(), V.long(), 4), ValueError, "first_words is 4, expected 0 to 3"),
        ((V[:, 0], V), ValueError, r"y_forgotten has shape \[20, 3\], expected \[20\]"),
        ((V[:9, 0], V[:, 0]), ValueError, r"x_forgotten has shape \[9\], expected \[20\]"),
    ],
)
def test_pairs_are_told_rightly(pairs: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS[LABELLED if len(pairs) == 3 else RETAINED[0]](*pair(), 1.0, *pairs, True, False)


def test_an_error_of_torch_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("sizes: two and three")

    monkeypatch.setattr(type(OPS["sigmoid_loss"]), "__call__", fail)
    with pytest.raises(ValueError, match="siglip_loss: sizes: two and three"):
        ops.siglip_loss(*pair(), 1.0, 0.0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_hard_negatives_are_normalized(label_smoothing: float) -> None:
    x, y = pair()
    hard, _ = pair(9)
    got = ops.info_nce_loss(x, y, 2.0, normalize=True, hard_negatives=hard, label_smoothing=label_smoothing)
    of_length_one = [functional.normalize(v, dim=-1) for v in (x, y, hard)]
    expected = ops.info_nce_loss(
        *of_length_one[:2], 2.0, hard_negatives=of_length_one[2], label_smoothing=label_smoothing
    )
    check(got, expected, x, y, hard)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Callable[..., Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*pair())
