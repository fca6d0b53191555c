"""Noise schedules, and the coefficients that they give to each solver's steps."""

from .sampling import Sampler, sample
from .schedule import Schedule, Step
from .solvers import Level

__all__ = ["Level", "Sampler", "Schedule", "Step", "sample"]
