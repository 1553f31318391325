"""The kernels of a CPU or a GPU as torch custom ops.

Autograd, torch.compile and export (fullgraph, dynamic b and l) and torch.func.vmap go through them.
Each backward is a custom op as well. It has no derivative of its own: a second backward raises.
"""

from functools import cache, partial
from importlib import import_module
from types import ModuleType

# A schema of older torch is read from List, not from list.
from typing import Any, List, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from mambapy.ops import reference
from mambapy.ops.custom_op import (
    differentiable,
    differentiable_gradients,
    never_twice,
    nothing,
    transform,
)
from mambapy.ops.direction import conv_from_the_end, scan_from_the_end
from mambapy.ops.dispatch import is_traced


@cache
def _module(name: str, device_type: str) -> ModuleType:
    """`name` of ops/cpu or ops/gpu: two modules with the same functions."""
    return import_module(f"mambapy.ops.{'gpu' if device_type == 'cuda' else 'cpu'}.{name}")


def kernels(name: str, x: Tensor) -> ModuleType:
    """The kernels of an op where x is."""
    return _module(name, x.device.type)


def is_on_gpu(T: Tensor) -> bool:
    """Whether the kernels for T are those of ops/gpu, which can write into halves of rows."""
    return T.is_cuda


@custom_op("mambapy::selective_scan", mutates_args=())
def _scan(
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
    save: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("selective_scan", x).forward(
        x, dt, A, B, C, D, z,
        dt_bias=dt_bias, dt_softplus=dt_softplus, state=state, seq_idx=seq_idx, reverse=reverse,
        save=save,
    )  # fmt: skip


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, seq_idx, dt_softplus, save, reverse=False):
    b, l, e = x.shape
    n = A.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    starts = kernels("selective_scan", x).saved_shape(b, l, e, n) if save else (0,)
    y = x.new_empty(b, l, e)
    return y, x.new_empty(b, e, n, dtype=wide), x.new_empty(starts, dtype=wide)


@custom_op("mambapy::selective_scan_backward", mutates_args=())
def _scan_backward(
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
    reverse: bool = False,
) -> List[Tensor]:
    grads = kernels("selective_scan", x).backward(
        grad_y, grad_last, starts,
        x, dt, A, B, C, D, z, dt_bias, state, seq_idx, dt_softplus, reverse,
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@_scan_backward.register_fake
def _(
    grad_y, grad_last, starts,
    x, dt, A, B, C, D, z, dt_bias, state, seq_idx, dt_softplus, reverse=False,
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, state)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs if t is not None]


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.save, ctx.reverse = inputs
    # `joint_gradient` has made it, and waits for its gradient.
    ctx.is_half = getattr(tensors[6], "mambapy_is_half", False)
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _scan_gradient(ctx, grad_y, grad_last, grad_starts):
    if torch.is_grad_enabled() and transform() is None:
        _, *tensors, seq_idx = ctx.saved_tensors
        scan = reference.selective_scan
        scan = partial(scan_from_the_end, scan) if ctx.reverse else scan
        grads = differentiable_gradients(
            lambda x, dt, A, B, C, D, z, dt_bias, state: scan(
                *(x, dt, A, B, C, D, z),
                dt_bias=dt_bias,
                dt_softplus=ctx.dt_softplus,
                state=state,
                seq_idx=seq_idx,
            ),
            tensors,
            ctx.needs_input_grad[:9],
            (grad_y, grad_last),
        )
        return (*grads, None, None, None, None)
    if not ctx.save:
        raise RuntimeError("selective_scan ran without save=True: no gradient")
    starts, *tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    options = ctx.dt_softplus, ctx.reverse
    grad_z = beside_a_gap(tensors[6]) if ctx.is_half else None
    if grad_z is not None:
        backward = kernels("selective_scan", grad_y).backward
        grads = backward(grad_y, grad_last, starts, *tensors, *options, grad_z=grad_z)
        return (*grads, None, None, None, None)
    grads = iter(_call_scan_backward(grad_y, grad_last, starts, *tensors, *options))
    return (*[None if t is None else next(grads) for t in tensors[:9]], None, None, None, None)


def beside_a_gap(z: Tensor | None) -> Tensor | None:
    """Where the gradient of a gate of `joint_gradient` goes, on a GPU: half of wider rows.

    The scan fills the second half, the convolution the first.
    """
    if z is None or not is_on_gpu(z) or is_traced():
        return None
    b, l, e = z.shape
    if z.stride()[1:] != (2 * e, 1):
        return None
    whole = z.new_empty(b, l, 2 * e)
    grad_z: Any = whole[..., e:]
    grad_z.mambapy_whole = whole
    return cast(Tensor, grad_z)


_call_scan = differentiable(_scan, _scan_setup, _scan_gradient, rows=(0, 1, 3, 4, 6, 8, 9))
# Gradients of weights are sums over the batch: folding would add up what vmap keeps apart.
_call_scan_backward = differentiable(_scan_backward, nothing, never_twice, kind=list)


@custom_op("mambapy::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool = False,
) -> Tensor:
    return kernels("conv1d", x).forward(
        x, weight, bias, activation=silu, state=state, seq_idx=seq_idx, reverse=reverse
    )


@_conv.register_fake
def _(x, weight, bias, state, seq_idx, silu, reverse=False):
    return x.new_empty(x.shape)


@custom_op("mambapy::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool = False,
) -> List[Tensor]:
    grads = kernels("conv1d", x).backward(grad_y, x, weight, bias, state, seq_idx, silu, reverse)
    return [grad.contiguous() for grad in grads if grad is not None]


@_conv_backward.register_fake
def _(grad_y, x, weight, bias, state, seq_idx, silu, reverse=False):
    inputs = (x, weight, bias, state)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs if t is not None]


def _conv_setup(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradient(ctx, grad_y):
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled() and transform() is None:
        *tensors, seq_idx = tensors
        conv = reference.causal_conv1d
        conv = partial(conv_from_the_end, conv) if ctx.reverse else conv
        grads = differentiable_gradients(
            lambda x, weight, bias, state: conv(
                *(x, weight, bias),
                activation="silu" if ctx.silu else None,
                state=state,
                seq_idx=seq_idx,
            ),
            tensors,
            ctx.needs_input_grad[:4],
            (grad_y,),
        )
        return (*grads, None, None, None)
    grads = iter(call_conv_backward(grad_y, *tensors, ctx.silu, ctx.reverse))
    return (*[None if t is None else next(grads) for t in tensors[:4]], None, None, None)


call_conv = differentiable(_conv, _conv_setup, _conv_gradient, rows=(0, 3, 4))
call_conv_backward = differentiable(_conv_backward, nothing, never_twice, kind=list)


@custom_op("mambapy::rms_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, s = kernels("norm", x).forward(x, weight, residual, eps, dtype)
    return y, x.new_empty(0) if s is None else s


@_norm.register_fake
def _(x, weight, residual, eps, dtype):
    s = x.new_empty(0)
    if residual is not None:
        s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=dtype), s


@custom_op("mambapy::rms_norm_backward", mutates_args=())
def _norm_backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    # The gradient to x too, where that is in another dtype than s.
    narrow = s.new_empty(0 if x_dtype == s.dtype else s.shape, dtype=x_dtype)
    out = None if x_dtype == s.dtype else narrow
    grads = kernels("norm", s).backward(grad_y, grad_s, s, weight, eps, s.dtype, out)
    return *grads, narrow


@_norm_backward.register_fake
def _(grad_y, grad_s, s, weight, eps, x_dtype):
    narrow = s.new_empty(0 if x_dtype == s.dtype else s.shape, dtype=x_dtype)
    return s.new_empty(s.shape), weight.new_empty(weight.shape), narrow


def _norm_setup(ctx, inputs, output):
    x, weight, residual, ctx.eps, ctx.y_dtype = inputs
    ctx.fused, ctx.dtype = residual is not None, x.dtype
    ctx.residual_dtype = residual.dtype if ctx.fused else None
    ctx.save_for_backward(output[1] if ctx.fused else x, weight)
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx, grad_y, grad_s):
    s, weight = ctx.saved_tensors
    grad_s = grad_s if ctx.fused else None
    if grad_y is None:
        grad_y = torch.zeros_like(s, dtype=ctx.y_dtype)
    if torch.is_grad_enabled() and transform() is None:
        for_x, for_weight, for_residual = ctx.needs_input_grad[:3]
        grad, grad_weight = differentiable_gradients(
            # s as a view: it is an input as well.
            lambda s, weight: (
                reference.rms_norm(s, weight, ctx.eps, ctx.y_dtype),
                s.view_as(s),
            ),
            (s, weight),
            (for_x or for_residual, for_weight),
            (grad_y, grad_s),
        )
        grad_x = grad.to(ctx.dtype) if for_x else None
        grad_residual = grad.to(ctx.residual_dtype) if for_residual else None
        return grad_x, grad_weight, grad_residual, None, None
    grad, grad_weight, narrow = _call_norm_backward(grad_y, grad_s, s, weight, ctx.eps, ctx.dtype)
    grad_x = grad if ctx.dtype == s.dtype else narrow
    return grad_x, grad_weight, grad.to(ctx.residual_dtype) if ctx.fused else None, None, None


_call_norm = differentiable(_norm, _norm_setup, _norm_gradient, rows=(0, 2))
_call_norm_backward = differentiable(_norm_backward, nothing, never_twice)


def _has_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd watches this call. If not, a kernel is called directly, in half the time."""
    if forward_ad._current_level >= 0:
        # The operator says what it thinks of that.
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def selective_scan(
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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels' `forward` with autograd: y (b, l, e) and the last state (b, e, n)."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, state)
    save = _has_gradient(*tensors)
    if save or is_traced():
        # Inside torch.func a tensor that is differentiated may not say so here.
        save = save or not torch.compiler.is_compiling()
        y, last, _ = _call_scan(*tensors, seq_idx, dt_softplus, save, reverse)
        return y, last
    y, last, _ = kernels("selective_scan", x).forward(
        x, dt, A, B, C, D, z,
        dt_bias=dt_bias, dt_softplus=dt_softplus, state=state, seq_idx=seq_idx, reverse=reverse,
        out=out,
    )  # fmt: skip
    return y, last


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The kernels' `forward` with autograd; `activation` is None or "silu"."""
    silu = activation == "silu"
    if _has_gradient(x, weight, bias, state) or is_traced():
        return call_conv(x, weight, bias, state, seq_idx, silu, reverse)
    return kernels("conv1d", x).forward(
        x, weight, bias, activation=silu, state=state, seq_idx=seq_idx, reverse=reverse, out=out
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The kernels' `forward` with autograd: y, and x + residual (None without a residual)."""
    dtype = dtype or x.dtype
    if not (_has_gradient(x, weight, residual) or is_traced()):
        return kernels("norm", x).forward(x, weight, residual, eps, dtype)
    y, s = _call_norm(x, weight, residual, eps, dtype)
    return y, None if residual is None else s
