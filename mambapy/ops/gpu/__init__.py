"""Kernels for NVIDIA GPUs; each module is imported where its first kernel is needed."""
