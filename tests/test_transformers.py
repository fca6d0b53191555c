"""Tiny models of transformers give the same outputs and gradients with ``attn_implementation="mmkern"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DetrConfig,
    DetrModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
)

from mmkern.integrations import transformers as integration

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "attention_dropout": 0.0,
}
TOWERS = {
    "text_config": {**SMALL, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**SMALL, "image_size": 24, "patch_size": 8},
}

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}  # of the largest output, and of the largest gradient

Inputs = dict[str, Tensor]


class Tiny(NamedTuple):
    model: type[PreTrainedModel]
    config: PreTrainedConfig
    inputs: Inputs
    rival: str = "sdpa"  # "eager" where the model has no other
    dtype: torch.dtype = torch.float64  # float32 where eager takes its softmax in that


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()


def tokens(*lengths: int, longest: int = 12) -> Inputs:
    """Right-padded sequences, each closed by the end token, and their mask."""
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (len(lengths), longest))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def images(count: int, height: int = 24, width: int = 24) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, height, width, dtype=torch.float64)


def clip_text() -> Tiny:
    inputs = tokens(12, 5, 2)
    inputs["attention_mask"][0, 3] = 0  # padding on the right is hidden by causality already
    return Tiny(CLIPTextModel, CLIPTextConfig(**TOWERS["text_config"]), inputs)


def siglip_text() -> Tiny:
    return Tiny(SiglipTextModel, SiglipTextConfig(**TOWERS["text_config"]), tokens(12, 5, 2))


def clip() -> Tiny:
    return Tiny(CLIPModel, CLIPConfig(**TOWERS, projection_dim=16), {**tokens(12, 7), "pixel_values": images(2)})


def siglip() -> Tiny:
    return Tiny(SiglipModel, SiglipConfig(**TOWERS), {**tokens(12, 7), "pixel_values": images(2)})


def clip_vision() -> Tiny:
    return Tiny(CLIPVisionModel, CLIPVisionConfig(**TOWERS["vision_config"]), {"pixel_values": images(2)})


def siglip_vision() -> Tiny:
    return Tiny(SiglipVisionModel, SiglipVisionConfig(**TOWERS["vision_config"]), {"pixel_values": images(2)})


def detr() -> Tiny:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=7,
        dropout=0.0,
    )
    mask = torch.ones(2, 64, 48, dtype=torch.long)
    mask[1, 40:] = 0  # an image shorter and narrower than the batch
    mask[1, :, 24:] = 0
    return Tiny(DetrModel, config, {"pixel_values": images(2, 64, 48), "pixel_mask": mask}, "eager")


def gemma2() -> Tiny:
    config = Gemma2Config(
        **SMALL, vocab_size=99, num_key_value_heads=1, head_dim=16, attn_logit_softcapping=5.0, sliding_window=4
    )
    inputs = {name: x.flip(1) for name, x in tokens(12, 6).items()}  # padded on the left, as generation wants it
    return Tiny(Gemma2ForCausalLM, config, inputs, "eager", torch.float32)


def t5() -> Tiny:
    config = T5Config(vocab_size=99, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=3, dropout_rate=0.0)
    return Tiny(T5Model, config, {**tokens(12, 6), "decoder_input_ids": tokens(8, 8, longest=8)["input_ids"]})


MODELS = [clip_text, clip_vision, clip, siglip_text, siglip_vision, siglip, detr, gemma2, t5]


def build(tiny: Tiny, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny.model._from_config(tiny.config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than they come, so that scores differ between keys
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.to(tiny.dtype).eval()


def outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    found = model(**inputs).items()
    return {name: x for name, x in found if isinstance(x, Tensor) and x.is_floating_point()}


def seen(name: str, x: Tensor, inputs: Inputs) -> Tensor:
    """Without the rows of padding, which nothing reads and each implementation fills in its way."""
    mask = inputs.get("attention_mask")
    if mask is None or x.shape[:2] != mask.shape or "decoder" in name:
        return x
    return x[mask.bool()]


@pytest.mark.parametrize("make", MODELS)
def test_outputs_and_gradients(make: Callable[[], Tiny]) -> None:
    tiny = make()
    inputs = tiny.inputs
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for implementation in ("mmkern", tiny.rival):
        model = build(tiny, implementation)
        outs = {name: seen(name, x, inputs) for name, x in outputs(model, inputs).items()}
        torch.manual_seed(3)
        sum((x * torch.randn_like(x)).sum() for x in outs.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((outs, grads))
    (outs, grads), (wanted_outs, wanted_grads) = found
    assert outs.keys() == wanted_outs.keys()
    assert grads.keys() == wanted_grads.keys()
    for found_ones, wanted_ones in ((outs, wanted_outs), (grads, wanted_grads)):
        largest = max(float(x.detach().abs().max()) for x in wanted_ones.values())
        for name, x in wanted_ones.items():
            gap = float((found_ones[name] - x).detach().abs().max())
            assert gap < TOLERANCE[tiny.dtype] * largest, f"{name}: off by {gap}, the largest of all is {largest}"


@pytest.mark.parametrize("make", [clip_text, siglip_text, detr])
def test_masks_reach_the_attention(make: Callable[[], Tiny]) -> None:
    tiny = make()
    inputs = tiny.inputs
    model = build(tiny, "mmkern")
    masked = outputs(model, inputs)
    unmasked = outputs(model, {name: x for name, x in inputs.items() if not name.endswith("mask")})
    assert max(float((masked[name] - x).detach().abs().max()) for name, x in unmasked.items()) > 1e-2


def test_generation_uses_the_cache() -> None:
    tiny = gemma2()
    found = [
        build(tiny, implementation).generate(**tiny.inputs, max_new_tokens=6, do_sample=False)
        for implementation in ("mmkern", "eager")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "value"), [("s_aux", torch.zeros(3)), ("output_attentions", True), ("cache", object())]
)
def test_what_it_has_not_is_refused(option: str, value: Any) -> None:
    x = torch.randn(1, 3, 4, 16)
    with pytest.raises(ValueError, match=f"attn_implementation='mmkern': got {option}"):
        integration.attention_forward(nn.Module(), x, x, x, None, **{option: value})
