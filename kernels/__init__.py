"""The Triton kernels: one module of launchers a family, found by the op's name. Installed as ``mmkern.kernels``."""
