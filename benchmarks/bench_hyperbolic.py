"""Why the hyperbolic family is worth having: each op beside the field's formulas and geoopt 0.5.1."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import hyperbolic as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
CURVATURE = 0.7  # not 1, where a forgotten curvature does not show

RADIAL = (
    "lorentz_exp_map0",
    "lorentz_log_map0",
    "poincare_exp_map0",
    "poincare_log_map0",
    "lorentz_to_poincare",
    "poincare_to_lorentz",
    "mobius_scalar_mul",
)
TWO_POINT_MAPS = ("lorentz_exp_map", "lorentz_log_map", "mobius_add", "poincare_exp_map", "poincare_log_map")
TWO_POINT_SCALARS = ("lorentz_distance", "poincare_distance", "lorentz_exterior_angle", "lorentz_entailment_loss")
ROW_WISE = (*RADIAL, *TWO_POINT_MAPS, *TWO_POINT_SCALARS, "lorentz_half_aperture", "lorentz_parallel_transport")
PAIRWISE = ("lorentz_pairwise_inner", "lorentz_pairwise_distance", "poincare_pairwise_distance")

# Additions and multiplications an element, forward and backward: the inner products, then the linear combinations.
FLOPS = {
    **dict.fromkeys(RADIAL, (3, 7)),
    **dict.fromkeys(TWO_POINT_MAPS, (12, 23)),
    **dict.fromkeys(TWO_POINT_SCALARS, (9, 15)),
    "lorentz_half_aperture": (2, 3),
    "lorentz_parallel_transport": (17, 35),
    "lorentz_centroid": (4, 8),
    **dict.fromkeys(PAIRWISE, (2, 4)),
}


def arguments(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Inputs by the names of the op's parameters: embeddings at distances of about 1, as a trained MERU has them."""
    lorentz = not op.startswith(("poincare", "mobius"))
    sets = (shape.rows, shape.others) if op == "lorentz_centroid" else (shape.rows,)

    def vectors(rows: tuple[int | None, ...], length: float) -> Tensor:
        return torch.randn(*rows, shape.width, generator=generator) * (length / (CURVATURE * shape.width) ** 0.5)

    make = {
        "x": lambda: vectors(sets, 1.2 if lorentz else 0.5),
        "y": lambda: vectors((shape.others or shape.rows,), 1.2 if lorentz else 0.5),
        "u": lambda: vectors(sets, 0.8 if lorentz else 0.3),
        "v": lambda: vectors(sets, 1.2),
        "r": lambda: torch.rand(shape.rows, 1, generator=generator) + 0.5,
        "weights": lambda: torch.rand(*sets, generator=generator) + 0.1,
        "curvature": lambda: torch.tensor(CURVATURE),
    }
    return [make[name]() for name in inspect.signature(getattr(ops, op)).parameters if name in make]


HYPERBOLIC = Family(
    name="hyperbolic",
    arguments=arguments,
    rivals={op: getattr(rivals, op) for op in (*ROW_WISE, *PAIRWISE, "lorentz_centroid")},
    flops=lambda op, backward: FLOPS[op][backward],
    yardstick=lambda op: "sgemm" if op in PAIRWISE else "copy",
    peer_name="geoopt",
    peer=rivals.geoopt_peer,
)


def case(op: str, shape: str, **options: Any) -> Case:
    return Case(HYPERBOLIC, op, SHAPES[shape], **options)


def grid() -> list[Case]:
    """Every op at the sizes of its model, forward and with gradients."""
    row_wise = [(op, "meru_batch") for op in ROW_WISE]
    sizes = ("meru_pairs", "meru_local_pairs", "meru_zero_shot", "meru_traversal")
    pairs = [(op, shape) for op in PAIRWISE for shape in sizes]
    centroid = [("lorentz_centroid", "prompt_ensemble")]
    return [
        case(op, shape, mode=mode, level="full", with_peer=op in rivals.GEOOPT and op not in PAIRWISE)
        for op, shape in (*row_wise, *centroid, *pairs)
        for mode in ("forward", "forward+backward")
        if (op, shape, mode) != ("lorentz_pairwise_distance", "meru_pairs", "forward")  # at the default level
    ]


CASES = [
    *(case(op, "beyond_cache", mode=mode) for op in RADIAL[:2] for mode in ("forward", "forward+backward")),
    *(case(op, "in_cache") for op in RADIAL[:2]),
    case("lorentz_distance", "beyond_cache", mode="forward+backward"),
    case("lorentz_pairwise_distance", "meru_pairs"),
    case("lorentz_entailment_loss", "unlearning_batch", mode="forward+backward"),
    case("lorentz_exp_map0", "unlearning_batch", with_peer=True),
    case("lorentz_log_map", "unlearning_batch", with_peer=True),
    case("poincare_pairwise_distance", "ball_pairs", with_peer=True),
    case("lorentz_exp_map0", "call", mode="call"),
    case("lorentz_exp_map0", "call", mode="call+grad"),
    *grid(),
    case("lorentz_exp_map0", "beyond_cache", dtype=torch.bfloat16, level="full"),
    case("lorentz_exp_map0", "beyond_cache", mode="forward+backward", dtype=torch.bfloat16, level="full"),
    case("lorentz_exp_map0", "beyond_cache", threads=2, level="full"),
    case("lorentz_pairwise_distance", "meru_pairs", threads=2, level="full"),
]


def test_hyperbolic(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
