"""Why the contrastive family is worth having: each loss beside the field's formula and pytorch-metric-learning 2.9."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.rivals import contrastive as rivals
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
LOSSES = {
    "info_nce_loss": "pairwise_logsumexp",
    "siglip_loss": "sigmoid_loss",
    "lorentz_contrastive_loss": "lorentz_pairwise_logsumexp",
}


def arguments(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Rows of length 1 at CLIP's first temperature; points at distances of about 1, as a trained MERU has them."""
    x, y = torch.randn(2, shape.rows, shape.width, generator=generator)
    if op == "lorentz_contrastive_loss":
        length = 1.2 / (0.7 * shape.width) ** 0.5
        return [x * length, y * length, torch.tensor(0.7), torch.tensor(1 / 0.07)]
    x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
    bias = [torch.tensor(-10.0)] if op == "siglip_loss" else []
    return [x, y, torch.tensor(10.0 if bias else 1 / 0.07), *bias]


CONTRASTIVE = Family(
    name="contrastive",
    arguments=arguments,
    rivals={op: getattr(rivals, op) for op in LOSSES},
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
    )
    for op in LOSSES
    for shape in ("meru_pairs", "meru_local_square")
] + [
    Case(CONTRASTIVE, op, SHAPES["meru_pairs"], mode=mode, threads=threads, level="full")
    for op in LOSSES
    for mode, threads in (("forward", 1), ("forward+backward", 2))
]


def test_contrastive(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
