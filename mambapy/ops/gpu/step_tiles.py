"""How much of a stage one program of `step_kernel.py` takes: few sizes, so that little compiles.

At few rows a step is a chain of kernels that each last a few microseconds. What counts is that
there are programs for every multiprocessor, that each has much to read at once, and that they are
small enough to be there while the kernel before still runs. Sizes are the best ones measured on an
H100, for models of 130 million and 2.8 billion parameters.
"""

import torch
import triton

# Programs that keep every multiprocessor of a large card busy.
PROGRAMS = 192
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


def summed(size: int) -> int:
    """Numbers of each row that a product on the tensor cores sums over: 16 at least."""
    return max(power(size), 16)


def matvec(out: int, inner: int, rows: int) -> tuple[int, int, int, int]:
    """Outputs of a warp, inputs at a time, such blocks on their way, and a program's warps."""
    J = 4 if inner <= 1024 or out > 16384 else 2
    while J > 1 and out // (4 * J) < PROGRAMS:
        J //= 2
    # 16 bytes a lane; 64 registers of weights on their way.
    return J, min(power(inner), 256), 16 // J, 4


def matmul(out: int, inner: int, rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Outputs, rows and inputs of a program at a time, its warps, and loads in flight."""
    half = dtype.itemsize == 2
    N, B, K, warps = 16, 16, 256, 4
    if out > 16384:
        N, B, K, warps = 64, min(max(power(rows), 16), 64), 128, 8
    elif out < 512:
        K = 128
    elif -(-out // 64) * -(-rows // 16) >= PROGRAMS // 4:
        wide = rows > 16 and -(-out // 64) * -(-rows // 32) >= PROGRAMS // 2
        N, B, K = 64 if rows > 16 else 32, 32 if wide else 16, 128
    # Products of float32 have no tensor cores, and are written out in full.
    K = K if half else 32
    return N, B, min(K, summed(inner)), warps, 4


def conv(e: int, rows: int) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps."""
    if rows <= MATVEC_ROWS:
        E = max(64, power(-(-e // PARTS)))
        return E, 1, 4 if E < 128 else 8
    return 128, 1 if rows <= FEW_ROWS else 4, 4


def apart(out: int, inner: int, rows: int) -> bool:
    """Whether the product (out, inner) behind a convolution is better a kernel of its own."""
    return rows > MATVEC_ROWS or out * inner > 400_000


def parts(inner: int, rows: int) -> int:
    """In how many parts that product is then calculated, which the scan adds up."""
    return 4 if rows > MATVEC_ROWS and inner % 512 == 0 else 1


def scan(e: int, rows: int) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps."""
    return 32, 1 if rows <= MATVEC_ROWS else 2, 4


def ssd(head: int, rows: int) -> tuple[int, int]:
    """Channels of a program, and its warps."""
    return min(16 if rows <= FEW_ROWS else 64, power(head)), 4
