"""Meru computes the paper's formulas, keeps its clamps, and breaks at none of the places where they do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkern import ops
from mmkern.models import Meru

BATCH, WIDTH, DIM = 7, 6, 5


def build(**options: float) -> Meru:
    return Meru(nn.Linear(4, WIDTH), nn.Embedding(9, WIDTH), WIDTH, WIDTH, DIM, **options)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts, and ids of the texts, two of which occur twice."""
    ids = torch.tensor([3, 1, 4, 1, 5, 8, 4])
    return torch.randn(BATCH, 4), ids, ids


def points(model: Meru, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    dtype = model.curv.dtype
    return tuple(scale * torch.randn(BATCH, DIM, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


# ---- The paper's formulas, one number at a time ----------------------------------------------------------------------


def time_part(x: list[float], c: float) -> float:
    return math.sqrt(1 / c + sum(v * v for v in x))


def inner(x: list[float], y: list[float], c: float) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) - time_part(x, c) * time_part(y, c)


def log_softmax(row: list[float], i: int) -> float:
    return row[i] - math.log(sum(math.exp(v) for v in row))


def paper_loss(
    images: list[list[float]], texts: list[list[float]], c: float, scale: float, positive: Callable[[int, int], bool]
) -> tuple[float, float]:
    """Contrastive and entailment loss as MERU writes them, K = 0.1; the positives of a row weigh the same."""
    n = len(images)
    logits = [[-math.acosh(-c * inner(i, t, c)) / math.sqrt(c) * scale for t in texts] for i in images]
    columns = [list(column) for column in zip(*logits, strict=True)]
    contrastive = 0.0
    for rows in (logits, columns):
        for a, row in enumerate(rows):
            own = [b for b in range(n) if positive(a, b)]
            contrastive -= sum(log_softmax(row, b) for b in own) / len(own) / n / 2
    entailment = 0.0
    for text, image in zip(texts, images, strict=True):
        norm = math.hypot(*text)
        s = c * inner(text, image, c)
        angle = math.acos((time_part(image, c) + s * time_part(text, c)) / (norm * math.sqrt(s * s - 1)))
        aperture = math.asin(min(1.0, 0.2 / (math.sqrt(c) * norm)))
        entailment += max(0.0, angle - aperture) / n
    return contrastive, entailment


@pytest.mark.parametrize("curvature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("shared", [False, True], ids=["every text another", "shared texts"])
def test_loss_is_the_papers(curvature: float, shared: bool) -> None:
    model = build(curvature=curvature, entailment_weight=0.7).double()
    images, texts = points(model)
    ids = pairs()[2]
    found = model.loss(images, texts, ids if shared else None)
    contrastive, entailment = paper_loss(
        images.tolist(),
        texts.tolist(),
        curvature,
        1 / 0.07,
        lambda a, b: bool(ids[a] == ids[b]) if shared else a == b,
    )
    assert entailment > 0.1  # else the case shows nothing
    torch.testing.assert_close(found.contrastive.item(), contrastive, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entailment.item(), entailment, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.total.item(), contrastive + 0.7 * entailment, rtol=1e-6, atol=0)


def test_points_are_exp0_of_the_scaled_projection() -> None:
    model = build(curvature=2.0).double()
    images, texts, _ = pairs()
    images = images.double()
    for embed, features in (
        (lambda project: model.embed_image(images, project), model.visual_proj(model.visual(images))),
        (lambda project: model.embed_text(texts, project), model.textual_proj(model.textual(texts))),
    ):
        tangent = features / math.sqrt(DIM)
        torch.testing.assert_close(embed(False), tangent, rtol=1e-6, atol=1e-12)
        radius = math.sqrt(2) * tangent.norm(dim=1, keepdim=True)
        torch.testing.assert_close(embed(True), radius.sinh() / radius * tangent, rtol=1e-6, atol=1e-12)


def test_forward_is_the_loss_of_the_embeddings() -> None:
    model = build()
    images, texts, ids = pairs()
    torch.testing.assert_close(
        model(images, texts, ids), model.loss(model.embed_image(images), model.embed_text(texts), ids)
    )


# ---- The four scalars ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log", "c"), [(50.0, 5.0), (-50.0, 0.05), (0.0, 1.0)])
def test_curvature_stays_within_ten_times_its_start(log: float, c: float) -> None:
    model = build(curvature=0.5)
    with torch.no_grad():
        model.curv.fill_(log)
    torch.testing.assert_close(model.curvature.item(), c, rtol=1e-6, atol=0)


def test_logit_scale_and_alphas_are_clamped() -> None:
    model = build()
    with torch.no_grad():
        for scalar in (model.logit_scale, model.visual_alpha, model.textual_alpha):
            scalar.fill_(9.0)
    model(*pairs())
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-6)
    assert model.visual_alpha.item() == model.textual_alpha.item() == 0


def test_gradients_reach_every_parameter_through_the_clamps() -> None:
    model = build()
    with torch.no_grad():
        model.curv.fill_(9.0)  # beyond its clamp
    model(*pairs()).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_of_the_curvature_is_the_slope() -> None:
    model = build().double()
    images, texts, ids = pairs()

    def total(log: float) -> Tensor:
        with torch.no_grad():
            model.curv.fill_(log)
        return model(images.double(), texts, ids).total

    total(0.1).backward()
    with torch.no_grad():
        slope = (total(0.1 + 1e-5) - total(0.1 - 1e-5)) / 2e-5
    assert model.curv.grad is not None
    torch.testing.assert_close(model.curv.grad, slope, rtol=1e-6, atol=1e-9)


def test_a_fixed_curvature_gets_no_gradient() -> None:
    model = Meru(nn.Linear(4, WIDTH), nn.Embedding(9, WIDTH), WIDTH, WIDTH, DIM, learn_curvature=False)
    model(*pairs()).total.backward()
    assert model.curv.grad is None
    assert model.visual_alpha.grad is not None


# ---- Where float32 breaks the published form -------------------------------------------------------------------------


def test_coinciding_image_and_text_have_finite_gradients() -> None:
    model = build()
    images, _ = points(model)
    images.requires_grad_()
    model.loss(images, images * 1.0).total.backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_a_point_at_the_root_has_finite_gradients() -> None:
    model = build()
    images, texts = points(model)
    texts[2] = 0
    texts.requires_grad_()
    found = model.loss(images, texts)
    found.total.backward()
    assert found.total.isfinite()
    assert texts.grad is not None
    assert texts.grad.isfinite().all()


def test_autocast_keeps_the_space_in_float32() -> None:
    model = build()
    exact = model(*pairs_of(1)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tangent = model.embed_image(pairs_of(1)[0], project=False)
        found = model(*pairs_of(1)).total
    assert tangent.dtype == found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.03)  # the towers alone ran in 16 bits


def pairs_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return pairs()


# ---- Saving ----------------------------------------------------------------------------------------------------------


def test_state_dict_survives_safetensors(tmp_path: Path) -> None:
    model, other = build(), build()
    images, texts, ids = pairs()
    save_file(model.state_dict(), tmp_path / "meru.safetensors")
    assert other(images, texts, ids).total != model(images, texts, ids).total
    other.load_state_dict(load_file(tmp_path / "meru.safetensors"))
    assert torch.equal(other(images, texts, ids).total, model(images, texts, ids).total)


def test_names_are_those_of_the_release() -> None:
    model = build()
    own = {name for name, _ in model.named_parameters() if not name.startswith(("visual.", "textual."))}
    scalars = {"logit_scale", "curv", "visual_alpha", "textual_alpha"}
    assert own == scalars | {"visual_proj.weight", "textual_proj.weight"}
    assert {id(s) for s in model.scalars}.isdisjoint({id(p) for p in model.visual_proj.parameters()})


def test_prompts_are_averaged_in_the_tangent_space() -> None:
    """What `project=False` is for: exp0 of the mean differs from the mean of the points, and lies on the right ray."""
    model = build()
    texts = torch.tensor([1, 2, 3])
    tangent = model.embed_text(texts, project=False).mean(0)
    point = ops.lorentz_exp_map0(tangent, model.curvature)
    torch.testing.assert_close(ops.lorentz_log_map0(point, model.curvature), tangent)
