"""Triton kernels: speed on a GPU, and without one what their binaries cost."""
