"""Which backend a call gets, and why not the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import backends
from .ops._define import OPS


def explain(op: str, *args: Any) -> list[backends.Choice]:
    """List every backend's answer to ``op(*args)``, chosen or why not.

    Args:
        op: the name of an op, as in ``mmkern.ops``.
        args: the arguments of the call, or the first of them: dtype, device and, for some kernels, sizes matter.
    Returns: one :class:`mmkern.backends.Choice` a backend, in the order in which they are tried; ``print(*answer)``.
    Raises: ValueError where there is no such op; TypeError where no argument is a tensor.
    """
    if op not in OPS:
        raise ValueError(f"explain: there is no op {op!r}; there are {', '.join(sorted(OPS))}")
    lead = next((a for a in args if isinstance(a, Tensor) and a.dim() > 0), None)
    if lead is None:
        raise TypeError(f"explain: {op} was given no tensor")
    return backends.choices(OPS[op], op, lead, args)
