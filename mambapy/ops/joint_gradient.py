"""One gradient for a mixer's x and z on a GPU: the scan and the convolution write into its halves.

Of xz.chunk(2, -1) autograd makes the gradient by copying those of both halves. Here that of z comes
from the scan's backward pass as the second half of a tensor (`kernel_ops.beside_a_gap`), and the
convolution's writes that of x into the first.
"""

import torch
from torch import Tensor

from mambapy.ops import kernel_ops, reference
from mambapy.ops.custom_op import differentiable_gradients
from mambapy.ops.dispatch import is_traced


def conv_and_gate(
    xz: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_conv1d` of the first half of xz (b, l, 2e), twice, and the other half: (b, l, e).

    Only for a xz with a gradient, outside of torch.compile and torch.func.
    """
    y, again, z = _ConvAndGate.apply(xz, weight, bias, seq_idx, activation == "silu")
    # For the scan, which makes room for both gradients where it finds this.
    z.mambapy_is_half = True
    return y, again, z


class _ConvAndGate(torch.autograd.Function):
    """The convolution y of the first half of xz, y again, and the other half z.

    For its gradients: those of x and z are halves of one tensor, where z's comes with room for x's;
    those of y and y again are added on the way.
    """

    @staticmethod
    def forward(
        xz: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool
    ):
        x, z = _halves(xz)
        y = kernel_ops.call_conv(x, weight, bias, None, seq_idx, silu, False)
        return y, y.detach(), z

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, grad_again, grad_z):
        xz, weight, bias, seq_idx = ctx.saved_tensors
        x, z = _halves(xz)
        if grad_y is None:
            grad_y, grad_again = grad_again, None
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        if torch.is_grad_enabled():
            grads = differentiable_gradients(
                lambda xz, weight, bias: _reference_conv_and_gate(
                    xz, weight, bias, seq_idx, ctx.silu
                ),
                (xz, weight, bias),
                ctx.needs_input_grad[:3],
                (grad_y, grad_again, grad_z),
            )
            return (*grads, None, None)
        # The room is given once.
        whole = None if grad_z is None else grad_z.__dict__.pop("mambapy_whole", None)
        if whole is None or (whole.shape, whole.dtype) != (xz.shape, xz.dtype):
            whole = xz.new_empty(xz.shape)
            _halves(whole)[1].copy_(torch.zeros_like(z) if grad_z is None else grad_z)
        into_x, _ = _halves(whole)
        given = x, weight, bias, None, seq_idx, ctx.silu, False
        if kernel_ops.is_on_gpu(x) and not is_traced():
            backward = kernel_ops.kernels("conv1d", x).backward
            _, grad_weight, grad_bias, _ = backward(grad_y, *given, more=grad_again, grad_x=into_x)
        else:
            grad_y = grad_y if grad_again is None else grad_y + grad_again
            grad_x, grad_weight, *grad_bias = kernel_ops.call_conv_backward(grad_y, *given)
            into_x.copy_(grad_x)
            grad_bias = grad_bias[0] if grad_bias else None
        return whole, grad_weight, grad_bias, None, None


def _halves(xz: Tensor) -> tuple[Tensor, Tensor]:
    """xz (..., 2e) as two views (..., e)."""
    e = xz.shape[-1] // 2
    return xz[..., :e], xz[..., e:]


def _reference_conv_and_gate(xz, weight, bias, seq_idx, silu):
    """What `_ConvAndGate` is."""
    x, z = _halves(xz)
    activation = "silu" if silu else None
    y = reference.causal_conv1d(x, weight, bias, activation=activation, seq_idx=seq_idx)
    return y, y.view_as(y), z
