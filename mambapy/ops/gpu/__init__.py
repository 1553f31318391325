"""Fused kernels for NVIDIA GPUs, in Triton: compiled for the card at first use.

backend        what the dispatch of mambapy.ops sees; it imports no Triton
conv1d  norm   kernels, and what launches them
"""
