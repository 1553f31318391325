"""How a kernel sees tensors: slots of four integers, and rows staged into buffers of the
arithmetic's type.

A kernel takes one pointer, to an int64 array: first the fields of `COUNTERS` and `sizes`, then a
slot for each tensor. A slot is (address, bytes between batches, bytes between steps, dtype code); a
missing tensor has address 0. So one compiled kernel serves every storage dtype, layout and set of
optional tensors, and both directions of time: a slot that runs backwards has the address of the
last step and a negative distance between steps.

Kernels never touch a caller's tensor in their inner loops. They stage a few rows of one channel
block into local buffers (converted to float32 or float64, the tail of the block filled with zeros),
compute there on whole vectors, and write rows back. The conversions, the strides and the ragged
last block live here and nowhere else.
"""

from collections.abc import Collection

import numpy as np
import torch
from numba import types
from numba.extending import overload

from mambapy.ops.cpu.memory import (
    load,
    load_bfloat16,
    load_float16,
    load_int8,
    pointer,
    store,
    store_bfloat16,
    store_float16,
)
from mambapy.ops.cpu.simd import INLINE, LANES, inline, inner, zeros

# The arguments begin with two shared counters and the scratch memory, then the kernel's own sizes,
# then the slots.
WORKER, NEXT_TASK, SCRATCH, SCRATCH_BYTES, SIZES, FIRST_SLOT = 0, 1, 2, 3, 4, 16

CODES = {
    torch.float32: 4,
    torch.float64: 8,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 9,
    torch.int8: 1,
}


def slot(tensor: torch.Tensor | None, backwards: bool = False) -> tuple[int, int, int, int]:
    """The four integers that describe a (b, l, e), (b, e) or (e) tensor, contiguous in its last
    dimension; with `backwards`, of (b, l, e) as if flipped along l."""
    if tensor is None:
        return 0, 0, 0, 4
    code = CODES[tensor.dtype]
    strides = tensor.stride()[:-1]
    size = tensor.element_size()
    batch = strides[0] * size if strides else 0
    step = strides[1] * size if len(strides) > 1 else 0
    if backwards:
        return tensor.data_ptr() + (tensor.shape[1] - 1) * step, batch, -step, code
    return tensor.data_ptr(), batch, step, code


def rowwise(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor`, copied only where a kernel in the arithmetic of `dtype` could not read it."""
    if (tensor.dtype == torch.float64) != (dtype == torch.float64) or tensor.dtype not in CODES:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def result_like(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Where a kernel writes a result of x's shape and dtype: `out` if it can, else a new tensor."""
    if out is not None and out.dtype == x.dtype and out.stride(-1) == 1:
        return out
    return torch.empty(x.shape, dtype=x.dtype)


def documents(seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """seq_idx (b, l) as a tensor that has a slot: (b, l, 1) int64."""
    return None if seq_idx is None else seq_idx.to(torch.int64).unsqueeze(-1)


def pack(
    sizes: list[int], tensors: list[torch.Tensor | None], backwards: Collection[int] = ()
) -> np.ndarray:
    """The int64 array that a kernel takes; the slots in `backwards` run from the last step on."""
    args = [0] * SIZES + [*sizes, *([0] * (FIRST_SLOT - SIZES - len(sizes)))]
    for which, tensor in enumerate(tensors):
        args += slot(tensor, which in backwards)
    return np.array(args, dtype=np.int64)


@inline
def given(args, which):
    """Whether the tensor in slot `which` exists."""
    return args[FIRST_SLOT + 4 * which] != 0


@inline
def size_of(code):
    """Bytes of one number of a dtype code."""
    return 8 if code >= 8 else (2 if code == 3 else code)


@inline
def place(args, which, batch, step, column):
    """The address of element (batch, step, column) of slot `which`."""
    at = FIRST_SLOT + 4 * which
    offset = batch * args[at + 1] + step * args[at + 2] + column * size_of(args[at + 3])
    return args[at] + offset


def load_some(address, code, F):
    """LANES numbers of the dtype of `code` at `address`, as a vector of `F`."""


def store_some(address, code, value):
    """Write a vector at `address` in the dtype of `code`."""


@overload(load_some, jit_options=INLINE)
def _load_some(address, code, F):
    def from_any(address, code, F):
        if code == 4:
            return load(pointer(address, np.float32), 0)
        if code == 2:
            return load_bfloat16(pointer(address, np.uint16), 0)
        if code == 1:
            return load_int8(pointer(address, np.int8), 0)
        return load_float16(pointer(address, np.uint16), 0)

    def from_double(address, code, F):
        return load(pointer(address, np.float64), 0)

    return from_double if F.dtype == types.float64 else from_any


@overload(store_some, jit_options=INLINE)
def _store_some(address, code, value):
    def to_any(address, code, value):
        if code == 4:
            store(pointer(address, np.float32), 0, value)
        elif code == 2:
            store_bfloat16(pointer(address, np.uint16), 0, value)
        else:
            store_float16(pointer(address, np.uint16), 0, value)

    def to_double(address, code, value):
        store(pointer(address, np.float64), 0, value)

    return to_double if value.dtype == types.float64 else to_any


@inline
def copy_bytes(source, target, count):
    """Copy `count` bytes."""
    a, b = pointer(source, np.uint8), pointer(target, np.uint8)
    for i in range(count):
        b[i] = a[i]


@inline
def _stage_row(address, code, count, base, offset, F):
    """One row of `stage`."""
    buffer = pointer(base, F)
    whole = count // LANES
    for j in range(whole):
        source = address + j * LANES * size_of(code)
        store(buffer, offset + j * LANES, load_some(source, code, F))
    rest = count - whole * LANES
    if rest > 0:
        store(buffer, 0, zeros(F))
        copy_bytes(address + whole * LANES * size_of(code), base, rest * size_of(code))
        store(buffer, offset + whole * LANES, load_some(base, code, F))


@inner
def stage(args, which, batch, step, rows, column, count, base, offset, pitch, F):
    """Read `rows` steps of `count` numbers of slot `which` to base[offset], base[offset + pitch],
    ...

    Numbers are converted to `F`, and each row is filled with zeros up to whole vectors. base[0:16]
    is spare room of the caller's buffer (an address): the ragged end passes through it.
    """
    address = place(args, which, batch, step, column)
    at = FIRST_SLOT + 4 * which
    code, stride = args[at + 3], args[at + 2]
    # A constant in each branch, so that the test for the dtype is not in the loop.
    for t in range(rows):
        if code == 4:
            _stage_row(address + t * stride, 4, count, base, offset + t * pitch, F)
        else:
            _stage_row(address + t * stride, code, count, base, offset + t * pitch, F)


@inline
def _unstage_row(address, code, count, base, offset, F):
    """One row of `unstage`."""
    buffer = pointer(base, F)
    whole = count // LANES
    for j in range(whole):
        target = address + j * LANES * size_of(code)
        store_some(target, code, load(buffer, offset + j * LANES))
    rest = count - whole * LANES
    if rest > 0:
        store_some(base, code, load(buffer, offset + whole * LANES))
        copy_bytes(base, address + whole * LANES * size_of(code), rest * size_of(code))


@inner
def unstage(args, which, batch, step, rows, column, count, base, offset, pitch, F):
    """Write `rows` steps of `count` numbers from base[offset], ... to slot `which`, converted to
    its dtype."""
    address = place(args, which, batch, step, column)
    at = FIRST_SLOT + 4 * which
    code, stride = args[at + 3], args[at + 2]
    for t in range(rows):
        if code == 4:
            _unstage_row(address + t * stride, 4, count, base, offset + t * pitch, F)
        else:
            _unstage_row(address + t * stride, code, count, base, offset + t * pitch, F)
