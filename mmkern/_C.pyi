"""The CPU kernels, each ``name(*parameters, threads)``; its ``__doc__`` states the parameters. See bindings/cpu.cpp."""

from collections.abc import Callable
from typing import Any

isa: str
isa_levels: tuple[str, ...]
memory: Any

def direct(name: str, settings: Any, empty_strided: Any, record: Callable[..., Any], op: Any) -> Callable[..., Any]: ...
def __getattr__(name: str) -> Callable[..., None]: ...
