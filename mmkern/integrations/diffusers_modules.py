"""Modules of diffusers' models with the ops of mmkern: subclasses, which ``accelerate_model`` makes of their bases.

Each adds a ``forward`` and no state, and has its base's name, which diffusers compares with lists of names. What a base
does in a way that is not known here, it still does: hooks on a module that is passed over, adapters in place of a
linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import activations, attention, embeddings, normalization, resnet
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.nn import modulation
from mmkern.ops.gated import ActivationName


def is_untouched(module: nn.Module) -> bool:
    """Whether nothing is hooked into its call."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


def activation_of(module: nn.Module | None) -> ActivationName | None:
    """Its name among those that ops know; None where it has none."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module) is nn.SiLU:
        return "silu"
    return "relu" if type(module) is nn.ReLU else None


# ---- Norms -----------------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = ops.layer_norm(input, self.weight, self.bias, eps=self.eps)
        return out


class FP32LayerNorm(normalization.FP32LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return LayerNorm.forward(self, inputs)  # type: ignore[arg-type]


class RMSNorm(normalization.RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _keeps_dtype(self, hidden_states):
            return super().forward(hidden_states)
        out: Tensor = modulation.normalize(self, hidden_states)
        return out


class GroupNorm(nn.GroupNorm):
    act: ActivationName | None = None

    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps, self.act)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    def forward(
        self, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not _is_known(self.norm, x):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        return modulation.AdaLayerNormZero.modulated(self, x, emb)  # type: ignore[arg-type]


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        if not _is_known(self.norm, x):
            return super().forward(x, conditioning_embedding)
        return modulation.AdaLayerNormContinuous.modulated(self, x, conditioning_embedding)  # type: ignore[arg-type]


def _is_known(norm: nn.Module, x: Tensor) -> bool:
    """Whether a fused op can stand for its call."""
    return type(norm) in (LayerNorm, FP32LayerNorm, RMSNorm) and is_untouched(norm) and _keeps_dtype(norm, x)


def _keeps_dtype(norm: nn.Module, x: Tensor) -> bool:
    """The RMS norm of diffusers gives what its weight and x are promoted to."""
    return type(norm) is not RMSNorm or norm.weight is None or norm.weight.dtype == x.dtype


# ---- Activations and embeddings --------------------------------------------------------------------------------------


class GELU(activations.GELU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        proj = self.proj
        if type(proj) is not nn.Linear or proj.bias is None or not is_untouched(proj):
            return super().forward(hidden_states)
        approximate: Any = self.approximate
        return ops.bias_gelu(functional.linear(hidden_states, proj.weight), proj.bias, approximate=approximate)


class GEGLU(activations.GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        return ops.geglu(self.proj(hidden_states))


class SwiGLU(activations.SwiGLU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.swiglu(self.proj(hidden_states))


class Timesteps(embeddings.Timesteps):
    def forward(self, timesteps: Tensor) -> Tensor:
        return ops.timestep_embedding(
            timesteps,
            self.num_channels,
            flip_sin_to_cos=self.flip_sin_to_cos,
            downscale_freq_shift=self.downscale_freq_shift,
            scale=self.scale,
        )


# ---- Blocks ----------------------------------------------------------------------------------------------------------

_NORM_TYPES = ("ada_norm_zero", "layer_norm")


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """What is added to the residual, and the norm behind it, in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        options = cross_attention_kwargs or {}
        if not self._is_known(hidden_states, options):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        gate = gate_mlp = None
        modulators: dict[str, Tensor] = {}
        if self.norm_type == "ada_norm_zero":
            normed, gate, shift, scale, gate_mlp = self.norm1(
                hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype
            )
            modulators = {"scale": scale, "shift": shift}
        else:
            normed = self.norm1(hidden_states)
        source = encoder_hidden_states if self.only_cross_attention else None
        found = self.attn1(normed, encoder_hidden_states=source, attention_mask=attention_mask, **options)
        if self.attn2 is not None:
            normed, hidden_states = _added_and_normed(self.norm2, found, hidden_states, gate)
            gate = None
            found = self.attn2(
                normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options
            )
        normed, hidden_states = _added_and_normed(self.norm3, found, hidden_states, gate, **modulators)
        found, hidden_states = _of_one_dtype(self.ff(normed), hidden_states)
        return hidden_states + found if gate_mlp is None else ops.gated_residual(hidden_states, found, gate_mlp)

    def _is_known(self, x: Tensor, options: dict[str, Any]) -> bool:
        norms = [self.norm3] if self.attn2 is None else [self.norm2, self.norm3]
        return (
            self._chunk_size is None
            and not options.keys() & {"gligen", "scale"}
            and all(_is_known(norm, x) for norm in norms)
        )


def _added_and_normed(
    norm: nn.Module, x: Tensor, residual: Tensor, gate: Tensor | None, **modulators: Tensor
) -> tuple[Tensor, Tensor]:
    """The norm of ``residual + gate·x``, and that."""
    x, residual = _of_one_dtype(x, residual)
    found: tuple[Tensor, Tensor] = modulation.normalize(norm, x, residual=residual, gate=gate, **modulators)
    return found


def _of_one_dtype(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast products come in fewer bits than what they are added to."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Each group norm, its scale and shift, and the activation behind it, in one pass."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._is_known(temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = self._activated(self.norm1, input_tensor)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        scale_shift = None
        if temb is not None:
            condition = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale_shift = condition.chunk(2, 1)
            else:
                hidden = hidden + condition[:, :, None, None]
        hidden = self.conv2(self.dropout(self._activated(self.norm2, hidden, scale_shift)))
        if self.conv_shortcut is not None:
            # Contiguous in training alone, as before: DDP expects gradients of one layout.
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        out: Tensor = input_tensor + hidden
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def _is_known(self, temb: Tensor | None) -> bool:
        kind = self.time_embedding_norm
        return (
            (temb is None) == (self.time_emb_proj is None)
            and (kind == "default" or (kind == "scale_shift" and temb is not None))
            and activation_of(self.nonlinearity) is not None
            and type(self.norm1) is type(self.norm2) is GroupNorm
            and all(is_untouched(module) for module in (self.norm1, self.norm2, self.nonlinearity))
        )

    def _activated(self, norm: nn.GroupNorm, x: Tensor, scale_shift: Any = None) -> Tensor:
        act = activation_of(self.nonlinearity)
        return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, act, scale_shift)


# ---- What becomes what -----------------------------------------------------------------------------------------------


def replacement_of(module: nn.Module) -> type[nn.Module] | None:
    """What it can become, by its exact class; None for nothing."""
    base = type(module)
    if "forward" in module.__dict__ or (base in _CONDITIONS and not _CONDITIONS[base](module)):
        return None
    return _REPLACEMENTS.get(base)


def activate_output_norm(unet: Any) -> None:
    """Let the norm before the last convolution do the activation, in whose place it leaves nothing."""
    norm, act = unet.conv_norm_out, activation_of(unet.conv_act)
    if type(norm) is GroupNorm and act is not None and is_untouched(norm) and is_untouched(unet.conv_act):
        norm.act, unet.conv_act = act, nn.Identity()


def _has_one_axis(norm: Any) -> bool:
    return len(norm.dim if isinstance(norm, normalization.RMSNorm) else norm.normalized_shape) == 1


REPLACEMENTS = (
    LayerNorm,
    FP32LayerNorm,
    RMSNorm,
    GroupNorm,
    AdaLayerNormZero,
    AdaLayerNormContinuous,
    GELU,
    GEGLU,
    SwiGLU,
    Timesteps,
    BasicTransformerBlock,
    ResnetBlock2D,
)
_REPLACEMENTS: dict[type, type[nn.Module]] = {replacement.__bases__[0]: replacement for replacement in REPLACEMENTS}
_CONDITIONS: dict[type, Callable[[Any], bool]] = {
    nn.LayerNorm: _has_one_axis,
    normalization.FP32LayerNorm: _has_one_axis,
    normalization.RMSNorm: _has_one_axis,
    attention.BasicTransformerBlock: lambda block: block.norm_type in _NORM_TYPES and block.pos_embed is None,
    resnet.ResnetBlock2D: lambda block: activation_of(block.nonlinearity) is not None,
}
