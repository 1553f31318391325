"""Fused kernels for NVIDIA GPUs, compiled for the card at first use and kept on disk.

backend          what the dispatch of mambapy.ops sees; it imports nothing that a GPU needs
selective_scan   what launches kernels/scan_*.cu: CUDA C++, for what needs every register told
cuda             their compilation by NVRTC, and their launch
conv1d  norm  cross_entropy    kernels in Triton
record           one CUDA graph at a time
step             a model's decoding step: a CUDA graph of step_kernel.py's kernels, in Triton
"""
