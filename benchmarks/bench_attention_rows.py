"""Why the row-wise companions of attention are worth having: each beside the field's formula and a copy."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import attention_rows as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
FLOPS = {"merge_attention": (3, 8), "rotary_embedding": (3, 3), "qk_norm_rotary": (7, 14)}


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Heads as a projection leaves them for rotations, as attention leaves them for a merge."""

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    batch, heads, rows, width = shape.batch or 1, shape.heads or 1, shape.rows, shape.width
    if task == "merge_attention":
        outs = [randn(batch, heads, rows, width) for _ in range(2)]
        return [*outs, *(randn(batch, heads, rows) for _ in range(2))]
    angle = torch.arange(rows)[:, None] * 1e-4 ** torch.linspace(0, 1, width // 2)
    x = randn(batch, rows, heads, width).transpose(1, 2)
    weight = [1 + 0.1 * randn(width)] if task == "qk_norm_rotary" else []
    return [x, *weight, angle.cos(), angle.sin()]


ATTENTION_ROWS = Family(
    name="attention_rows",
    arguments=arguments,
    rivals=rivals.FORMULAS,
    flops=lambda op, backward: FLOPS[op][backward],
    few=lambda x: x[:1, :1] if x.dim() > 2 else x,
    ours={
        "merge_attention": lambda out, other, lse, other_lse: ops.merge_attention([out, other], [lse, other_lse])[0],
        # The rival norms the queries alone; here keys of no head come along.
        "qk_norm_rotary": lambda x, weight, cos, sin: ops.qk_norm_rotary(
            x, x[:, :0], weight, weight, cos, sin, rivals.EPS
        )[0],
    },
    made_of={"qk_norm_rotary": "rotary_embedding"},
)


def case(op: str, shape: str, **options: Any) -> Case:
    return Case(ATTENTION_ROWS, op, SHAPES[shape], **options)


CASES = [
    *(case("merge_attention", "patch_heads", mode=mode) for mode in ("forward", "forward+backward")),
    # Forward alone: with gradients the harness would ask for those of the angles, too.
    *(case(op, "token_heads") for op in ("rotary_embedding", "qk_norm_rotary")),
    *(case(op, "token_heads", dtype=torch.bfloat16, level="full") for op in ("rotary_embedding", "qk_norm_rotary")),
    *(case(op, "token_heads", threads=2, level="full") for op in ("rotary_embedding", "qk_norm_rotary")),
]


def test_attention_rows(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
