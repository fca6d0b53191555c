"""Models of diffusers with the modules of mmkern: the same parameters, outputs and gradients, in fewer passes."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models import activations, attention, embeddings, normalization, resnet  # noqa: E402

from mmkern.integrations import diffusers_modules  # noqa: E402
from mmkern.integrations.diffusers import accelerate_model  # noqa: E402
from tests import modules  # noqa: E402

B, L, C = 2, 5, 16
UNet = diffusers.UNet2DConditionModel


def randn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """So small are these models that threads would only wait for each other."""
    torch.set_num_threads(1)


# ---- Models ----------------------------------------------------------------------------------------------------------


def dit(num_layers: int = 2, **config: Any) -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": num_layers, "num_embeds_ada_norm": 10}
    shapes = {"in_channels": 3, "out_channels": 6, "sample_size": 8, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(**sizes, **shapes, attention_bias=True, **config)  # type: ignore[no-any-return]


def unet(cls: type = UNet, attends: bool = True, **config: Any) -> nn.Module:
    kind = ("Cross" if cls is UNet else "") + "Attn"
    down, up = (f"{kind}DownBlock2D", f"{kind}UpBlock2D") if attends else ("DownBlock2D", "UpBlock2D")
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, C), "norm_num_groups": 4}
    blocks = {"down_block_types": (down, "DownBlock2D"), "up_block_types": ("UpBlock2D", up), "layers_per_block": 1}
    if cls is UNet:
        blocks |= {} if attends else {"mid_block_type": None}
        sizes |= {"cross_attention_dim": 12}
    return cls(**sizes, **blocks, attention_head_dim=4, **config)


IMAGES = randn(B, 3, 8, 8)
OF_CLASSES = {"hidden_states": IMAGES, "timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 2])}
OF_TEXT = {
    "sample": IMAGES,
    "timestep": torch.tensor([3, 500]),
    "encoder_hidden_states": randn(B, L, 12, seed=1),
    "encoder_attention_mask": torch.tensor([[True] * 5, [True, False, True, True, False]]),
}
ALONE = {"sample": IMAGES, "timestep": 7}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dit": (dit, OF_CLASSES),
    "dit, geglu": (lambda: dit(activation_fn="geglu", norm_elementwise_affine=True), OF_CLASSES),
    "unet": (unet, OF_TEXT),
    "unet, scale_shift": (lambda: unet(resnet_time_scale_shift="scale_shift"), OF_TEXT),
    "unet without text": (lambda: unet(attends=False), ALONE | {"encoder_hidden_states": None}),
    "unet of one input": (lambda: unet(diffusers.UNet2DModel), ALONE),
}


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = modules.set_apart(make())
    return accelerate_model(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model_of_diffusers(name: str) -> None:
    make, inputs = MODELS[name]
    modules.check_same(*both(make), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_numerics_contract(name: str, dtype: torch.dtype) -> None:
    make, inputs = MODELS[name]
    modules.check_contract_on_average(*both(make), inputs, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_each_norm_is_one_call(name: str) -> None:
    make, inputs = MODELS[name]
    ours, theirs = both(make)
    with modules.called_ops() as calls:
        modules.outputs_and_gradients(ours.double(), inputs)
    counts = Counter(op for op, _ in calls)
    kinds = Counter(type(module) for module in theirs.modules())
    resnets, blocks = kinds[resnet.ResnetBlock2D], kinds[attention.BasicTransformerBlock]
    is_dit = isinstance(theirs, diffusers.DiTTransformer2DModel)
    assert counts["group_norm_act"] == kinds[nn.GroupNorm]
    assert counts["ada_layer_norm"] == blocks + is_dit
    assert counts["residual_ada_layer_norm"] == blocks * (1 if is_dit else 2)
    assert counts["gated_activation"] == kinds[activations.GEGLU]
    assert counts["affine_activation"] == kinds[activations.GELU] + blocks * is_dit
    assert counts["timestep_embedding"] == kinds[embeddings.Timesteps] + is_dit
    norms = [args for op, args in calls if op == "group_norm_act"]
    has_scale = not is_dit and theirs.config.resnet_time_scale_shift == "scale_shift"
    assert sum(args["activation"] == 1 for args in norms) == 2 * resnets + (resnets > 0)
    assert sum(args["scale"] is not None for args in norms) == resnets * has_scale
    adaptive = [args for op, args in calls if op == "residual_ada_layer_norm"]
    assert all((args["gate"] is not None) == (args["scale"] is not None) == is_dit for args in adaptive)


@pytest.mark.parametrize("name", MODELS)
def test_keeps_parameters_and_their_names(name: str) -> None:
    theirs = MODELS[name][0]()
    ours = copy.deepcopy(theirs)
    before, keys = dict(ours.named_parameters()), list(ours.state_dict())
    inside = [type(module).__name__ for module in ours.modules() if not isinstance(module, nn.SiLU | nn.Identity)]
    assert accelerate_model(ours) is ours
    assert list(ours.state_dict()) == keys
    for key, parameter in ours.named_parameters():
        assert parameter is before[key]
    assert [type(m).__name__ for m in ours.modules() if not isinstance(m, nn.SiLU | nn.Identity)] == inside
    modules.set_apart(theirs)
    ours.load_state_dict(theirs.state_dict())
    MODELS[name][0]().load_state_dict(ours.state_dict())


def short_unet() -> nn.Module:
    one = {"down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4}
    shift = {"resnet_time_scale_shift": "scale_shift"}
    return UNet(**one, **sizes, **shift, layers_per_block=1, cross_attention_dim=12, attention_head_dim=4)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "inputs"), [(lambda: dit(num_layers=1), OF_CLASSES), (short_unet, OF_TEXT)], ids=["dit", "unet"]
)
def test_compiles_whole(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> None:
    ours, inputs = both(make)[0].eval(), modules.in_dtype(inputs, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = (modules.outputs_and_gradients(module, inputs) for module in (compiled, ours))
    torch.testing.assert_close(found[0], expected[0])
    for (key, a), b in zip(found[1].items(), expected[1].values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "dit, geglu", "unet", "unet, scale_shift"])
def test_autocast(name: str) -> None:
    def run(module: nn.Module, inputs: dict[str, Any]) -> Any:
        is_exact = next(module.parameters()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_exact):
            outs, gradients = modules.outputs_and_gradients(module, inputs)
        return outs, gradients

    make, inputs = MODELS[name]
    ours, theirs = both(make)
    dtypes = [run(module, modules.in_dtype(inputs, torch.float32))[0][0].dtype for module in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    modules.check_contract_on_average(ours, theirs, inputs, torch.float32, run)


def test_checkpointing_changes_nothing() -> None:
    make, inputs = MODELS["dit"]
    ours, _ = both(make)
    ours, inputs = ours.double().train(), modules.in_dtype(inputs, torch.float64)
    expected = modules.outputs_and_gradients(ours, inputs)
    ours.enable_gradient_checkpointing()
    found = modules.outputs_and_gradients(ours, inputs)
    torch.testing.assert_close(found, expected)


def test_labels_and_features_are_dropped_as_before() -> None:
    ours, theirs = both(lambda: dit(dropout=0.3))
    modules.check_same(ours.train(), theirs.train(), OF_CLASSES)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_copies_and_files_keep_it(name: str) -> None:
    make, inputs = MODELS[name]
    ours, _ = both(make)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False), accelerate_model(ours)):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        modules.check_same(other, ours, inputs)


# ---- Blocks and modules ----------------------------------------------------------------------------------------------


def block(**config: Any) -> nn.Module:
    return attention.BasicTransformerBlock(C, 2, 8, **config)


def resnet_block(**config: Any) -> nn.Module:
    return resnet.ResnetBlock2D(**{"in_channels": 8, "temb_channels": 12, "groups": 4} | config)


ROWS = randn(B, L, C)
TEXT = randn(B, 3, 12, seed=1)
MASKS = {"attention_mask": randn(B, 1, L, seed=2), "encoder_attention_mask": randn(B, 1, 3, seed=3)}
PICTURES = {"input_tensor": randn(B, 8, 4, 6), "temb": randn(B, 12, seed=1)}
EMBEDDED = {"x": ROWS, "conditioning_embedding": randn(B, 12, seed=1)}
ZERO = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10}
OF_STEP = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 2])}

PARTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "cross-attention": (
        lambda: block(cross_attention_dim=12),
        {"hidden_states": ROWS, "encoder_hidden_states": TEXT, **MASKS},
    ),
    "cross-attention alone": (
        lambda: block(cross_attention_dim=12, only_cross_attention=True),
        {"hidden_states": ROWS, "encoder_hidden_states": TEXT, "encoder_attention_mask": randn(B, 1, 3, seed=3)},
    ),
    "pictures": (lambda: block(), {"hidden_states": randn(B, C, 3, C)}),
    "self-attention twice": (lambda: block(double_self_attention=True, final_dropout=True), {"hidden_states": ROWS}),
    "swiglu": (lambda: block(activation_fn="swiglu", ff_bias=False), {"hidden_states": ROWS}),
    "gelu without bias": (lambda: block(activation_fn="gelu", ff_bias=False), {"hidden_states": ROWS}),
    "gelu": (lambda: block(activation_fn="gelu"), {"hidden_states": ROWS}),
    "ada_norm_zero and cross-attention": (
        lambda: block(cross_attention_dim=12, **ZERO),
        {"hidden_states": ROWS, "encoder_hidden_states": TEXT, **OF_STEP},
    ),
    "ada_norm_continuous": (
        lambda: block(
            norm_type="ada_norm_continuous", ada_norm_continous_conditioning_embedding_dim=12, ada_norm_bias=True
        ),
        {"hidden_states": ROWS, "added_cond_kwargs": {"pooled_text_emb": randn(B, 12, seed=1)}},
    ),
    "AdaLayerNormContinuous": (lambda: nn.Sequential(normalization.AdaLayerNormContinuous(C, 12))[0], EMBEDDED),
    "AdaLayerNormZero": (
        lambda: normalization.AdaLayerNormZero(C, norm_type="fp32_layer_norm"),
        {"x": ROWS.float(), "emb": randn(B, C, seed=1)},
    ),
    "RMSNorm": (lambda: normalization.RMSNorm(C, 1e-6, bias=True), {"x": ROWS}),
    "RMSNorm without weight": (lambda: normalization.RMSNorm(C, 1e-6, elementwise_affine=False), {"x": ROWS}),
    "resnet": (resnet_block, PICTURES),
    "resnet, wider": (lambda: resnet_block(out_channels=12, groups_out=3, output_scale_factor=2.0), PICTURES),
    "resnet, up": (lambda: resnet_block(up=True, time_embedding_norm="scale_shift"), PICTURES),
    "resnet, down": (lambda: resnet_block(down=True, skip_time_act=True), PICTURES),
    "resnet, gelu": (lambda: resnet_block(non_linearity="gelu", dropout=0.5), PICTURES),
    "resnet without timestep": (lambda: resnet_block(temb_channels=None), PICTURES | {"temb": None}),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_equals_the_part_of_diffusers(name: str, is_training: bool) -> None:
    make, inputs = PARTS[name]
    ours, theirs = both(make)
    modules.check_same(ours.train(is_training), theirs.train(is_training), inputs)


@pytest.mark.parametrize("timesteps", [torch.tensor([0, 3, 999]), torch.tensor([0.25, 7.5])], ids=["whole", "not"])
def test_timesteps(timesteps: Tensor) -> None:
    theirs = embeddings.Timesteps(7, flip_sin_to_cos=True, downscale_freq_shift=0.5, scale=3)
    ours = accelerate_model(copy.deepcopy(theirs))
    assert torch.equal(ours(timesteps), theirs(timesteps))


# ---- What is left to diffusers ---------------------------------------------------------------------------------------


def fused(module: nn.Module, inputs: dict[str, Any]) -> set[str]:
    with modules.called_ops() as calls:
        module(**inputs)
    return {op for op, _ in calls}


def hook(module: nn.Module, seen: list[nn.Module]) -> None:
    module.register_forward_hook(lambda module, args, out: seen.append(module))


@pytest.mark.parametrize("inner", ["norm3", "norm2"])
def test_a_hook_on_a_norm_of_a_block_is_called(inner: str) -> None:
    make, inputs = PARTS["cross-attention"]
    ours, theirs = both(make)
    assert "residual_ada_layer_norm" in fused(ours.double(), inputs)
    seen: list[nn.Module] = []
    hook(getattr(ours, inner), seen)
    assert fused(ours, inputs).isdisjoint({"residual_ada_layer_norm"})
    assert seen == [getattr(ours, inner)]
    modules.check_same(ours, theirs, inputs)


@pytest.mark.parametrize(("inner", "times"), [("norm1", 1), ("norm2", 1), ("nonlinearity", 3)])
def test_a_hook_in_a_resnet_is_called(inner: str, times: int) -> None:
    ours, theirs = both(resnet_block)
    seen: list[nn.Module] = []
    hook(getattr(ours, inner), seen)
    ours.double()(**PICTURES)
    assert len(seen) == times
    modules.check_same(ours, theirs, PICTURES)


def test_hooks_on_the_norm_of_an_adaptive_norm_and_on_a_projection_are_called() -> None:
    zero = {"x": ROWS, "emb": randn(B, C, seed=1)}
    for make, inputs, inner in (
        (lambda: normalization.AdaLayerNormZero(C), zero, "norm"),
        (lambda: normalization.AdaLayerNormContinuous(C, 12), EMBEDDED, "norm"),
        (lambda: activations.GELU(C, 20), {"hidden_states": ROWS}, "proj"),
    ):
        ours, theirs = both(make)
        seen: list[nn.Module] = []
        hook(getattr(ours, inner), seen)
        ours.double()(**inputs)
        assert seen == [getattr(ours, inner)]
        modules.check_same(ours, theirs, inputs)


class Adapter(nn.Module):
    """In place of a linear layer, as peft has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features, False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gelu", "ff.net.0.proj"),
        ("swiglu", "ff.net.0.proj"),
        ("ada_norm_zero and cross-attention", "norm1.linear"),
        ("ada_norm_continuous", "norm3.linear"),
        ("resnet", "time_emb_proj"),
    ],
)
def test_an_adapter_in_place_of_a_projection_is_called(name: str, path: str) -> None:
    make, inputs = PARTS[name]
    torch.manual_seed(0)
    theirs = make().double()
    theirs.set_submodule(path, Adapter(theirs.get_submodule(path)))
    modules.check_same(accelerate_model(copy.deepcopy(theirs)), theirs, inputs)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (
            lambda: block(cross_attention_dim=12, attention_type="gated"),
            {
                "hidden_states": ROWS,
                "encoder_hidden_states": TEXT,
                "cross_attention_kwargs": {"gligen": {"objs": randn(B, 2, 12, seed=2)}},
            },
        ),
        (lambda: block(positional_embeddings="sinusoidal", num_positional_embeddings=L), {"hidden_states": ROWS}),
        (lambda: resnet_block(non_linearity="mish"), PICTURES),
    ],
    ids=["objects", "positions", "mish"],
)
def test_what_no_block_here_does(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> None:
    modules.check_same(*both(make), inputs)


def test_feed_forward_in_chunks() -> None:
    make, inputs = PARTS["cross-attention"]
    ours, theirs = both(make)
    lengths: list[int] = []
    ours.ff.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    for module in (ours, theirs):
        module.set_chunk_feed_forward(1, 1)
    modules.check_same(ours, theirs, inputs)
    assert set(lengths) == {1}


@pytest.mark.parametrize(("of_x", "of_weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_norm_of_diffusers_promotes_as_before(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    ours, theirs = both(lambda: normalization.RMSNorm(C, 1e-6).to(of_weight))
    found, expected = (module(ROWS.to(of_x)) for module in (ours, theirs))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["cross-attention", "ada_norm_zero and cross-attention"])
def test_a_block_under_autocast_keeps_its_residual_in_float32(name: str) -> None:
    make, inputs = PARTS[name]
    ours, theirs = both(make)
    inputs = modules.in_dtype(inputs, torch.float32)
    exact = theirs.eval()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours.eval()(**inputs), theirs(**inputs)
    assert found.dtype == expected.dtype == torch.float32
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


def test_another_forward_of_a_norm_may_come_later() -> None:
    make, inputs = PARTS["cross-attention"]
    ours, theirs = both(make)
    for module in (ours, theirs):
        module.norm3.forward = torch.zeros_like
    modules.check_same(ours, theirs, inputs)


def test_another_activation_may_come_later() -> None:
    ours, theirs = both(resnet_block)
    for module in (ours, theirs):
        module.nonlinearity = nn.Mish()
    modules.check_same(ours, theirs, PICTURES)


def test_a_scale_shift_block_asks_for_its_timestep_as_before() -> None:
    ours, _ = both(lambda: resnet_block(time_embedding_norm="scale_shift", temb_channels=None))
    with pytest.raises(ValueError, match="`temb` should not be None"):
        ours(PICTURES["input_tensor"].float(), None)


class OwnNorm(nn.LayerNorm):
    """Anything may be in it."""


def test_other_modules_are_left_alone() -> None:
    replaced = nn.LayerNorm(4)
    replaced.forward = lambda x: x + 1  # type: ignore[method-assign]
    others = [
        OwnNorm(4),
        nn.LayerNorm([3, 4]),
        nn.BatchNorm1d(4),
        replaced,
        block(norm_type="ada_norm", num_embeds_ada_norm=3),
    ]
    model = nn.ModuleList([*others, nn.GroupNorm(2, 4)])
    classes = [type(module) for module in model]
    accelerate_model(model)
    assert [type(module) for module in model][:-1] == classes[:-1]
    assert type(model[-1]) is diffusers_modules.GroupNorm
    assert torch.equal(replaced(torch.zeros(4)), torch.ones(4))


@pytest.mark.parametrize("inner", ["conv_norm_out", "conv_act"])
def test_the_output_norm_with_a_hook_leaves_its_activation_alone(inner: str) -> None:
    theirs = modules.set_apart(unet(attends=False))
    ours = copy.deepcopy(theirs)
    seen: list[nn.Module] = []
    hook(getattr(ours, inner), seen)
    accelerate_model(ours)
    assert type(ours.conv_act) is nn.SiLU
    modules.check_same(ours, theirs, MODELS["unet without text"][1])


@pytest.mark.parametrize(
    ("error", "message", "model"),
    [
        (TypeError, "model is str, expected a torch.nn.Module", "unet"),
        (ValueError, "model is Linear without any of LayerNorm, .*ResnetBlock2D", nn.Linear(2, 3)),
    ],
)
def test_what_has_nothing_to_replace_is_named(error: type[Exception], message: str, model: Any) -> None:
    with pytest.raises(error, match=f"accelerate_model: {message}"):
        accelerate_model(model)
