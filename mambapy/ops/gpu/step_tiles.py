"""How much of a stage one program of `step_kernel.py` takes: few sizes, so that little compiles.

At one row a step is a chain of kernels that each last a few microseconds. What counts is that there
are programs for every multiprocessor, and that each has much to read at once.
"""

import torch
import triton

# Programs that keep every multiprocessor of a large card busy.
PROGRAMS = 132
# Up to so many rows, products are sums of numbers; beyond, registers run short, and tensor cores do
# 16 rows at once.
MATVEC_ROWS = 2
# Up to so many, a program takes few channels, as there are few programs.
FEW_ROWS = 8
# Over so many blocks of channels the product behind a convolution is divided, at most.
PARTS = 48


def power(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return triton.next_power_of_2(size)


def matvec(out: int, inner: int, rows: int) -> tuple[int, int, int, int]:
    """Outputs of a warp, inputs at a time, such blocks on their way, and a program's warps."""
    J = 1
    while J < 4 and out // (8 * J) >= 2 * PROGRAMS:
        J *= 2
    # 16 bytes a lane; 64 registers of weights on their way.
    return J, min(power(inner), 256), 16 // J, 4


def matmul(out: int, inner: int, rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Outputs, rows and inputs of a program at a time, its warps, and loads in flight."""
    N, warps = (16, 4) if out < 512 else (32, 4) if out <= 1024 else (64, 4)
    B = 16 if out < 16384 else min(max(power(rows), 16), 64)
    # Products of float32 have no tensor cores, and are written out in full.
    K = 128 if dtype.itemsize == 2 else 32
    return N, B, min(K, max(power(inner), 16)), warps if out < 16384 else 8, 4


def conv(e: int, rows: int) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps."""
    if rows <= MATVEC_ROWS:
        E = max(64, power(-(-e // PARTS)))
        return E, 1, 4 if E < 128 else 8
    return 128, 1 if rows <= 16 else 4, 4


def apart(out: int, inner: int, rows: int) -> bool:
    """Whether the product (out, inner) behind a convolution is better a kernel of its own."""
    return rows > MATVEC_ROWS or out * inner > 400_000


def parts(inner: int, rows: int) -> int:
    """In how many parts that product is then calculated, which the scan adds up."""
    return 4 if rows > MATVEC_ROWS and inner % 512 == 0 else 1


def scan(e: int, rows: int) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps."""
    if rows <= MATVEC_ROWS:
        return 16 if rows * e <= 2048 else 32, 1, 4
    return (32, 4, 4) if rows <= 16 else (64, 8, 4)


def ssd(head: int, rows: int) -> tuple[int, int]:
    """Channels of a program, and its warps."""
    return min(16 if rows <= FEW_ROWS else 64, power(head)), 4
