"""Fused kernels for NVIDIA GPUs, compiled for the card at first use and kept on disk.

backend          what the dispatch of mambapy.ops sees; it imports nothing that a GPU needs
selective_scan   what launches kernels/scan_*.cu: CUDA C++, for what needs every register told
lanes  tuning    how these divide their work: by rule, or as measured
cuda  disk       their compilation by NVRTC, and their launch; what is kept on disk
conv1d  norm  cross_entropy    kernels in Triton
step             a model's decoding step: the launches of step_kernel.py's kernels, in Triton
launched_plan  record  choose    such launches as a CUDA graph, and the choice of a token as one
"""
