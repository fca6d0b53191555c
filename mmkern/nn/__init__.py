"""Modules on top of the ops; parameter names are those of the modules that they replace."""

from .cross_attention import CrossAttention

__all__ = ["CrossAttention"]
