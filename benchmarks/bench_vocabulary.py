"""Why the vocabulary family is worth having: beside all logits in memory, and torch's own linear_cross_entropy."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import vocabulary as rivals
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
FEW_TOKENS, FEW_ROWS = 4096, 64


def arguments(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Logits of unit variance, every row with a target."""
    assert shape.others is not None
    rows = torch.randn(shape.rows, shape.width, generator=generator)
    tokens = torch.randn(shape.others, shape.width, generator=generator) / shape.width**0.5
    return [rows, tokens, torch.randint(shape.others, (shape.rows,), generator=generator)]


def few(x: Tensor) -> Tensor:
    """Of the tokens the first ones, of the rows the first, whose targets are among those."""
    if len(x) >= FEW_TOKENS:
        return x[:FEW_TOKENS]
    return x[:FEW_ROWS] if x.is_floating_point() else x[:FEW_ROWS] % FEW_TOKENS


VOCABULARY = Family(
    name="vocabulary",
    arguments=arguments,
    rivals={op: getattr(rivals, op) for op in ("linear_cross_entropy", "linear_log_prob")},
    flops=lambda op, backward: 4 if backward else 2,
    yardstick=lambda op: "sgemm",
    peer_name="torch's own",
    peer=rivals.linear_cross_entropy_of_torch,
    few=few,
    made_of={"linear_log_prob": "linear_logsumexp"},
)

CASES = [
    Case(
        VOCABULARY,
        "linear_cross_entropy",
        SHAPES[shape],
        mode="forward+backward",
        with_peer=hasattr(torch.nn, "LinearCrossEntropyOptions"),
        level=level,
    )
    for shape, level in (("llama_2_head", "default"), ("paligemma_head", "full"))
] + [
    Case(VOCABULARY, op, SHAPES["llama_2_head"], mode=mode, threads=threads, level="full")
    for op, mode, threads in (
        ("linear_cross_entropy", "forward", 1),
        ("linear_cross_entropy", "forward+backward", 2),
        ("linear_log_prob", "forward+backward", 1),
    )
]


def test_vocabulary(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
