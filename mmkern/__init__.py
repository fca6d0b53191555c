"""mmkern: kernels for multimodal models, in Triton, CUDA and C++, behind one set of torch ops."""

# torch first: its OpenMP runtime must be in the process before mmkern._C looks for one.
import torch as _torch  # noqa: F401

from . import ops
from .backends import use_backend, verify
from .explain import explain
from .memory import tune_cpu_allocator

__version__ = "0.1.0"

__all__ = ["explain", "ops", "tune_cpu_allocator", "use_backend", "verify"]
