"""What an op's definition says of its outputs: their shapes, and dtypes that are not those of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Result = Tensor | tuple[Tensor, ...]

# From the arguments in order.
Shape = Callable[[Sequence[Any]], tuple[int, ...]]


@dataclass(frozen=True)
class like:  # noqa: N801
    """The shape and the dtype of an argument."""

    argument: int

    def __call__(self, args: Sequence[Any]) -> tuple[int, ...]:
        shape: tuple[int, ...] = args[self.argument].shape
        return shape


@dataclass(frozen=True)
class summed:  # noqa: N801
    """A shape, in the dtype of the sums."""

    shape: Shape

    def __call__(self, args: Sequence[Any]) -> tuple[int, ...]:
        return self.shape(args)


@dataclass(frozen=True)
class indices:  # noqa: N801
    """A shape, in int64, which has no gradient."""

    shape: Shape

    def __call__(self, args: Sequence[Any]) -> tuple[int, ...]:
        return self.shape(args)


def rows_of(argument: int) -> Shape:
    """One number a row: the shape without its last axis."""
    return lambda args: args[argument].shape[:-1]


def pairs_of(x: int, y: int) -> Shape:
    return lambda args: (args[x].shape[0], args[y].shape[0])


def in_tuple(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
