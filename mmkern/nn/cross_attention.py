"""Attention to one or several sources, with its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.ops import Source
from mmkern.ops._checks import LARGEST, check_number
from mmkern.ops.attention import check_dropout, numbers

_NAME = "CrossAttention"

Rotary = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Multi-head attention of a query sequence to one or several sources, batch first.

    With one source it takes the state_dict of ``torch.nn.MultiheadAttention`` of the same widths, and gives the same
    output: ``in_proj_weight`` (or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``), ``in_proj_bias``,
    ``out_proj``. Each further source has the same projections of its keys and values under ``sources.0``,
    ``sources.1``, ….

    Args:
        embed_dim: E, the width of the queries and of the output.
        num_heads: Hq; E is a multiple of it.
        source_dims: the width of each source, or (of its keys, of its values); ``[E]`` by default.
        num_kv_heads: heads of keys and values, which divide ``num_heads``; as many by default.
        mode: what several sources do, "sum" or "joint" (see ``mmkern.ops.multi_source_attention``).
        qk_norm: RMS-norm of each head of queries and keys, with weights ``q_norm.weight`` and ``k_norm.weight``.
        norm_eps: added to the mean square in that norm.
        dropout: share of the attention weights that training sets to zero.
        bias: the projections have a bias.
        softcap: of the scores.
    Source: Vaswani et al. 2017, §3.2.2; several sources: Ye et al. 2023, IP-Adapter, §3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        source_dims: Sequence[int | tuple[int, int]] | None = None,
        num_kv_heads: int | None = None,
        mode: Literal["sum", "joint"] = "sum",
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = True,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", groups)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{_NAME}: {name} is {size}, expected an int of at least 1")
        if mode not in ("sum", "joint"):
            raise ValueError(f"{_NAME}: mode is {mode!r}, expected 'sum' or 'joint'")
        check_number(_NAME, "norm_eps", norm_eps, "a number of at least 0", 0.0, LARGEST)
        check_dropout(_NAME, "dropout", dropout)
        numbers(_NAME, None, None, softcap, dropout)
        if embed_dim % num_heads:
            raise ValueError(f"{_NAME}: embed_dim is {embed_dim}, expected a multiple of num_heads, {num_heads}")
        if num_heads % groups:
            raise ValueError(f"{_NAME}: num_kv_heads is {groups}, expected a divisor of num_heads, {num_heads}")
        self.source_dims = _widths([embed_dim] if source_dims is None else source_dims)
        first, *others = self.source_dims
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, groups
        self.head_dim = embed_dim // num_heads
        self.mode: Literal["sum", "joint"] = mode
        self.dropout, self.softcap = dropout, softcap
        width = groups * self.head_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.is_packed = first == (embed_dim, embed_dim) and groups == num_heads
        if self.is_packed:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **made))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **made))
            self.k_proj_weight = nn.Parameter(torch.empty(width, first[0], **made))
            self.v_proj_weight = nn.Parameter(torch.empty(width, first[1], **made))
        self.in_proj_bias = nn.Parameter(torch.empty(embed_dim + 2 * width, **made)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.sources = nn.ModuleList(_KeysAndValues(dims, width, bias, made) for dims in others)
        self.norm_eps = norm_eps
        self.q_norm = nn.RMSNorm(self.head_dim, norm_eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, norm_eps, **made) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.MultiheadAttention`` does: Xavier's uniform weights, biases of zero."""
        for name, parameter in self.named_parameters(recurse=False):
            (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(parameter)
        for source in self.sources:
            cast(_KeysAndValues, source).reset_parameters()
        if self.out_proj.bias is not None:
            nn.init.constant_(self.out_proj.bias, 0.0)

    def forward(
        self,
        query: Tensor,
        *sources: Tensor | tuple[Tensor, Tensor],
        key_padding_mask: Tensor | Sequence[Tensor | None] | None = None,
        bias: Tensor | Sequence[Tensor | None] | None = None,
        gates: Sequence[float | Tensor] | None = None,
        rotary: Rotary | None = None,
        key_rotary: Rotary | None = None,
    ) -> Tensor:
        """``out_proj(attention(query, sources))``.

        Args:
            query: ``[B, L, E]``.
            sources: for each source ``[B, S, source_dim]``, or its keys and its values; none: the query itself.
            key_padding_mask: bool ``[B, S]`` in torch.nn's sense, True = ignore; with several sources one each or None.
            bias: added to the scores, broadcastable to ``[B, Hq, L, S]``; with several sources one each or None.
            gates: weigh the sources: numbers, or tensors broadcastable to ``[B, Hq, L, 1]``.
            rotary: cos and sin ``[L, R/2]`` of the queries (see ``mmkern.ops.rotary_embedding``).
            key_rotary: cos and sin ``[S, R/2]`` of the keys of the first source.
        Returns: ``[B, L, E]``.
        Raises: TypeError or ValueError where an argument does not fit, with its name.
        """
        given = sources or (query,)
        if len(given) != 1 + len(self.sources):
            raise ValueError(f"{_NAME}: got {len(given)} sources, expected {1 + len(self.sources)}")
        _check_sequence("query", query, self.embed_dim)
        pairs = [_keys_and_values(i, *each) for i, each in enumerate(zip(given, self.source_dims, strict=True))]
        for name, angles in (("rotary", rotary), ("key_rotary", key_rotary)):
            if angles is not None and not (isinstance(angles, (tuple, list)) and len(angles) == 2):
                raise TypeError(f"{_NAME}: {name} is {type(angles).__name__}, expected (cos, sin)")
        masks = _one_each("key_padding_mask", key_padding_mask, given)
        for mask in masks:
            if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{_NAME}: key_padding_mask is {kind}, expected bool Tensors")
        biases = _one_each("bias", bias, given)
        weights = _one_each("gates", gates, given, 1.0)
        q, k, v = (self._heads(x) for x in self._project(query, *pairs[0]))
        q, k = self._place(q, k, rotary, key_rotary)
        keys_and_values = [(k, v)]
        for module, pair in zip(self.sources, pairs[1:], strict=True):
            k, v = (self._heads(x) for x in module(*pair))
            keys_and_values.append((k if self.k_norm is None else self.k_norm(k), v))
        attended = ops.multi_source_attention(
            q,
            [
                Source(k, v, gate, None if mask is None else ~mask, added)
                for (k, v), gate, mask, added in zip(keys_and_values, weights, masks, biases, strict=True)
            ],
            mode=self.mode,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values; what has one input and neighbouring weights, in one product."""
        width = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, width, width]
        weight, bias = None, self.in_proj_bias
        if self.is_packed:
            weight = self.in_proj_weight
            if query is key and key is value:
                return tuple(functional.linear(query, weight, bias).split(sizes, -1))
            if key is value:
                q_bias, bias = (None, None) if bias is None else bias.split([sizes[0], 2 * width])
                q = functional.linear(query, weight[: sizes[0]], q_bias)
                return q, *functional.linear(key, weight[sizes[0] :], bias).split(width, -1)
            weights = weight.split(sizes)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = [None] * 3 if bias is None else bias.split(sizes)
        inputs = query, key, value
        return [functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        """``[B, heads, L, D]``, a view."""
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)

    def _place(self, q: Tensor, k: Tensor, rotary: Rotary | None, key_rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Norms, then rotations; in one pass where queries and keys turn by the same angles."""
        if self.q_norm is not None and self.k_norm is not None:
            if rotary is not None and rotary is key_rotary:
                return ops.qk_norm_rotary(q, k, self.q_norm.weight, self.k_norm.weight, *rotary, eps=self.norm_eps)
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q = ops.rotary_embedding(q, *rotary)
        if key_rotary is not None:
            k = ops.rotary_embedding(k, *key_rotary)
        return q, k


class _KeysAndValues(nn.Module):
    """The projections of one more source."""

    def __init__(self, dims: tuple[int, int], width: int, bias: bool, made: dict[str, Any]) -> None:
        super().__init__()
        self.k_proj_weight = nn.Parameter(torch.empty(width, dims[0], **made))
        self.v_proj_weight = nn.Parameter(torch.empty(width, dims[1], **made))
        self.in_proj_bias = nn.Parameter(torch.empty(2 * width, **made)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.k_proj_weight)
        nn.init.xavier_uniform_(self.v_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k_bias, v_bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(2)
        return functional.linear(key, self.k_proj_weight, k_bias), functional.linear(value, self.v_proj_weight, v_bias)


def _widths(source_dims: Any) -> list[tuple[int, int]]:
    """Of the keys and the values of each source."""
    expected = "expected a sequence of widths, or pairs of widths, of at least one source"
    if not isinstance(source_dims, (list, tuple)) or not source_dims:
        raise ValueError(f"{_NAME}: source_dims is {source_dims}, {expected}")
    pairs = [tuple(dims) if isinstance(dims, (list, tuple)) else (dims, dims) for dims in source_dims]
    if not all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs):
        raise ValueError(f"{_NAME}: source_dims is {source_dims}, {expected}")
    return cast(list[tuple[int, int]], pairs)


def _keys_and_values(i: int, source: Any, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    pair = (source, source) if isinstance(source, Tensor) else source
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        kind = type(source).__name__
        raise TypeError(f"{_NAME}: sources[{i}] is {kind}, expected a Tensor, or its keys and its values")
    for name, x, width in zip(("keys", "values"), pair, widths, strict=True):
        _check_sequence(f"sources[{i}], its {name},", x, width)
    return pair[0], pair[1]


def _check_sequence(name: str, x: Any, width: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_NAME}: {name} is {type(x).__name__}, expected a Tensor")
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"{_NAME}: {name} has shape {list(x.shape)}, expected [batch, length, {width}]")


def _one_each(name: str, given: Any, sources: Sequence[Any], otherwise: Any = None) -> Sequence[Any]:
    """A value for each source, from one of them, or a sequence of all."""
    if given is None:
        return [otherwise] * len(sources)
    if not isinstance(given, (list, tuple)):
        given = [given]
    if len(given) != len(sources):
        raise ValueError(f"{_NAME}: {name} has {len(given)} entries, expected {len(sources)}, one for each source")
    return given  # type: ignore[no-any-return]
