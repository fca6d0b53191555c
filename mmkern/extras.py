"""Packages that only some commands need, imported when they are."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A command needs a package of an extra that is not installed."""


def require(module: str, package: str, extra: str) -> ModuleType:
    """Import ``module`` or say how to install the ``package`` that has it.

    Raises: MissingExtraError where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(f"{package} is not installed; pip install 'mmkern[{extra}]'") from None
