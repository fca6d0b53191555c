"""Why the contrastive family is worth having: each loss beside the field's formula and pytorch-metric-learning 2.9."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.rivals import contrastive as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
LOSSES = {
    "info_nce_loss": "pairwise_logsumexp",
    "siglip_loss": "sigmoid_loss",
    "lorentz_contrastive_loss": "lorentz_pairwise_logsumexp",
    "ego_nce_loss": "labelled_pairwise_logsumexp",
    "alignment_calibration_loss": "retained_pairwise_logsumexp",
}
EGO_CLASSES = (118, 582)  # verbs and nouns of EgoVLP


def arguments(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Rows of length 1 at CLIP's first temperature; points at distances of about 1, as a trained MERU has them.

    A clip has a verb and about two nouns. About half of the rows are to be forgotten, of any few of them too.
    """
    x, y = torch.randn(2, shape.rows, shape.width, generator=generator)
    forget = [torch.arange(shape.rows) * 7 % 11 < 5] if op.startswith("alignment") else []
    if "lorentz" in op:
        length = 1.2 / (0.7 * shape.width) ** 0.5
        return [x * length, y * length, *forget, torch.tensor(0.7), torch.tensor(1 / 0.07)]
    if op == "ego_nce_loss":
        verbs, nouns = (torch.zeros(shape.rows, classes, dtype=torch.bool) for classes in EGO_CLASSES)
        for labels, each in ((verbs, 1), (nouns, 2)):
            labels.scatter_(1, torch.randint(0, labels.shape[1], (shape.rows, each), generator=generator), True)
        return [functional.normalize(x, dim=-1), functional.normalize(y, dim=-1), torch.tensor(0.05), verbs, nouns]
    x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    bias = [torch.tensor(-10.0)] if op == "siglip_loss" else []
    return [x, y, *forget, torch.tensor(10.0 if bias else 1 / 0.07), *bias]


WEIGHTS = {"alpha": 1.0, "beta": 0.5, "gamma": 1.0}


def calibration(x: Tensor, y: Tensor, forget: Tensor, logit_scale: Tensor) -> Tensor:
    return ops.alignment_calibration_loss(x, y, forget, logit_scale=logit_scale, **WEIGHTS)


def lorentz_calibration(x: Tensor, y: Tensor, forget: Tensor, curvature: Tensor, logit_scale: Tensor) -> Tensor:
    numbers = {"curvature": curvature, "logit_scale": logit_scale}
    return ops.alignment_calibration_loss(x, y, forget, geometry="lorentz", **numbers, **WEIGHTS)


CALIBRATION = "alignment_calibration_loss"


CONTRASTIVE = Family(
    name="contrastive",
    arguments=arguments,
    rivals={op: getattr(rivals, op) for op in LOSSES if op != CALIBRATION}
    | {
        f"{CALIBRATION}, euclidean": partial(rivals.alignment_calibration_loss, **WEIGHTS),
        f"{CALIBRATION}, lorentz": partial(rivals.lorentz_alignment_calibration_loss, **WEIGHTS),
    },
    ours={f"{CALIBRATION}, euclidean": calibration, f"{CALIBRATION}, lorentz": lorentz_calibration},
    flops=lambda op, backward: 4 if backward else 2,
    yardstick=lambda op: "sgemm",
    peer_name="metric learning",
    peer=rivals.metric_learning,
    made_of=LOSSES,
)

CASES = [
    Case(
        CONTRASTIVE,
        op,
        SHAPES[shape],
        mode="forward+backward",
        with_peer=(op, shape) == ("info_nce_loss", "meru_local_square"),
        variant=variant,
    )
    for op in LOSSES
    for shape in ("meru_pairs", "meru_local_square")
    for variant in (("euclidean", "lorentz") if op == CALIBRATION else ("",))
] + [
    Case(CONTRASTIVE, op, SHAPES["meru_pairs"], mode=mode, threads=threads, level="full")
    for op in LOSSES
    if op != CALIBRATION
    for mode, threads in (("forward", 1), ("forward+backward", 2))
]


def test_contrastive(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
