"""Packages of the extra ``bench``, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


def require(name: str) -> ModuleType:
    """Import a package of the extra ``bench``. Raises: MissingExtraError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise MissingExtraError(f"the benchmarks need {error.name}: pip install 'mmkern[bench]'") from error
