"""Why the decoding family is worth having: a token of a wide row without a sort, beside a sort, or topk first."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import decoding as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes
from mmkern.reference.decoding import exponential

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
SEED = 7


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Logits, and the numbers of the race."""
    logits = torch.randn(shape.rows, shape.width, generator=generator)
    return [logits, exponential(torch.tensor([[SEED, 0]]), *logits.shape, torch.float32)]


def sample_top_p(logits: Tensor, _: Tensor) -> Tensor:
    return ops.sample_tokens(logits, top_p=rivals.TOP_P, seed=SEED).float()  # type: ignore[union-attr]


def sample_top_k(logits: Tensor, _: Tensor) -> Tensor:
    return ops.sample_tokens(logits, top_k=rivals.TOP_K, top_p=rivals.TOP_P, seed=SEED).float()  # type: ignore[union-attr]


DECODING = Family(
    name="decoding",
    arguments=arguments,
    rivals={"sample_tokens, top-p": rivals.sample_top_p, "sample_tokens, top-k": rivals.sample_top_k},
    ours={"sample_tokens, top-p": sample_top_p, "sample_tokens, top-k": sample_top_k},
    flops=lambda op, backward: 3,  # a shift, a scale, a sum
)

CASES = [
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_3"], variant="top-k"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_eight"], variant="top-k"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_eight"], variant="top-p", level="full"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p", threads=2, level="full"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p", dtype=torch.bfloat16, level="full"),
]


def test_decoding(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
