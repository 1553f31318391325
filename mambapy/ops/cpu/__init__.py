"""Fused kernels for the CPU, in Numba: compiled to the machine's own instructions at first use.

backend         what the dispatch of mambapy.ops sees
selective_scan  conv1d  norm  step       kernels, or what launches them
scan_forward  scan_backward  step_kernel the kernels of the scan and of a decoding step
exp             exp, softplus, SiLU on vectors
rows            how a kernel sees tensors of any dtype and stride
memory  simd    loads, stores and arithmetic on vectors of 32 numbers
threads         compiling, the cache on disk, threads
"""
