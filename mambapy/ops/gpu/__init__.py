"""Kernels for NVIDIA GPUs, in Triton; each module is imported where its first kernel is needed."""
