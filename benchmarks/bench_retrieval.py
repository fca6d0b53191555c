"""Why the retrieval family is worth having: the best of all pairs beside the product, in chunks, and torch.topk."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import retrieval as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
K = {"pairwise_topk": 10, "linear_topk": 50}


def arguments(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    assert shape.others is not None
    x, y = (torch.randn(rows, shape.width, generator=generator) for rows in (shape.rows, shape.others))
    return [x, y, min(K[op], shape.others)]


RETRIEVAL = Family(
    name="retrieval",
    arguments=arguments,
    rivals={op: getattr(rivals, op) for op in K},
    ours={
        "pairwise_topk": lambda x, y, k: ops.pairwise_topk(x, y, k)[0],
        "linear_topk": lambda h, weight, k: ops.linear_topk(h, weight, k)[0],
    },
    flops=lambda op, backward: 2,
    yardstick=lambda op: "sgemm",
)

CASES = [
    Case(RETRIEVAL, "pairwise_topk", SHAPES["gallery"]),
    Case(RETRIEVAL, "linear_topk", SHAPES["decoding_step"]),
    Case(RETRIEVAL, "pairwise_topk", SHAPES["large_gallery"], level="full"),
    Case(RETRIEVAL, "pairwise_topk", SHAPES["gallery"], threads=2, level="full"),
    Case(RETRIEVAL, "linear_topk", SHAPES["decoding_step"], dtype=torch.bfloat16, level="full"),
]


def test_retrieval(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
