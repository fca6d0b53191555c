"""Noise schedules, and the coefficients that they give to each solver's steps."""
