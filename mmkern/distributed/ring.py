"""Attention to keys that lie in shards, one a process, which go round in a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mmkern.ops import cross_attention, merge_attention

from .neighbours import Neighbours

_OP = "ring_cross_attention"


def ring_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """``cross_attention(q, all k, all v)``, where each process of ``group`` holds some of the keys and its own queries.

    Shards of k and v go from process to process while each attends to the one it has; partial results are merged
    exactly. Backward goes round once more, and the gradients of a shard travel with it. No process ever holds more
    than two shards.

    Args:
        q: ``[B, Hq, L, D]``, the queries of this process; L may differ from process to process.
        k: ``[B, Hkv, S, D]``, its shard; S may differ, 0 included.
        v: ``[B, Hkv, S, Dv]``.
        group: the processes; all by default.
        key_mask: bool ``[B, S]`` of its shard, True = attend; in every process or in none.
        scale: of the scores; 1/√D by default.
        softcap: scores become ``softcap·tanh(scores / softcap)``.
        return_lse: return the log of the sum of each row's exponentials too.
    Returns: ``[B, Hq, L, Dv]`` in the dtype of q; with ``return_lse`` also ``[B, Hq, L]`` in float32 (float64 for
        float64).
    Raises: TypeError or ValueError as ``cross_attention`` does, and RuntimeError without a process group.
    Source: Liu et al. 2023, Ring Attention, §3; merging as in Dao 2023, FlashAttention-2, §3.1.
    """
    if not dist.is_initialized():
        raise RuntimeError(f"{_OP}: there is no process group, expected torch.distributed.init_process_group before")
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    out, lse = _Ring.apply(  # type: ignore[no-untyped-call]
        q, k, v, key_mask, scale, softcap, group
    )
    return (out, lse) if return_lse else out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, softcap: float | None, group: Any
    ) -> tuple[Tensor, Tensor]:
        ring = Neighbours(group, [k.shape[2]], 2, k.device)
        found = None
        for _, (held_k, held_v, held_mask) in ring.visits(_shard(k, v, key_mask)):
            out, lse = cross_attention(
                q, held_k, held_v, key_mask=_mask(held_mask), scale=scale, softcap=softcap, return_lse=True
            )
            wide = out.to(lse.dtype)
            found = (wide, lse) if found is None else merge_attention([found[0], wide], [found[1], lse])
        assert found is not None
        out, lse = found[0].to(q.dtype), found[1]
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.ring, ctx.scale, ctx.softcap = ring, scale, softcap
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        ring = ctx.ring
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        carried = [torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (k, v)]
        for step, (held_k, held_v, held_mask) in ring.visits(_shard(k, v, key_mask)):
            found = _gradients((q, held_k, held_v), _mask(held_mask), ctx.scale, ctx.softcap, out, lse, grad, grad_lse)
            grad_q += found[0]
            for sums, part in zip(carried, found[1:3], strict=True):
                sums += part
            carried = ring.pass_on(carried, step)()
        return grad_q.to(q.dtype), carried[0].to(k.dtype), carried[1].to(v.dtype), None, None, None, None


def _gradients(
    qkv: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor,
) -> Sequence[Tensor]:
    """A shard's part of the gradients of q, k and v: ``out = Σ share·part`` with ``share = exp(part_lse - lse)``.

    Its own result is made again. Of all shards at once, results would be as large as all values.
    """
    part, part_lse = cross_attention(*qkv, key_mask=key_mask, scale=scale, softcap=softcap, return_lse=True)
    share = torch.exp(part_lse - lse.masked_fill(lse == -torch.inf, 0.0))
    part_grad = (share[..., None] * grad).to(grad.dtype)
    part_grad_lse = (part_grad * (part.to(lse.dtype) - out)).sum(-1) + share * grad_lse
    found: Sequence[Tensor] = torch.ops.mmkern.cross_attention_backward(
        *(part_grad, part_grad_lse, *qkv, key_mask, *_NO_TENSORS, scale, softcap or 0.0, *_NO_BAND, 0.0),
        *(part, part_lse, _WANTED),
    )
    return found


# Of the registered op: attn_mask, attn_bias, bias, prefix_lengths and seed; left, right and alignment; and, of q, k, v
# and the two biases, which gradients are wanted.
_NO_TENSORS = (None,) * 5
_NO_BAND = (-1, -1, 0)
_WANTED = (True, True, True, False, False)


def _shard(k: Tensor, v: Tensor, key_mask: Tensor) -> list[Tensor]:
    """As it travels: dense, the keys on axis 2, no bool."""
    return [k.contiguous(), v.contiguous(), key_mask[:, None, :, None].to(torch.uint8)]


def _mask(travelling: Tensor) -> Tensor:
    return travelling[:, 0, :, 0].bool()
