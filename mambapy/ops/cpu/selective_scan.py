"""Selective scan (Mamba-1), forward and backward, on plain tensors; autograd is in
`ops/kernel_ops.py`."""

import torch
from torch import Tensor

from mambapy.ops.cpu import scan_backward, scan_forward
from mambapy.ops.cpu.rows import documents, pack, result_like, rowwise
from mambapy.ops.cpu.scan_forward import CHUNK, WIDTH
from mambapy.ops.cpu.simd import LANES
from mambapy.ops.cpu.threads import arithmetic, compiled, run


def _weights(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Small tensors as contiguous ones of the arithmetic's dtype."""
    return [None if t is None else t.detach().to(dtype).contiguous() for t in tensors]


def _inputs(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Large tensors as kernels take them: any strides but the last, any dtype that loads to
    `dtype`."""
    return [None if t is None else rowwise(t.detach(), dtype) for t in tensors]


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def channels_of_a_task(b: int, e: int) -> int:
    """The width of a block of channels: full, or less where that leaves no thread idle.

    Narrower blocks cost more for each channel, as B and C are read for each block.
    """
    threads = torch.get_num_threads()
    cost = {WIDTH: 1.0, WIDTH // 2: 1.03, LANES: 1.08}
    return min(cost, key=lambda width: -(-b * -(-e // width) // threads) * width * cost[width])


def saved_shape(b: int, l: int, e: int, n: int) -> tuple[int, int]:
    """Shape of the saved states: one state each CHUNK steps, but for the first.

    A row holds (chunks - 1, e in groups of LANES, n, LANES) and two zeros: torch.export would take
    a size of 0 or 1 for a constant.
    """
    return b, ((l - 1) // CHUNK) * -(-e // LANES) * n * LANES + 2


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba-1 recurrence: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = (C_t h_t + D x_t)
    silu(z_t).

    Args:
        x: (b, l, e) input after convolution and SiLU.
        dt: (b, l, e) step sizes, > 0 once `dt_bias` and softplus are applied, where asked for.
        A: (e, n), < 0.    B, C: (b, l, n).    D, dt_bias: (e).    z: (b, l, e) gate.
        state: (b, e, n) state before the first step; of the first step's document.
        seq_idx: (b, l) int64; the state restarts from zero where it differs from the step before.
        reverse: whether steps are taken from the last to the first.
        save: also return what `backward` needs.
        out: where to write y, if a kernel can; it may be x, dt or z.

    Returns:
        y (b, l, e) in the dtype of x, the last state (b, e, n), and the saved states (empty unless
        `save`), both in float32 (float64 for float64 inputs).

    Source: Gu & Dao 2023 (arXiv 2312.00752), Algorithm 2.
    """
    b, l, e = x.shape
    n = A.shape[1]
    F = arithmetic(x.dtype)
    y = result_like(x, out)
    last = torch.empty(b, e, n, dtype=F)
    starts = torch.empty(saved_shape(b, l, e, n) if save else (0,), dtype=F)
    starts[..., -2:] = 0
    A, D, dt_bias, state = _weights(F, A, D, dt_bias, state)
    x, dt, B, C, z = _inputs(F, x, dt, B, C, z)
    saved = starts if starts.numel() else None
    tensors = [x, dt, A, B, C, D, z, dt_bias, state, documents(seq_idx), y, saved, last]
    block = channels_of_a_task(b, e)
    backwards = scan_forward.STEPWISE if reverse else ()
    args = pack([b, l, e, n, dt_softplus, block], tensors, backwards)
    scratch = scan_forward.forward_floats(n) * F.itemsize
    run(compiled(scan_forward.build_forward, F), args, b * -(-e // block), scratch, b * l * e * n)
    return y, last, starts


def backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of `forward` to (x, dt, A, B, C, D, z, dt_bias, state); equations in
    `scan_backward.py`."""
    b, l, e = x.shape
    n = A.shape[1]
    F = arithmetic(x.dtype)
    block = channels_of_a_task(b, e)
    blocks = -(-e // block)
    grad_x, grad_dt = torch.empty(b, l, e, dtype=x.dtype), torch.empty(b, l, e, dtype=dt.dtype)
    grad_z = None if z is None else torch.empty(b, l, e, dtype=z.dtype)
    # One part for each block of channels, or for each row of the batch.
    grad_B, grad_C = torch.empty(blocks, b, l, n, dtype=F), torch.empty(blocks, b, l, n, dtype=F)
    part_B, part_C = grad_B.flatten(0, 1), grad_C.flatten(0, 1)  # (blocks b, l, n)
    grad_A = torch.empty(b, e, n, dtype=F)
    grad_D = None if D is None else torch.empty(b, e, dtype=F)
    grad_bias = None if dt_bias is None else torch.empty(b, e, dtype=F)
    grad_state = None if state is None else torch.empty(b, e, n, dtype=F)
    originals = [x, dt, A, B, C, D, z, dt_bias, state]
    A, D, dt_bias, state, grad_last = _weights(F, A, D, dt_bias, state, grad_last)
    x, dt, B, C, z, grad_y = _inputs(F, x, dt, B, C, z, grad_y)
    saved = starts if starts.numel() else None
    tensors = [x, dt, A, B, C, D, z, dt_bias, state, documents(seq_idx), saved]
    tensors += [grad_y, grad_last]
    tensors += [grad_x, grad_dt, grad_A, part_B, part_C, grad_D, grad_z, grad_bias, grad_state]
    backwards = scan_backward.STEPWISE if reverse else ()
    args = pack([b, l, e, n, dt_softplus, block], tensors, backwards)
    scratch = scan_backward.backward_floats(n) * F.itemsize
    run(compiled(scan_backward.build_backward, F), args, b * blocks, scratch, 3 * b * l * e * n)

    parts = [grad_A, grad_B, grad_C, grad_D, grad_bias]
    grad_A, grad_B, grad_C, grad_D, grad_bias = [None if p is None else _sum(p) for p in parts]
    grads = [grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state]
    return [
        None if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, originals, strict=True)
    ]
