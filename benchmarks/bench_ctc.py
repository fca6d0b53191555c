"""Why CTC's decoding and edit distance are worth having: beside a loop over rows, and the Levenshtein package."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import ctc as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
LABELS = 32


def scores(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Of a path with repeats and blanks that is likely, as a trained model has it."""
    sizes = (shape.batch or 1, shape.rows)
    drawn = torch.randint(shape.width, sizes, generator=generator)
    paths = drawn.where(torch.rand(sizes, generator=generator) < 0.3, 0)
    if op == "collapse_repeats":
        return [paths]
    likely = torch.nn.functional.one_hot(paths, shape.width)
    log_probs = (torch.randn(*sizes, shape.width, generator=generator) + 6 * likely).log_softmax(-1)
    if op != "ctc_forced_align":
        return [log_probs]
    return [log_probs, torch.randint(1, shape.width, (sizes[0], shape.rows // 5), generator=generator)]


def pairs(op: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    """Of which a fifth of the tokens differ."""
    a, other = (torch.randint(LABELS, (shape.rows, shape.width), generator=generator) for _ in range(2))
    return [a, other.where(torch.rand(a.shape, generator=generator) < 0.2, a)]


CTC = Family(
    name="ctc",
    arguments=scores,
    rivals={
        op: getattr(rivals, op)
        for op in ("ctc_greedy_decode", "ctc_beam_decode", "ctc_forced_align", "collapse_repeats")
    },
    ours={
        "ctc_greedy_decode": lambda log_probs: ops.ctc_greedy_decode(log_probs).tokens.float(),
        "ctc_beam_decode": lambda log_probs: ops.ctc_beam_decode(log_probs, beam=rivals.BEAM).scores[:, 0],
        "ctc_forced_align": lambda *given: ops.ctc_forced_align(*given).scores.sum(-1),
        "collapse_repeats": lambda paths: ops.collapse_repeats(paths, blank=0).tokens.float(),
    },
    flops=lambda op, backward: 1,
)
EDITS = Family(
    name="edit distance",
    arguments=pairs,
    rivals={"edit_distance": rivals.edit_distance},
    ours={"edit_distance": lambda a, b: ops.edit_distance(a, b).distance.float()},
    flops=lambda op, backward: 1,
    peer_name="Levenshtein",
    peer=rivals.levenshtein,
)

CASES = [
    Case(CTC, "ctc_greedy_decode", SHAPES["frames_of_units"]),
    Case(CTC, "ctc_greedy_decode", SHAPES["frames_of_units"], threads=2, level="full"),
    Case(CTC, "ctc_greedy_decode", SHAPES["frames_of_units"], dtype=torch.bfloat16, level="full"),
    Case(CTC, "collapse_repeats", SHAPES["frames_of_units"]),
    Case(CTC, "ctc_beam_decode", SHAPES["utterance"], level="full"),
    Case(CTC, "ctc_forced_align", SHAPES["utterances"]),
    Case(EDITS, "edit_distance", SHAPES["transcripts"], with_peer=True),
]


def test_ctc(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
