"""mmkern.nn beside torch.nn: the same state_dict, outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkern import ops
from mmkern.nn import CrossAttention

E, HEADS, D = 24, 4, 6
Rotary = tuple[Tensor, Tensor]


def randn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**dims: int) -> tuple[CrossAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64, **dims)
    source = (dims.get("kdim", E), dims.get("vdim", E))
    ours = CrossAttention(E, HEADS, source_dims=[source], dtype=torch.float64)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


QUERY, TEXT = randn(2, 5, E), randn(2, 7, E, seed=1)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@pytest.mark.parametrize(
    ("inputs", "dims"),
    [
        ((QUERY, QUERY, QUERY), {}),
        ((QUERY, TEXT, TEXT), {}),
        ((QUERY, TEXT, TEXT + 1), {}),
        ((QUERY, randn(2, 7, 10, seed=2), randn(2, 7, 14, seed=3)), {"kdim": 10, "vdim": 14}),
    ],
    ids=["self", "cross", "key and value", "widths"],
)
def test_equals_multihead_attention(inputs: tuple[Tensor, Tensor, Tensor], dims: dict[str, int]) -> None:
    ours, theirs = pair(**dims)
    query, key, value = inputs
    source = () if query is key else (key,) if key is value else ((key, value),)
    padding = None if query is key else PADDING
    found = ours(query, *source, key_padding_mask=padding)
    wanted = theirs(query, key, value, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = randn(*wanted.shape, seed=4)
    gradients = zip(
        torch.autograd.grad(found, list(ours.parameters()), grad),
        torch.autograd.grad(wanted, list(theirs.parameters()), grad),
        strict=True,
    )
    for a, b in gradients:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_starts_as_multihead_attention_does() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(E, HEADS)
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS)
    for name, parameter in theirs.named_parameters():
        found = ours.state_dict()[name]
        assert found.shape == parameter.shape
        assert found.std() == pytest.approx(parameter.std().item(), rel=0.15)


def reference(
    module: CrossAttention, query: Tensor, sources: list[Tensor], gates: list[Any], rotary: Rotary | None
) -> Tensor:
    """Two sources and grouped heads, step by step."""
    bias = module.in_proj_bias
    group, width = module.num_heads // module.num_kv_heads, module.num_kv_heads * D

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    q = rms(heads(query @ module.q_proj_weight.T + bias[:E]), module.q_norm)
    if rotary is not None:
        first, second = q.chunk(2, -1)
        cos, sin = rotary
        q = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    extra = module.sources[0]
    projections = [
        (module.k_proj_weight, module.v_proj_weight, bias[E:]),
        (extra.k_proj_weight, extra.v_proj_weight, extra.in_proj_bias),
    ]
    scores, values = [], []
    for x, (k_weight, v_weight, both) in zip(sources, projections, strict=True):
        k = rms(heads(x @ k_weight.T + both[:width]), module.k_norm).repeat_interleave(group, 1)
        scores.append(q @ k.mT / D**0.5)
        values.append(heads(x @ v_weight.T + both[width:]).repeat_interleave(group, 1))
    if module.mode == "joint":
        weights = torch.cat(scores, -1).softmax(-1).split([x.shape[1] for x in sources], -1)
    else:
        weights = [s.softmax(-1) for s in scores]
    out = sum(g * (w @ v) for g, w, v in zip(gates, weights, values, strict=True))
    return module.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", ["sum", "joint"])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_two_sources(mode: Any, is_rotated: bool) -> None:
    torch.manual_seed(0)
    module = CrossAttention(
        E, HEADS, source_dims=[10, 14], num_kv_heads=2, mode=mode, qk_norm=True, dtype=torch.float64
    )
    nn.init.normal_(module.q_norm.weight)
    nn.init.normal_(module.in_proj_bias)
    sources = [randn(2, 7, 10, seed=1), randn(2, 3, 14, seed=2)]
    gates = [1.0, randn(HEADS, 1, 1, seed=3).requires_grad_()]
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] / torch.tensor([1.0, 7.0, 50.0])
    rotary = (angles.cos(), angles.sin()) if is_rotated else None
    found = module(QUERY, *sources, gates=gates, rotary=rotary)
    wanted = reference(module, QUERY, sources, gates, rotary)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    leaves = [*module.parameters(), gates[1]]
    grad = randn(*wanted.shape, seed=4)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_shared", [True, False], ids=["one rotary", "two of one kind"])
def test_queries_and_keys_turn_alike(is_shared: bool) -> None:
    """Scores know distances alone: all places moved by one number change nothing, those of the keys alone do."""
    torch.manual_seed(0)
    module = CrossAttention(E, HEADS, qk_norm=True, dtype=torch.float64)
    nn.init.normal_(module.q_norm.weight)
    nn.init.normal_(module.k_norm.weight)

    def rotary(first: int) -> Rotary:
        angles = torch.arange(first, first + 5, dtype=torch.float64)[:, None] / torch.tensor([1.0, 7.0, 50.0])
        return angles.cos(), angles.sin()

    def run(first: int, key_first: int) -> Tensor:
        given = rotary(first)
        return module(QUERY, rotary=given, key_rotary=given if is_shared else rotary(key_first))

    torch.testing.assert_close(run(0, 0), run(9, 9), rtol=1e-11, atol=1e-11)
    unturned = module(QUERY)
    assert (run(0, 0) - unturned).abs().max() > 1e-3
    wanted = module(QUERY, rotary=rotary(0), key_rotary=rotary(0))
    torch.testing.assert_close(run(0, 0), wanted, rtol=1e-11, atol=1e-11)
    if not is_shared:
        assert (run(0, 0) - run(0, 9)).abs().max() > 1e-3


def test_compiles_whole() -> None:
    module = CrossAttention(E, HEADS, source_dims=[E, E]).eval()
    query, text, image = (x.float() for x in (QUERY, TEXT, TEXT + 1))
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(query, text, image, gates=[1.0, 0.5])
    torch.testing.assert_close(found, module(query, text, image, gates=[1.0, 0.5]))


def test_dropout_only_in_training() -> None:
    module = CrossAttention(E, HEADS, dropout=0.5, dtype=torch.float64)
    assert not torch.equal(module(QUERY), module(QUERY))
    module.eval()
    assert torch.equal(module(QUERY), module(QUERY))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("embed_dim is 24, expected a multiple of num_heads, 5", lambda: CrossAttention(24, 5)),
        ("num_kv_heads is 3, expected a divisor of num_heads, 4", lambda: CrossAttention(24, 4, num_kv_heads=3)),
        ("got 2 sources, expected 1", lambda: CrossAttention(E, HEADS)(QUERY, QUERY, QUERY)),
        (
            "gates has 1 entries, expected 2",
            lambda: CrossAttention(E, HEADS, source_dims=[E, E])(QUERY, QUERY, QUERY, gates=[1.0]),
        ),
        ("num_heads is 0, expected an int", lambda: CrossAttention(E, 0)),
        ("mode is 'x', expected 'sum' or 'joint'", lambda: CrossAttention(E, HEADS, mode="x")),  # type: ignore[arg-type]
        ("source_dims is 32, expected a sequence", lambda: CrossAttention(E, HEADS, source_dims=32)),  # type: ignore[arg-type]
        ("dropout is 2.0, expected a number in", lambda: CrossAttention(E, HEADS, dropout=2.0)),
        ("query has shape", lambda: CrossAttention(E, HEADS)(QUERY[..., 1:])),
        (r"sources\[0\], its keys, has shape", lambda: CrossAttention(E, HEADS)(QUERY, QUERY[..., 1:])),
        (r"sources\[0\] is list, expected a Tensor", lambda: CrossAttention(E, HEADS)(QUERY, [QUERY])),
        (
            "key_padding_mask is torch.float32, expected bool",
            lambda: CrossAttention(E, HEADS)(QUERY, key_padding_mask=torch.zeros(2, 5)),
        ),
        ("rotary is Tensor, expected .cos, sin.", lambda: CrossAttention(E, HEADS)(QUERY, rotary=torch.zeros(5, 2))),
    ],
)
def test_bad_input(message: str, call: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"CrossAttention: {message}"):
        call()


# ---- multi_source_attention ------------------------------------------------------------------------------------------


def test_dropout_of_sources_differs_and_replays() -> None:
    q, k, v = randn(1, 2, 3, 8), randn(1, 2, 6, 8, seed=1), randn(1, 2, 6, 8, seed=2)
    same = [ops.Source(k, v), ops.Source(k, v, gate=-1.0)]
    difference = ops.multi_source_attention(q, same, dropout_p=0.5, seed=3)
    assert difference.abs().max() > 0.1
    assert torch.equal(difference, ops.multi_source_attention(q, same, dropout_p=0.5, seed=3))
    alone = [ops.cross_attention(q, k, v, dropout_p=0.5, seed=3, offset=offset) for offset in (0, 2 * 3 * 2)]
    torch.testing.assert_close(difference, alone[0] - alone[1])


def test_a_source_that_is_hidden_adds_nothing() -> None:
    q, k, v = randn(2, 2, 3, 8), randn(2, 2, 6, 8, seed=1), randn(2, 2, 6, 8, seed=2)
    hidden = ops.Source(k + 1, v, key_mask=torch.zeros(2, 6, dtype=torch.bool))
    for mode in ("sum", "joint"):
        found = ops.multi_source_attention(q, [ops.Source(k, v), hidden], mode=mode)
        torch.testing.assert_close(found, ops.cross_attention(q, k, v))


@pytest.mark.parametrize(
    ("error", "message", "sources", "options"),
    [
        (ValueError, "mode is 'both', expected 'sum' or 'joint'", [0], {"mode": "both"}),
        (ValueError, "sources is empty", [], {}),
        (TypeError, r"sources\[0\] is int, expected a Source", [0], {}),
        (
            TypeError,
            r"sources\[1\].k is NoneType, expected a Tensor",
            [ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 4)), ops.Source(None, randn(1, 1, 2, 4))],
            {},
        ),
        (
            ValueError,
            r"sources\[0\]: k has shape",
            [ops.Source(randn(1, 1, 2, 3), randn(1, 1, 2, 3))],
            {},
        ),
        (TypeError, "sources is dict, expected a sequence of Source", {}, {}),
        (
            TypeError,
            r"sources\[0\].gate is NoneType, expected a number",
            [ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 4), gate=None)],  # type: ignore[arg-type]
            {},
        ),
        (
            TypeError,
            r"sources\[0\].gate is str",
            [ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 4), gate="1")],
            {},
        ),
        (
            ValueError,
            r"sources\[0\].gate has shape \[4\], expected to broadcast to \[1, 2, 3, 1\]",
            [ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 4), gate=torch.ones(4))],
            {},
        ),
        (
            ValueError,
            r"sources\[1\].v has 5 channels, expected 4 as sources\[0\]",
            [ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 4)), ops.Source(randn(1, 1, 2, 4), randn(1, 1, 2, 5))],
            {},
        ),
    ],
)
def test_bad_sources(error: type[Exception], message: str, sources: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"multi_source_attention: {message}"):
        ops.multi_source_attention(randn(1, 2, 3, 4), sources, **options)
