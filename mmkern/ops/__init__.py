"""The fused ops: one function each, for every backend."""

from .attention import cross_attention
from .attention_rows import merge_attention, qk_norm_rotary, rotary_embedding
from .attention_varlen import cross_attention_varlen
from .hyperbolic import (
    lorentz_centroid,
    lorentz_distance,
    lorentz_entailment_loss,
    lorentz_exp_map,
    lorentz_exp_map0,
    lorentz_exterior_angle,
    lorentz_half_aperture,
    lorentz_log_map,
    lorentz_log_map0,
    lorentz_pairwise_distance,
    lorentz_pairwise_inner,
    lorentz_parallel_transport,
    lorentz_to_poincare,
    mobius_add,
    mobius_scalar_mul,
    poincare_distance,
    poincare_exp_map,
    poincare_exp_map0,
    poincare_log_map,
    poincare_log_map0,
    poincare_pairwise_distance,
    poincare_to_lorentz,
)
from .modulation import ada_layer_norm, dual_ada_layer_norm, layer_norm, rms_norm
from .multi_source import Source as Source  # what an op takes, and none itself
from .multi_source import multi_source_attention

__all__ = [
    "ada_layer_norm",
    "cross_attention",
    "cross_attention_varlen",
    "dual_ada_layer_norm",
    "layer_norm",
    "lorentz_centroid",
    "lorentz_distance",
    "lorentz_entailment_loss",
    "lorentz_exp_map",
    "lorentz_exp_map0",
    "lorentz_exterior_angle",
    "lorentz_half_aperture",
    "lorentz_log_map",
    "lorentz_log_map0",
    "lorentz_pairwise_distance",
    "lorentz_pairwise_inner",
    "lorentz_parallel_transport",
    "lorentz_to_poincare",
    "merge_attention",
    "mobius_add",
    "mobius_scalar_mul",
    "multi_source_attention",
    "poincare_distance",
    "poincare_exp_map",
    "poincare_exp_map0",
    "poincare_log_map",
    "poincare_log_map0",
    "poincare_pairwise_distance",
    "poincare_to_lorentz",
    "qk_norm_rotary",
    "rms_norm",
    "rotary_embedding",
]
