"""mmkern.nn's norms and modulation beside those of torch and diffusers: the same state_dict, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern.nn import AdaLayerNormContinuous, AdaLayerNormZero, FiLM, GroupNormAct, RMSNorm

normalization = pytest.importorskip("diffusers.models.normalization")
from tests import modules  # noqa: E402

B, L, C, D = 3, 5, 24, 10


def randn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class GroupNormThenAct(nn.GroupNorm):
    """Step by step."""

    def __init__(self, *args: Any, act: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = super().forward(x)
        if scale_shift is not None:
            scale, shift = (m.reshape(*x.shape[:2], *[1] * (x.dim() - 2)) for m in scale_shift)
            y = y * (1 + scale) + shift
        return self.act(y)


class Modulated(GroupNormThenAct):
    """Scale and shift are arguments, so that they have gradients."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, (scale, shift))


class ModulatedAct(GroupNormAct):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, (scale, shift))


class PlainFiLM(nn.Module):
    """As the paper has it."""

    def __init__(self, offset: float, act: Callable[[Tensor], Tensor], channels_first: bool, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 2 * C, bias)
        self.offset, self.act, self.channels_first = offset, act, channels_first

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.linear(condition).split(C, -1)
        if condition.dim() == 2:
            shape = (B, C, *[1] * (x.dim() - 2)) if self.channels_first else (B, *[1] * (x.dim() - 2), C)
            gamma, beta = gamma.reshape(shape), beta.reshape(shape)
        return self.act((self.offset + gamma) * x + beta)


class NormOfSum(nn.RMSNorm):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + residual), x + residual


def unchanged(y: Tensor) -> Tensor:
    return y


@dataclass
class Pair:
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    inputs: dict[str, Any]


ROWS = randn(B, L, C)
IMAGE = randn(B, C, 4, 3)
TIMES = {"timestep": torch.tensor([3, 999, 0]), "class_labels": torch.tensor([4, 0, 2])}

PAIRS = {
    "RMSNorm": Pair(lambda: RMSNorm(C, 1e-6), lambda: nn.RMSNorm(C, 1e-6), {"x": ROWS}),
    "RMSNorm, no weight": Pair(lambda: RMSNorm([C], 1e-6, False), lambda: nn.RMSNorm([C], 1e-6, False), {"x": ROWS}),
    "RMSNorm of a sum": Pair(
        lambda: RMSNorm(C, 1e-6), lambda: NormOfSum(C, 1e-6), {"x": ROWS, "residual": randn(B, L, C, seed=1)}
    ),
    "RMSNorm of diffusers": Pair(
        lambda: RMSNorm(C, 1e-6), lambda: normalization.RMSNorm(C, 1e-6), {"hidden_states": ROWS}
    ),
    "GroupNormAct": Pair(lambda: GroupNormAct(4, C), lambda: GroupNormThenAct(4, C, act=functional.silu), {"x": IMAGE}),
    "GroupNormAct, no act": Pair(lambda: GroupNormAct(3, C, act=None), lambda: nn.GroupNorm(3, C), {"input": IMAGE}),
    "GroupNormAct, not affine": Pair(
        lambda: GroupNormAct(4, C, 1e-5, False, act="gelu_tanh"),
        lambda: GroupNormThenAct(4, C, 1e-5, False, act=lambda y: functional.gelu(y, approximate="tanh")),
        {"x": randn(B, C, 7)},
    ),
    "GroupNormAct, scaled and shifted": Pair(
        lambda: ModulatedAct(4, C, act="relu"),
        lambda: Modulated(4, C, act=torch.relu),
        {"x": IMAGE, "scale": randn(B, C, seed=1), "shift": randn(B, C, 1, 1, seed=2)},
    ),
    "FiLM": Pair(
        lambda: FiLM(D, C), lambda: PlainFiLM(1.0, unchanged, False), {"x": ROWS, "condition": randn(B, D, seed=1)}
    ),
    "FiLM of each row": Pair(
        lambda: FiLM(D, C, gamma_offset=0.0, activation="gelu", bias=False),
        lambda: PlainFiLM(0.0, functional.gelu, False, bias=False),
        {"x": ROWS, "condition": randn(B, L, D, seed=1)},
    ),
    "FiLM of an image": Pair(
        lambda: FiLM(D, C, activation="silu", channels_first=True),
        lambda: PlainFiLM(1.0, functional.silu, True),
        {"x": IMAGE, "condition": randn(B, D, seed=1)},
    ),
    "AdaLayerNormZero": Pair(
        lambda: AdaLayerNormZero(C),
        lambda: normalization.AdaLayerNormZero(C),
        {"x": ROWS, "emb": randn(B, C, seed=1)},
    ),
    "AdaLayerNormZero, fp32, no bias": Pair(
        lambda: AdaLayerNormZero(C, None, "fp32_layer_norm", False),
        lambda: normalization.AdaLayerNormZero(C, None, "layer_norm", False),
        {"x": ROWS, "emb": randn(B, C, seed=1)},
    ),
    "AdaLayerNormZero, its own embedding": Pair(
        lambda: AdaLayerNormZero(C, 5),
        lambda: normalization.AdaLayerNormZero(C, 5),
        {"x": ROWS, **TIMES, "hidden_dtype": torch.float64},
    ),
    "AdaLayerNormContinuous": Pair(
        lambda: AdaLayerNormContinuous(C, D),
        lambda: normalization.AdaLayerNormContinuous(C, D),
        {"x": ROWS, "conditioning_embedding": randn(B, D, seed=1)},
    ),
    "AdaLayerNormContinuous, no bias": Pair(
        lambda: AdaLayerNormContinuous(C, D, bias=False),
        lambda: normalization.AdaLayerNormContinuous(C, D, bias=False),
        {"x": ROWS, "conditioning_embedding": randn(B, D, seed=1)},
    ),
    "AdaLayerNormContinuous, not affine": Pair(
        lambda: AdaLayerNormContinuous(C, D, False, 1e-6),
        lambda: normalization.AdaLayerNormContinuous(C, D, False, 1e-6),
        {"x": ROWS, "conditioning_embedding": randn(B, D, seed=1)},
    ),
    "AdaLayerNormContinuous, rms": Pair(
        lambda: AdaLayerNormContinuous(C, D, norm_type="rms_norm"),
        lambda: normalization.AdaLayerNormContinuous(C, D, norm_type="rms_norm"),
        {"x": ROWS, "conditioning_embedding": randn(B, D, seed=1)},
    ),
}


def made(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Ours, theirs with the same numbers, and the inputs of both."""
    pair = PAIRS[name]
    theirs = pair.theirs()
    ours = pair.ours()
    of_ours, of_theirs = ([m for m in module.modules() if hasattr(m, "eps")] for module in (ours, theirs))
    assert [norm.eps for norm in of_ours] == [norm.eps for norm in of_theirs]
    modules.set_apart(theirs)
    for a, b in zip(of_ours, of_theirs, strict=True):
        a.eps = b.eps
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, pair.inputs


@pytest.mark.parametrize("name", PAIRS)
def test_takes_and_gives_the_same_state_dict(name: str) -> None:
    ours, theirs = PAIRS[name].ours(), PAIRS[name].theirs()
    modules.set_apart(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("name", PAIRS)
def test_starts_with_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    ours = PAIRS[name].ours().state_dict()
    torch.manual_seed(0)
    theirs = PAIRS[name].theirs().state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value)


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_module_it_replaces(name: str) -> None:
    modules.check_same(*made(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_numerics_contract(name: str, dtype: torch.dtype) -> None:
    modules.check_contract(*made(name), dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_calls_one_op(name: str) -> None:
    ours, _, inputs = made(name)
    with modules.called_ops() as calls:
        modules.outputs_and_gradients(ours.double(), inputs)
    assert len([op for op, _ in calls if op != "timestep_embedding"]) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_compiles_whole(name: str) -> None:
    ours, _, inputs = made(name)
    ours, inputs = ours.eval(), modules.in_dtype(inputs, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = (modules.outputs_and_gradients(module, inputs) for module in (compiled, ours))
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(found[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_autocast_keeps_the_dtype_of_x(name: str) -> None:
    """Products come in bfloat16, and what they modulate stays as it came."""
    ours, _, inputs = made(name)
    inputs = modules.in_dtype(inputs, torch.float32)
    x, others = next(iter(inputs.values())), dict(list(inputs.items())[1:])
    expected = ours(x, **others)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x, **others)
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
    assert found[0].dtype == x.dtype
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_adds_the_epsilon_of_torch(dtype: torch.dtype) -> None:
    x = (1e-4 * ROWS).to(dtype)
    torch.testing.assert_close(RMSNorm(C, dtype=dtype)(x), nn.RMSNorm(C, dtype=dtype)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_takes_the_weights_of_gemma(dtype: torch.dtype) -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    ours, theirs = RMSNorm(C, 1e-6, weight_offset=1.0, dtype=dtype), gemma.GemmaRMSNorm(C, 1e-6).to(dtype)
    assert torch.equal(ours.weight, theirs.weight)
    modules.set_apart(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours.eps = theirs.eps
    torch.testing.assert_close(ours(ROWS.to(dtype)), theirs(ROWS.to(dtype)))


def test_labels_are_dropped_in_training_alone() -> None:
    """The same ones as diffusers drops: those of the same random numbers."""
    ours, theirs, _ = made("AdaLayerNormZero, its own embedding")
    many = {
        "x": randn(40, 1, C).float(),
        "timestep": torch.zeros(40),
        "class_labels": torch.zeros(40, dtype=torch.int64),
    }
    for is_training in (True, False):
        found, expected = (
            modules.outputs_and_gradients(module.train(is_training), many)[0][1] for module in (ours, theirs)
        )
        torch.testing.assert_close(found, expected)
        assert len(found.unique(dim=0)) == 1 + is_training


def test_the_embedding_is_in_the_dtype_that_is_asked_for() -> None:
    ours, theirs, _ = made("AdaLayerNormZero, its own embedding")
    x = ROWS.bfloat16()
    for module in (ours, theirs):
        module.bfloat16().eval()
    found = ours(x, **TIMES, hidden_dtype=torch.bfloat16)
    assert all(out.dtype == torch.bfloat16 for out in found)
    for a, b, c in zip(found, theirs(x, **TIMES, hidden_dtype=torch.bfloat16), ours(x, **TIMES), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize(
    "module",
    [
        lambda **made: RMSNorm(C, **made),
        lambda **made: GroupNormAct(4, C, **made),
        lambda **made: FiLM(D, C, **made),
        lambda **made: AdaLayerNormZero(C, 5, **made),
        lambda **made: AdaLayerNormContinuous(C, D, **made),
        lambda **made: AdaLayerNormContinuous(C, D, norm_type="rms_norm", **made),
    ],
    ids=["RMSNorm", "GroupNormAct", "FiLM", "AdaLayerNormZero", "AdaLayerNormContinuous", "rms"],
)
def test_is_made_where_and_of_what_is_asked(module: Callable[..., nn.Module]) -> None:
    parameters = list(module(device="meta", dtype=torch.bfloat16).parameters())
    assert parameters
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"RMSNorm: normalized_shape is \(2, 3\), expected an int of at least 1", lambda: RMSNorm((2, 3))),  # type: ignore[arg-type]
        ("RMSNorm: normalized_shape is 0, expected an int", lambda: RMSNorm([0])),
        ("RMSNorm: eps is -1.0, expected a number of at least 0", lambda: RMSNorm(C, -1.0)),
        ("RMSNorm: weight_offset is str, expected a finite number", lambda: RMSNorm(C, weight_offset="1")),  # type: ignore[arg-type]
        (r"RMSNorm: x has shape \[2, 3\], expected \[..., 24\]", lambda: RMSNorm(C, None, False)(torch.ones(2, 3))),
        ("RMSNorm: x is list, expected a Tensor", lambda: RMSNorm(C)([1.0])),
        ("RMSNorm: x has dtype torch.int64, expected a floating dtype", lambda: RMSNorm(1)(torch.arange(1))),
        ("GroupNormAct: num_groups is 5, expected a divisor of num_channels, 24", lambda: GroupNormAct(5, C)),
        ("GroupNormAct: num_channels is 2.0, expected an int", lambda: GroupNormAct(1, 2.0)),  # type: ignore[arg-type]
        ("GroupNormAct: eps is NoneType, expected a number", lambda: GroupNormAct(1, 2, None)),  # type: ignore[arg-type]
        ("GroupNormAct: act is 'mish', expected None, 'silu'", lambda: GroupNormAct(1, 2, act="mish")),  # type: ignore[arg-type]
        (
            r"GroupNormAct: x has shape \[3, 5\], expected \[batch, 24, ...\]",
            lambda: GroupNormAct(4, C)(torch.ones(3, 5)),
        ),
        (r"GroupNormAct: x has shape \[24\], expected \[batch, 24", lambda: GroupNormAct(4, C)(torch.ones(C))),
        (
            "group_norm_act: scale has shape",
            lambda: GroupNormAct(4, C)(torch.ones(2, C), (torch.ones(2, 3), torch.ones(2, C))),
        ),
        ("FiLM: condition_dim is None, expected an int", lambda: FiLM(None, C)),  # type: ignore[arg-type]
        ("FiLM: gamma_offset is nan, expected a finite number", lambda: FiLM(D, C, gamma_offset=float("nan"))),
        ("FiLM: activation is 'tanh', expected None, 'silu'", lambda: FiLM(D, C, activation="tanh")),  # type: ignore[arg-type]
        (
            r"FiLM: x has shape \[3, 24, 5\], expected \[..., 24\]",
            lambda: FiLM(D, C)(torch.ones(3, C, 5), torch.ones(3, D)),
        ),
        (
            r"FiLM: condition has shape \[3, 9\], expected \[..., 10\]",
            lambda: FiLM(D, C)(torch.ones(3, C), torch.ones(3, 9)),
        ),
        (
            r"FiLM: condition has shape \[3, 5, 10\], expected \[3, 10\]",
            lambda: FiLM(D, C, channels_first=True)(torch.ones(3, C, 5), torch.ones(3, 5, D)),
        ),
        ("film: gamma has shape", lambda: FiLM(D, C)(torch.ones(3, 5, C), torch.ones(2, D))),
        ("AdaLayerNormZero: embedding_dim is -1, expected an int", lambda: AdaLayerNormZero(-1)),
        ("AdaLayerNormZero: num_embeddings is 0, expected an int", lambda: AdaLayerNormZero(C, 0)),
        ("AdaLayerNormZero: norm_type is 'rms_norm', expected", lambda: AdaLayerNormZero(C, None, "rms_norm")),
        ("AdaLayerNormZero: emb is NoneType, expected a Tensor", lambda: AdaLayerNormZero(C)(ROWS)),
        (
            r"AdaLayerNormZero: emb has shape \[3, 10\], expected \[..., 24\]",
            lambda: AdaLayerNormZero(C)(ROWS, emb=torch.ones(3, D)),
        ),
        ("AdaLayerNormZero: timestep is NoneType, expected", lambda: AdaLayerNormZero(C, 5)(ROWS)),
        (
            "AdaLayerNormZero: class_labels is int, expected a Tensor",
            lambda: AdaLayerNormZero(C, 5)(ROWS, torch.ones(3), 3),  # type: ignore[arg-type]
        ),
        ("AdaLayerNormContinuous: conditioning_embedding_dim is 0", lambda: AdaLayerNormContinuous(C, 0)),
        ("AdaLayerNormContinuous: eps is -1, expected", lambda: AdaLayerNormContinuous(C, D, eps=-1)),
        ("AdaLayerNormContinuous: norm_type is 'x', expected", lambda: AdaLayerNormContinuous(C, D, norm_type="x")),  # type: ignore[arg-type]
        (
            r"AdaLayerNormContinuous: conditioning_embedding has shape \[3, 24\], expected \[..., 10\]",
            lambda: AdaLayerNormContinuous(C, D)(ROWS, torch.ones(3, C)),
        ),
        (r"ada_layer_norm: scale has shape", lambda: AdaLayerNormContinuous(C, D)(ROWS.float(), torch.ones(2, D))),
    ],
)
def test_bad_input(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
