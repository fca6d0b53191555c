"""Why steps from logits to tokens are worth having in one call: of MaskGCT, of speculative sampling, and probabilities
of the largest without a sort. Inputs make each draw as good as certain, since rivals draw numbers of their own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import token_probabilities as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
SEED, DRAFTS = 7, 5


def _peaked(g: torch.Generator, *sizes: int) -> tuple[Tensor, Tensor]:
    """Logits, and the tokens that are certain."""
    tokens = torch.randint(sizes[-1], sizes[:-1], generator=g)
    return torch.randn(*sizes, generator=g).scatter_(-1, tokens[..., None], 60.0), tokens


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    g = generator
    if task.startswith("masked_decode_step"):
        sizes = (shape.batch or 1, shape.rows)
        logits, _ = _peaked(g, *sizes, shape.width)
        masked = torch.rand(sizes, generator=g) < (0.5 if "half" in task else 1.0)
        return [logits, torch.full(sizes, shape.width), masked]
    if task == "verify_draft_tokens":
        logits, tokens = _peaked(g, shape.rows, DRAFTS + 1, shape.width)
        probs = logits.softmax(-1)
        return [probs, probs[:, :DRAFTS].clone(), tokens[:, :DRAFTS].contiguous()]
    x = torch.randn(shape.rows, shape.width, generator=g)
    if task == "error_gate":
        return [-x.abs(), torch.randn(x.shape, generator=g)]
    if task == "token_log_prob":
        return [x, torch.randint(shape.width, (shape.rows,), generator=g)]
    return [(2 * x).softmax(-1)]


def masked_decode_step(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    numbers = {"keep_top_k": rivals.KEEP, "temperature": rivals.TEMPERATURE, "ratio": rivals.RATIO}
    return ops.masked_decode_step(logits, tokens, masked, seed=SEED, **numbers).tokens.float()


_MASKED = ("masked_decode_step", "masked_decode_step, half masked")
TOKENS = Family(
    name="token probabilities",
    arguments=arguments,
    rivals={
        **dict.fromkeys(_MASKED, rivals.masked_decode_step),
        **{
            op: getattr(rivals, op)
            for op in ("token_log_prob", "renormalize_top_k", "renormalize_top_p", "verify_draft_tokens", "error_gate")
        },
    },
    ours={
        **dict.fromkeys(_MASKED, masked_decode_step),
        "renormalize_top_k": lambda probs: ops.renormalize_top_k(probs, rivals.TOP_K),
        "renormalize_top_p": lambda probs: ops.renormalize_top_p(probs, rivals.TOP_P),
        "verify_draft_tokens": lambda *given: ops.verify_draft_tokens(*given, seed=SEED).tokens.float(),
        "error_gate": lambda *given: ops.error_gate(*given, rivals.THRESHOLD).float(),
    },
    flops=lambda op, backward: 3,  # a shift, a scale, a sum
    few=lambda x: x,
    made_of={
        "renormalize_top_k": "renormalize",
        "renormalize_top_p": "renormalize",
        "verify_draft_tokens": "sample_tokens",
        "error_gate": "",
    },
)

CASES = [
    Case(TOKENS, "masked_decode_step", SHAPES["masked_codes"]),
    Case(TOKENS, "masked_decode_step", SHAPES["masked_codes"], variant="half masked", level="full"),
    Case(TOKENS, "masked_decode_step", SHAPES["masked_codes"], threads=2, level="full"),
    Case(TOKENS, "token_log_prob", SHAPES["logits_of_llama_2"]),
    Case(TOKENS, "token_log_prob", SHAPES["logits_of_llama_2"], mode="forward+backward", level="full"),
    Case(TOKENS, "renormalize_top_k", SHAPES["logits_of_llama_2"]),
    Case(TOKENS, "renormalize_top_p", SHAPES["logits_of_llama_2"]),
    Case(TOKENS, "verify_draft_tokens", SHAPES["logits_of_llama_2"]),
    Case(TOKENS, "error_gate", SHAPES["transcripts"]),
]


def test_token_probabilities(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
