"""Modules on top of the ops; parameter names are those of the modules that they replace."""

from .cross_attention import CrossAttention
from .modulation import AdaLayerNormContinuous, AdaLayerNormZero, FiLM, GroupNormAct, RMSNorm

__all__ = ["AdaLayerNormContinuous", "AdaLayerNormZero", "CrossAttention", "FiLM", "GroupNormAct", "RMSNorm"]
