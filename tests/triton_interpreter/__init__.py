"""The Triton kernels under Triton's interpreter, in a process of its own: see ``worker.py``."""
