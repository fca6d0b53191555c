"""``attn_implementation="mmkern"`` for the models of transformers, and a sampler for their ``generate()``.

mmkern.integrations.transformers.register()
model = CLIPModel.from_pretrained(name, attn_implementation="mmkern")
model.generate(**inputs, do_sample=False, logits_processor=[FusedSampler(temperature=0.8, top_p=0.9)])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mmkern.ops.attention import cross_attention

from .transformers_sampling import FusedSampler as FusedSampler

NAME = "mmkern"

_UNKNOWN = {
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "output_attentions": "the attention weights, which it never holds,",
    "head_mask": "a mask of heads",
}


def register() -> None:
    """Make ``attn_implementation="mmkern"`` known to transformers: the attention, and the masks that it reads.

    Masks are those of ``sdpa``: without them, transformers hands None to an implementation of a name it does not know,
    and padded tokens are attended to.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention of a transformers module, by :func:`mmkern.ops.cross_attention`.

    Args:
        module: its ``is_causal`` counts where the argument is None; causality counts where there is no mask.
        query: ``[B, Hq, L, D]``; key ``[B, Hkv, S, D]`` and value ``[B, Hkv, S, Dv]`` may have fewer heads.
        attention_mask: bool (True = attend) or added to the scores, broadcastable to ``[B, Hq, L, S]``.
        position_bias: added to the scores; may need a gradient.
    Returns: ``[B, L, Hq, Dv]``, and None for the weights.
    Raises: ValueError where a model asks for what the op has not (sinks, a paged cache, the weights).
    """
    for name, what in _UNKNOWN.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"attn_implementation='{NAME}': got {name}, expected none: it has not {what}; use 'eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = cross_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        bias=position_bias,
        scale=scaling,
        softcap=softcap,
        is_causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        causal_alignment="top_left",  # more keys than queries, and no mask: an empty static cache
        dropout_p=dropout,
    )
    return out.transpose(1, 2), None
