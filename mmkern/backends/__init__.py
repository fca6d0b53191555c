"""Which kernels are available here, and which one a call gets.

Every backend answers with reasons: :func:`mmkern.explain` shows them all. ``use_backend`` and ``verify`` change the
choice for the current thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmkern.ops._define import Op

Kernel = Callable[..., None]
Limits = Callable[..., list[str]]  # why a kernel does not take a call, from its first arguments or all
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class _Settings(threading.local):
    """``default`` is False where a call must look at the other two."""

    default: bool = True
    backend: str | None = None
    verify: bool = False


settings = _Settings()


@dataclass(frozen=True)
class Backend:
    """A set of kernels: where it finds them, on which device and dtypes they run.

    ``limits`` finds what a kernel asks of a call beyond that, of one that does not take them all.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None]
    find: Callable[[str, str], Kernel]
    limits: Callable[[str], Limits | None] = lambda name: None

    def reasons_not(self, op: Op, name: str, lead: Tensor, args: Sequence[Any]) -> list[str]:
        """Why this backend cannot run the kernel ``name`` of ``op`` on tensors like ``lead``; empty where it can.

        ``args`` are the arguments of the op, the first of them, or none.
        """
        reasons = []
        if lead.device.type != self.device:
            reasons.append(f"runs on {self.device}, the input is on {lead.device.type}")
        if lead.is_floating_point() and lead.dtype not in self.dtypes:
            reasons.append(f"has no {lead.dtype} kernel")
        missing = self.missing()
        if missing:
            reasons.append(missing)
        if not reasons and not self.has(op, name):
            reasons.append(f"has no kernel of {name}")
        if not reasons and args:
            limits = self.limits(name)
            reasons.extend(limits(*args) if limits else ())
        return reasons

    def has(self, op: Op, name: str) -> bool:
        try:
            self.find(op.family, name)
        except (AttributeError, ModuleNotFoundError):
            return False
        return True


@functools.cache
def _cpu_missing() -> str | None:
    try:
        importlib.import_module("mmkern._C")
    except ImportError as error:
        if importlib.util.find_spec("mmkern._C") is None:
            return f"mmkern._C is not built: {error}"
        warnings.warn(f"mmkern's CPU kernels do not load, PyTorch takes their place: {error}", stacklevel=2)
        return f"mmkern._C does not load: {error}"
    return None


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install mmkern[triton])"
    return None if torch.cuda.is_available() else "no CUDA or ROCm device"


@functools.cache
def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("mmkern._cuda") is None and importlib.util.find_spec("cupy") is None:
        return "mmkern._cuda is not built and CuPy is not installed (pip install mmkern[cupy])"
    return None


def _find_cpu(family: str, name: str) -> Kernel:
    extension = importlib.import_module("mmkern._C")
    kernel = getattr(extension, name)

    def launch(*args: Any) -> None:
        kernel(*args, torch.get_num_threads())

    return launch


def direct(op: Op, empty_strided: Callable[..., Tensor], record: Callable[..., Tensor]) -> Callable[..., Any] | None:
    """The CPU kernel's short way from Python (bindings/direct.h), or None where there are no CPU kernels."""
    if _cpu_missing():
        return None
    made: Callable[..., Any] = importlib.import_module("mmkern._C").direct(op.name, settings, empty_strided, record, op)
    return made


def _find_triton(family: str, name: str) -> Kernel:
    kernel: Kernel = getattr(importlib.import_module(f"mmkern.kernels.{family}"), name)
    return kernel


def _find_cuda(family: str, name: str) -> Kernel:
    kernel: Kernel = getattr(importlib.import_module("mmkern.backends.cuda"), name)
    return kernel


def _cuda_limits(name: str) -> Limits | None:
    limits: Limits | None = importlib.import_module("mmkern.backends.cuda").LIMITS.get(name)
    return limits


# In the order in which they are tried. The reference comes after all of them and is not a Backend: it has no kernels.
BACKENDS = (
    Backend("cpu", "cpu", (*FLOATING, torch.float64), _cpu_missing, _find_cpu),
    Backend("triton", "cuda", FLOATING, _triton_missing, _find_triton),
    Backend("cuda", "cuda", FLOATING, _cuda_missing, _find_cuda, _cuda_limits),
)
NAMES = (*(backend.name for backend in BACKENDS), "reference")


@dataclass(frozen=True)
class Choice:
    """One backend's answer to a call."""

    backend: str
    chosen: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend}: {'chosen' if self.chosen else '; '.join(self.reasons)}"


def choices(op: Op, name: str, lead: Tensor, args: Sequence[Any] = ()) -> list[Choice]:
    """Every backend's answer, in the order in which they are tried; exactly one is chosen.

    ``name`` is the kernel's, of the op or of its backward.
    """
    wanted = _in_force(op, name)
    answers, taken = [], False
    for backend in BACKENDS:
        reasons = backend.reasons_not(op, name, lead, args)
        if wanted not in (None, backend.name):
            reasons.append(f'use_backend("{wanted}") is in force')
        chosen = not reasons and not taken
        taken = taken or chosen
        answers.append(Choice(backend.name, chosen, tuple(reasons) or ("comes after the chosen one",)))
    answers.append(Choice("reference", not taken, ("a kernel was found",)))
    return answers


def _in_force(op: Op, name: str) -> str | None:
    """What ``use_backend`` asks for, unless that backend has the op's forward alone and ``name`` is the backward."""
    wanted = settings.backend
    if wanted is None or name == op.name:
        return wanted
    forward_alone = any(b.name == wanted and b.has(op, op.name) and not b.has(op, name) for b in BACKENDS)
    return None if forward_alone else wanted


def choose(op: Op, name: str, args: Sequence[Any]) -> Backend | None:
    """The backend for this call, or None for the reference. Raises where ``use_backend`` asks for the impossible."""
    answers = choices(op, name, args[op.lead], args)
    chosen = next(answer.backend for answer in answers if answer.chosen)
    wanted = _in_force(op, name)
    if wanted not in (None, chosen):
        why = next(answer for answer in answers if answer.backend == wanted)
        raise ValueError(f'{op.name}: use_backend("{wanted}") cannot run this call: {"; ".join(why.reasons)}')
    return next((backend for backend in BACKENDS if backend.name == chosen), None)


def has_kernel(op: Op, lead: Tensor) -> bool:
    """Whether a backend's kernel, and not the reference, takes calls with such a tensor."""
    wanted = settings.backend
    return any(wanted in (None, b.name) and not b.reasons_not(op, op.name, lead, ()) for b in BACKENDS)


def takes_every_call(chosen: Backend, name: str) -> bool:
    """Whether the next call with such tensors gets the same answer: no backend up to ``chosen`` looks at more."""
    tried = BACKENDS[: BACKENDS.index(chosen) + 1]
    return not any(b.limits(name) for b in tried if b.device == chosen.device)


@contextlib.contextmanager
def _set(**changes: Any) -> Iterator[None]:
    before = {name: getattr(settings, name) for name in ("backend", "verify", "default")}
    for name, value in changes.items():
        setattr(settings, name, value)
    settings.default = settings.backend is None and not settings.verify
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Run every op on one backend in this thread: ``with mmkern.use_backend("reference"):``.

    Args:
        name: "cpu", "triton", "cuda", "reference", or None for the default choice.
    Raises: ValueError for another name; a call inside raises where that backend cannot run it.
    """
    if name not in (None, *NAMES):
        raise ValueError(f"use_backend: name is {name!r}, expected one of {', '.join(NAMES)}, or None")
    return _set(backend=name)


def verify() -> contextlib.AbstractContextManager[None]:
    """Run the reference beside every kernel in this thread, forward and backward, and raise where they differ.

    The bound is the numerics contract (:mod:`mmkern.testing`). For debugging: each call costs two references more.
    """
    return _set(verify=True)
