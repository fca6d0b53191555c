"""Thin models that implement papers on top of the ops, one file a paper."""

from .meru import Meru, MeruLoss

__all__ = ["Meru", "MeruLoss"]
