"""``python -m mmkern demo``: a small MERU on real handwritten digits, with the reference ops and with mmkern's."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """``python -m mmkern demo``; returns the exit status."""
    from .cli import main as run

    return run(argv)


__all__ = ["main"]
