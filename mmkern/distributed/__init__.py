"""Ops over sequences that several processes share."""

from .ring import ring_cross_attention

__all__ = ["ring_cross_attention"]
