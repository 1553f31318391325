"""What Mamba-2 and Mamba-3 have in kernels, `turn.py` and `gated_norm.py`, with gradients."""

# No annotations from the future here: torch 2.8 reads the schemas of operators from the real ones.
from typing import List

import torch
from torch import Tensor
from torch.library import custom_op

from mambapy.ops import reference
from mambapy.ops.cpu import gated_norm, turn
from mambapy.ops.custom_op import (
    differentiable,
    differentiable_gradients,
    never_twice,
    nothing,
    transform,
)
from mambapy.ops.dispatch import is_traced
from mambapy.ops.running_sum import until_end
from mambapy.ops.turning import keys_and_queries as in_torch


@custom_op("mambapy::cpu_turn", mutates_args=())
def _turn(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt: Tensor,
    omega: Tensor,
    before: Tensor,
    starts: Tensor | None,
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return turn.forward(B, C, B_bias, C_bias, dt, omega, before, starts, halves)


@_turn.register_fake
def _(B, C, B_bias, C_bias, dt, omega, before, starts, halves):
    b, l, r, _, n = B.shape
    h, s = before.shape[1:]
    shape = (b, l, r, h, n)
    return B.new_empty(shape), B.new_empty(shape), B.new_empty(b, l, h, s)


@custom_op("mambapy::cpu_turn_backward", mutates_args=())
def _turn_backward(
    grad_K: Tensor,
    grad_Q: Tensor,
    grad_phase: Tensor,
    phase: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt: Tensor,
    omega: Tensor,
    before: Tensor,
    starts: Tensor | None,
    halves: bool,
) -> List[Tensor]:
    """Gradients of B, C, dt, omega, before and of the biases that are given."""
    grads = turn.backward(grad_K, grad_Q, phase, B, C, B_bias, C_bias, halves)
    grad_B, grad_C, grad_B_bias, grad_C_bias, own = grads
    # A step's angle turns all later steps of its document.
    turns = until_end((own + grad_phase).flatten(2), starts).to(dt.dtype)  # (b, l, h s)
    turns = turns.unflatten(2, before.shape[1:])  # (b, l, h, s)
    found = [
        grad_B,
        grad_C,
        torch.einsum("blhs,bls->blh", turns, omega),
        torch.einsum("blhs,blh->bls", turns, dt),
        turns[:, 0].clone(),
    ]
    biases = ((B_bias, grad_B_bias), (C_bias, grad_C_bias))
    return [*found, *(grad.to(T.dtype) for T, grad in biases if T is not None)]


@_turn_backward.register_fake
def _(
    grad_K, grad_Q, grad_phase, phase, B, C, B_bias, C_bias, dt, omega, before, starts, halves
):  # fmt: skip
    given = [T for T in (B, C, dt, omega, before, B_bias, C_bias) if T is not None]
    return [T.new_empty(T.shape) for T in given]


def _setup(ctx, inputs, output):
    *tensors, ctx.halves = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradient(ctx, grad_K, grad_Q, grad_phase):
    *tensors, phase = ctx.saved_tensors
    if torch.is_grad_enabled() and transform() is None:
        *differentiable_tensors, starts = tensors
        grads = differentiable_gradients(
            lambda *given: in_torch(*given, starts, "halves" if ctx.halves else "pairs"),
            differentiable_tensors,
            ctx.needs_input_grad[:7],
            (grad_K, grad_Q, grad_phase),
        )
        return (*grads, None, None)
    found = iter(_call_backward(grad_K, grad_Q, grad_phase, phase, *tensors, ctx.halves))
    B, C, dt, omega, before = (next(found) for _ in range(5))
    biases = [None if T is None else next(found) for T in tensors[2:4]]
    return B, C, *biases, dt, omega, before, None, None


# vmap folds its axis into the batch where only what has a batch has one.
_call = differentiable(_turn, _setup, _gradient, rows=(0, 1, 4, 5, 6, 7))
_call_backward = differentiable(_turn_backward, nothing, never_twice, kind=list)


def keys_and_queries(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt: Tensor,
    omega: Tensor,
    before: Tensor,
    starts: Tensor | None,
    rotate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`turning.keys_and_queries`, fused."""
    return _call(B, C, B_bias, C_bias, dt, omega, before, starts, rotate == "halves")


@custom_op("mambapy::cpu_gated_rms_norm", mutates_args=())
def _norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    return gated_norm.forward(y, z, weight, n_groups, eps)


@_norm.register_fake
def _(y, z, weight, n_groups, eps):
    return y.new_empty(y.shape)


@custom_op("mambapy::cpu_gated_rms_norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return gated_norm.backward(grad, y, z, weight, n_groups, eps)


@_norm_backward.register_fake
def _(grad, y, z, weight, n_groups, eps):
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx, inputs, output):
    *tensors, ctx.n_groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradient(ctx, grad):
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled() and transform() is None:
        grads = differentiable_gradients(
            lambda y, z, weight: reference.gated_rms_norm(y, z, weight, ctx.n_groups, ctx.eps),
            tensors,
            ctx.needs_input_grad[:3],
            (grad,),
        )
    else:
        grads = _call_norm_backward(grad, *tensors, ctx.n_groups, ctx.eps)
    return (*grads, None, None)


_call_norm = differentiable(_norm, _norm_setup, _norm_gradient, rows=(0, 1))
_call_norm_backward = differentiable(_norm_backward, nothing, never_twice)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float, out: Tensor | None
) -> Tensor:
    """`gated_norm.forward` with autograd, where there is no `out`."""
    if out is not None and not is_traced():
        return gated_norm.forward(y, z, weight, n_groups, eps, out)
    return _call_norm(y, z, weight, n_groups, eps)
