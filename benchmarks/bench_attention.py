"""Why the attention family is worth having: each op beside the plain formula, cross_attention beside PyTorch's too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import attention as rivals
from mmkern import ops
from mmkern.bench.case import Case, Family, Peer, Shape, load_shapes

SHAPES = load_shapes(Path(__file__).with_name("shapes.yaml"))
SHORT_KEYS = ("clip_text", "latents_64", "latents_128", "audio_window")
LONG_KEYS = ("vit_336", "square", "speech")


def arguments(task: str, shape: Shape, generator: torch.Generator) -> list[Any]:
    def heads(length: int | None) -> Tensor:
        return torch.randn(shape.batch or 1, shape.heads or 1, length or 1, shape.width, generator=generator)

    if task == "cross_attention_varlen":
        return packed(shape, generator)
    q, k, v = heads(shape.rows), heads(shape.others), heads(shape.others)
    if task == "multi_source_attention":  # two of one length
        return [q, k, v, heads(shape.others), heads(shape.others)]
    if not task.endswith("key mask"):
        return [q, k, v]
    keys = k.shape[2]
    lengths = torch.randint(-(-keys // 3), keys + 1, (len(k), 1), generator=generator)
    return [q, k, v, torch.arange(keys) < lengths]


def packed(shape: Shape, generator: torch.Generator) -> list[Any]:
    """Segments of ``rows`` queries; of keys a half less and a half more than ``others`` in turn."""
    batch, heads, keys = shape.batch or 1, shape.heads or 1, shape.others or 1
    half = keys // 2 if batch % 2 == 0 else 0
    ends = [
        torch.tensor([0, *lengths]).cumsum(0)
        for lengths in ([shape.rows] * batch, [keys + half * (-1) ** b for b in range(batch)])
    ]
    lengths = batch * shape.rows, batch * keys, batch * keys
    q, k, v = (torch.randn(n, heads, shape.width, generator=generator) for n in lengths)
    return [q, k, v, *ends, shape.rows, keys + half]


def sdpa(task: str, args: Any) -> Peer:
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return Peer(rivals.SDPA[task], args, leaves, lambda out: out)


def in_float32(task: str, args: Any) -> Peer:
    """mmkern itself, on the same numbers in float32."""
    wide = [a.detach().float().requires_grad_(a.requires_grad) for a in args]
    return Peer(ops.cross_attention, wide, [a for a in wide if a.requires_grad], lambda out: out)


def product(args: Any) -> tuple[Tensor, Tensor]:
    """The product that matrix rates are told by, 2048 x 2048 x 512: attention's own are small and many."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2048, 512, generator=generator)
    return x, y


ATTENTION = Family(
    name="attention",
    arguments=arguments,
    rivals=rivals.FORMULAS,
    # Two products forward, five backward, for each source.
    flops=lambda op, backward: (10 if backward else 4) * (2 if op == "multi_source_attention" else 1),
    yardstick=lambda op: "sgemm",
    product=product,
    few=lambda x: x[:1, :1] if x.dim() == 4 else x[:1] if x.dtype == torch.bool else x,
    peer_name="sdpa",
    peer=sdpa,
    ours={
        "cross_attention, key mask": lambda q, k, v, mask: ops.cross_attention(q, k, v, key_mask=mask),
        "cross_attention, window": lambda q, k, v: ops.cross_attention(
            q, k, v, window_size=(rivals.BAND, rivals.BAND), window_alignment="resample"
        ),
        "multi_source_attention": lambda q, *parts: ops.multi_source_attention(
            q, [ops.Source(*parts[:2]), ops.Source(*parts[2:])]
        ),
    },
)
BFLOAT16 = replace(ATTENTION, peer_name="float32", peer=in_float32)


def case(shape: str, **options: Any) -> Case:
    return Case(ATTENTION, "cross_attention", SHAPES[shape], with_peer=True, **options)


def in_bfloat16(shape: str, **options: Any) -> Case:
    return Case(BFLOAT16, "cross_attention", SHAPES[shape], dtype=torch.bfloat16, with_peer=True, **options)


CASES = [
    *(case(shape) for shape in (*SHORT_KEYS, *LONG_KEYS, "decode")),
    *(case(shape, mode="forward+backward") for shape in ("clip_text", "audio_window", "vit_336")),
    case("clip_text", variant="key mask"),
    case("lip_motion", variant="window"),
    *(Case(ATTENTION, op, SHAPES["clip_text"]) for op in ("multi_source_attention", "cross_attention_varlen")),
    *(case(shape, threads=2) for shape in ("clip_text", "vit_336")),
    *(in_bfloat16(shape) for shape in ("clip_text", "vit_336")),
    *(case(shape, threads=2, level="full") for shape in ("latents_64", "latents_128", "audio_window", "square")),
    *(case(shape, threads=2, level="full") for shape in ("speech", "decode")),
    *(
        case(shape, mode="forward+backward", level="full")
        for shape in ("latents_64", "latents_128", "square", "speech")
    ),
    *(
        in_bfloat16(shape, level="full")
        for shape in (*SHORT_KEYS, *LONG_KEYS, "decode")
        if shape not in ("clip_text", "vit_336")
    ),
]


def test_attention(case: Case, side: str, timed: Any) -> None:
    """Times one side of a case; fails only where a result is wrong (see conftest.py)."""
    timed(case, side)
