"""Why the decoding family is worth having: a token of a wide row without a sort, beside a sort, or topk first; a step
of absorbing-state diffusion and its loss, beside their formulas."""

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


def absorbing_arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Branches and tokens, of which every second is as good as certain to become another, and the others to stay, since
    rivals draw numbers of their own. Of the loss scores, targets, and what is masked."""
    batch, width = [n for n in (shape.batch, shape.heads, shape.rows) if n is not None], shape.width
    targets = torch.randint(width - 1, batch, generator=generator)
    masked = torch.rand(batch, generator=generator) < (0.5 if "half" in task else 1.0)
    if task.startswith("absorbing_score_loss"):
        return [torch.randn(*batch, width, generator=generator), targets, masked]
    branches = 0.4 * torch.randn(shape.others, *batch, width, generator=generator)
    for branch in branches[..., ::2, :]:
        branch.scatter_(-1, targets[..., ::2, None], 60.0)
    return [branches, targets.masked_fill(masked, width - 1)]


def absorbing_step(branches: Tensor, tokens: Tensor) -> Tensor:
    return ops.absorbing_step(branches, tokens, 1.0, rivals.STEP, guidance=rivals.GUIDANCE, seed=SEED).float()  # type: ignore[union-attr]


def absorbing_score_loss(log_scores: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    sigma, dsigma = (noise[: len(log_scores)] for noise in (rivals.SIGMA, rivals.DSIGMA))
    return ops.absorbing_score_loss(log_scores, targets, masked, sigma, dsigma)


def few_positions(x: Tensor) -> Tensor:
    """Of each codebook."""
    return x[..., :5, :] if x.is_floating_point() else x[..., :5]


ABSORBING = Family(
    name="absorbing",
    arguments=absorbing_arguments,
    rivals={
        **dict.fromkeys(("absorbing_step", "absorbing_step, half masked"), rivals.absorbing_step),
        **dict.fromkeys(("absorbing_score_loss", "absorbing_score_loss, half masked"), rivals.absorbing_score_loss),
    },
    ours={
        **dict.fromkeys(("absorbing_step", "absorbing_step, half masked"), absorbing_step),
        **dict.fromkeys(("absorbing_score_loss", "absorbing_score_loss, half masked"), absorbing_score_loss),
    },
    flops=lambda op, backward: 2,  # of guidance a product and a sum; of the loss a sum, and a product backward
    few=few_positions,
)

CASES = [
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_3"], variant="top-k"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_eight"], variant="top-k"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_eight"], variant="top-p", level="full"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p", threads=2, level="full"),
    Case(DECODING, "sample_tokens", SHAPES["logits_of_llama_2"], variant="top-p", dtype=torch.bfloat16, level="full"),
    Case(ABSORBING, "absorbing_step", SHAPES["guided_speech_codes"]),
    Case(ABSORBING, "absorbing_step", SHAPES["guided_speech_codes"], variant="half masked", level="full"),
    Case(ABSORBING, "absorbing_step", SHAPES["guided_speech_codes"], threads=2, level="full"),
    Case(ABSORBING, "absorbing_step", SHAPES["guided_speech_codes"], dtype=torch.bfloat16, level="full"),
    Case(ABSORBING, "absorbing_score_loss", SHAPES["speech_codes"], mode="forward+backward"),
    *(
        Case(ABSORBING, "absorbing_score_loss", SHAPES["speech_codes"], "forward+backward", "full", **more)
        for more in ({"variant": "half masked"}, {"threads": 2}, {"dtype": torch.bfloat16})
    ),
]


def test_decoding(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
