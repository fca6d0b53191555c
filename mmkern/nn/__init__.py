"""Modules on top of the ops; parameter names are those of the modules that they replace."""

from .cross_attention import CrossAttention
from .modulation import AdaLayerNormContinuous, AdaLayerNormZero, FiLM, GroupNormAct, RMSNorm
from .quantization import FactorizedResidualVQ, ResidualVQ, VectorQuantizer

__all__ = [
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "CrossAttention",
    "FactorizedResidualVQ",
    "FiLM",
    "GroupNormAct",
    "RMSNorm",
    "ResidualVQ",
    "VectorQuantizer",
]
