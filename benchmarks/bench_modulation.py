"""Why the fused norms are worth having: each beside the field's formula and a copy."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import modulation as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
FLOPS = {
    "bias_gelu": (20, 40),
    "film": (12, 24),
    "gated_residual": (2, 3),
    "geglu": (10, 20),
    "group_norm_act": (14, 30),
    "swiglu": (6, 12),
    "timestep_embedding": (20, 40),
    "ada_layer_norm": (8, 18),
    "dual_ada_layer_norm": (9, 20),
    "layer_norm": (8, 16),
    "rms_norm": (5, 12),
}


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    batch, rows, width = shape.batch or 1, shape.rows, shape.width
    if task == "timestep_embedding":
        return [torch.arange(rows)]
    if task == "group_norm_act":
        side = math.isqrt(width)
        return [randn(batch, rows, width // side, side), 1 + 0.1 * randn(rows), 0.1 * randn(rows)]
    x = randn(batch, rows, width)
    if task in ("layer_norm", "rms_norm"):
        return [x, *(1 + 0.1 * randn(width) for _ in range(2 if task == "layer_norm" else 1))]
    if task in ("geglu", "swiglu"):
        return [randn(rows, width)]
    if task == "bias_gelu":
        return [x, randn(width)]
    if task == "gated_residual":
        return [x, randn(batch, rows, width), randn(batch, width)]
    if task == "ada_layer_norm, residual":
        return [x, randn(batch, rows, width), *(0.1 * randn(batch, width) for _ in range(3))]
    modulators = [0.1 * randn(batch, width) for _ in range(2)]
    if task == "dual_ada_layer_norm":
        modulators.append(1 + 0.1 * randn(batch, -(-rows // rivals.FRAMES_PER_SCALE)))
    return [x, *modulators]


MODULATION = Family(
    name="modulation",
    arguments=arguments,
    rivals=rivals.FORMULAS,
    flops=lambda op, backward: FLOPS[op][backward],
    few=lambda x: x[:1] if x.dim() > 1 else x,
    ours={
        "ada_layer_norm": lambda x, scale, shift: ops.ada_layer_norm(x, scale=scale, shift=shift),
        "ada_layer_norm, residual": lambda x, residual, gate, scale, shift: ops.ada_layer_norm(
            x, scale=scale, shift=shift, gate=gate, residual=residual
        ),
        "dual_ada_layer_norm": lambda x, *modulators: ops.dual_ada_layer_norm(x, *modulators, rivals.FRAMES_PER_SCALE),
        "film": lambda x, gamma, beta: ops.film(x, gamma, beta, gamma_offset=1.0, activation="silu"),
        "group_norm_act": lambda x, weight, bias: ops.group_norm_act(x, rivals.groups_of(x), weight, bias),
        "layer_norm": lambda x, weight, bias: ops.layer_norm(x, weight, bias, eps=rivals.EPS),
        "timestep_embedding": lambda timesteps: ops.timestep_embedding(
            timesteps, rivals.EMBEDDING_DIM, flip_sin_to_cos=True, downscale_freq_shift=0
        ),
    },
    made_of={
        **dict.fromkeys(("dual_ada_layer_norm", "layer_norm", "rms_norm"), "ada_layer_norm"),
        **dict.fromkeys(("film", "gated_residual", "bias_gelu"), "affine_activation"),
        **dict.fromkeys(("geglu", "swiglu"), "gated_activation"),
    },
)


def case(op: str, shape: str, **options: Any) -> Case:
    return Case(MODULATION, op, SHAPES[shape], **options)


CASES = [
    *(case("ada_layer_norm", "dit_xl", mode=mode) for mode in ("forward", "forward+backward")),
    *(case("ada_layer_norm", "dit_xl", mode=mode, variant="residual") for mode in ("forward", "forward+backward")),
    case("ada_layer_norm", "dit_xl_small"),
    case("dual_ada_layer_norm", "style_dit"),
    case("geglu", "feed_forward"),
    case("group_norm_act", "unet_64"),
    case("group_norm_act", "unet_64", mode="forward+backward", level="full"),
    case("group_norm_act", "unet_64", dtype=torch.bfloat16, level="full"),
    *(case(op, "feed_forward", level="full") for op in ("swiglu",)),
    case("timestep_embedding", "timesteps", level="full"),
    *(
        case(op, "dit_xl", mode=mode, level="full")
        for op in ("film", "gated_residual", "bias_gelu")
        for mode in ("forward", "forward+backward")
    ),
    case("geglu", "feed_forward", mode="forward+backward", level="full"),
    *(case(op, "dit_xl", mode=mode) for op in ("layer_norm", "rms_norm") for mode in ("forward", "forward+backward")),
    *(case("ada_layer_norm", "dit_xl", dtype=dtype, level="full") for dtype in (torch.bfloat16, torch.float16)),
    case("ada_layer_norm", "dit_xl", threads=2, level="full"),
]


def test_modulation(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
