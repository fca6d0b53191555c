"""The benchmark harness: every result is checked, then timed beside its rivals, in turns, under one allocator.

``python -m mmkern bench`` and ``pytest benchmarks/`` measure through :func:`mmkern.bench.measure.measure`. What is
measured (cases, shapes, rivals, floors) lies in the folder ``benchmarks/`` of a checkout.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """``python -m mmkern bench``; returns the exit status."""
    from .cli import main as run

    return run(argv)


__all__ = ["main"]
