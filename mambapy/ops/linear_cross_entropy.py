"""The loss of a linear layer's logits, without the logits: the public op and its backends.

The logits of a batch, (t, v), are often the largest tensor of a training step: 1.6 GB for 16384
tokens and a vocabulary of 50,000, and their gradient is as large. Here they exist for some tokens
at a time. What the backward pass needs of a chunk is made at once, in its place:

    L = x W^T + bias        (c, v)    one product, in the dtype of the activations
    loss += sum(lse(L) - L[target])   in float32 or wider
    G = softmax(L) - 1[target]        over L
    grad x = G W,  grad W += G^T x    the sum over chunks in float32 or wider

and the backward pass only multiplies by the gradient of the loss.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, reference
from mambapy.ops.custom_op import differentiable, differentiable_gradients, transform
from mambapy.ops.reference import wide_dtype

# Largest chunk of logits in bytes. A larger one makes the products no faster.
CHUNK_CPU = 1 << 26
CHUNK_ACCELERATOR = 1 << 28
# Fewer bytes of logits than that are quicker at once, by torch's own operators, on a CPU.
FEW = 1 << 22
# Tokens of a chunk are a multiple of it, which suits matrix units.
MULTIPLE = 128

HAS_TRITON = importlib.util.find_spec("triton") is not None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits x W^T + bias: lse(logits) - logits[target], never all of them.

    Under autocast the logits are in its dtype, as those of a linear layer are.

    Args:
        x: (..., d) what the layer is given.
        weight: (v, d).
        target: (...) int64 in [0, vocab_size), or ignore_index where nothing is to be predicted.
        bias: (v) or None.
        vocab_size: the rows of the weight from here on are padding, which the hardware likes and
            no logit is made of; v without it.
        ignore_index: the target that counts for nothing.
        reduction: "mean" over the tokens that count, or "sum". (A mean over none is nan.)
        backend: "auto", "gpu", "chunked" or "reference".

    Returns:
        () the loss, in float32 or wider.

    Raises:
        ShapeError: the tensors do not fit, or a target is out of range.
        BackendError: the backend asked for cannot run this.

    Source: Wijmans et al. 2024 (arXiv 2411.09009), without their skipping of small gradients.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    _check(x, weight, target, bias, vocab_size, ignore_index)
    if reduction not in ("mean", "sum"):
        raise ShapeError(f"reduction={reduction!r} must be mean or sum")
    dtype = torch.promote_types(x.dtype, weight.dtype)
    kind = x.device.type
    if kind != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    x, target = x.flatten(0, -2), target.flatten()  # (t, d), (t)
    run = dispatch.pick("linear_cross_entropy", BACKENDS, backend, x, weight, target, bias)
    with dispatch.without_autocast(x):
        total = run(x, weight, target, bias, vocab_size, ignore_index, dtype)
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    ignore_index: int,
) -> None:
    """Raise a ShapeError unless the arguments fit each other."""
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x must be (..., d) and weight (v, d), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != x.shape[:-1] or target.dtype != torch.int64:
        raise ShapeError(
            f"target must be int64 {tuple(x.shape[:-1])}, one for each row of x, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if not 1 <= vocab_size <= len(weight):
        raise ShapeError(f"vocab_size={vocab_size} must be from 1 to v = {len(weight)}")
    for name, T in {"x": x, "weight": weight, "bias": bias}.items():
        if T is not None and not T.is_floating_point():
            raise ShapeError(f"{name} must be floating point, got {T.dtype}")
    for name, T in {"weight": weight, "target": target, "bias": bias}.items():
        if T is not None and T.device != x.device:
            raise ShapeError(f"{name} is on {T.device}, x on {x.device}")
    # Reading values back would stall a GPU, and stop torch.compile.
    if x.device.type == "cpu" and not dispatch.is_traced() and target.numel():
        real = target.where(target != ignore_index, 0)
        low, high = (int(bound) for bound in real.aminmax())
        if low < 0 or high >= vocab_size:
            raise ShapeError(
                f"targets must be in [0, vocab_size = {vocab_size}) or {ignore_index}, "
                f"got {low} to {high}"
            )


def _run(in_place: str) -> Callable[..., Tensor]:
    """The op in chunks, with one of the ways to make G of L."""

    def run(
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        vocab_size: int,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        if x.device.type == "cpu" and len(x) * weight.shape[0] * dtype.itemsize < FEW:
            return _at_once(x, weight, target, bias, vocab_size, ignore_index, dtype)
        tensors = (x, weight, bias)
        needed = [torch.is_grad_enabled() and T is not None and T.requires_grad for T in tensors]
        # torch.func's tensors do not say whether they are differentiated.
        if not torch.compiler.is_compiling() and transform() is not None:
            needed = [T is not None for T in tensors]
        return _call(x, weight, target, bias, vocab_size, ignore_index, dtype, in_place, needed)[0]

    return run


def _at_once(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The summed loss, with all logits."""
    ignored = target == ignore_index
    if dispatch.is_traced() or bool(ignored.any()):
        # What is ignored may hold anything.
        x = x.masked_fill(ignored[:, None], 0)
    x = x.to(dtype)
    L = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    L = L[:, :vocab_size].to(wide_dtype(L))
    return F.cross_entropy(L, target, ignore_index=ignore_index, reduction="sum")


@torch.library.custom_op("mambapy::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
    in_place: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients to x, weight and bias; empty where not needed."""
    total, grad_x, grad_weight, grad_bias = _empty(
        x, weight, target, bias, vocab_size, ignore_index, dtype, in_place, needed
    )
    total.zero_()
    if in_place == "triton":
        from mambapy.ops.gpu.cross_entropy import softmax_gradient
    else:
        softmax_gradient = _softmax_gradient
    W = weight.detach().to(dtype)
    shift = None if bias is None else bias.detach().to(dtype)
    kept = target != ignore_index
    # Asking would stall a GPU.
    all_kept = x.device.type == "cpu" and bool(kept.all())
    for i, rows in enumerate(_chunks(x, W)):
        inputs, aims = x.detach()[rows].to(dtype), target[rows]
        if not all_kept:
            # What is ignored may hold anything, and must not spoil the sums.
            inputs = inputs.masked_fill(~kept[rows, None], 0)
            aims = aims.masked_fill(~kept[rows], 0)
        L = F.linear(inputs, W, shift)  # (c, v)
        losses, G = softmax_gradient(L, aims, vocab_size, any(needed))
        total += (losses if all_kept else losses.masked_fill(~kept[rows], 0)).sum()
        if needed[0]:
            torch.mm(G, W, out=grad_x[rows])
        if needed[1]:
            _add_product(grad_weight, G, inputs, first=i == 0)
        if needed[2]:
            grad_bias += kept[rows].to(grad_bias.dtype) @ G.to(grad_bias.dtype)
    if needed[0] and not all_kept:
        grad_x.masked_fill_(~kept[:, None], 0)
    return total, grad_x, grad_weight, grad_bias


@_forward.register_fake
def _empty(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
    in_place: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` fills."""
    wide = wide_dtype(x, weight)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if needed[0] else (0,), dtype=dtype),
        x.new_zeros(weight.shape if needed[1] else (0,), dtype=wide),
        x.new_zeros(weight.shape[:1] if needed[2] else (0,), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients; the inputs are the caller's own and cost nothing."""
    x, weight, target, bias, ctx.vocab_size, ctx.ignore_index, *_ = inputs
    ctx.save_for_backward(x, weight, target, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """What `_forward` has found, times the gradient of the loss."""
    x, weight, target, bias, *found = ctx.saved_tensors
    tensors, needed = (x, weight, bias), [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads: list[Tensor | None] = [None, None, None]
    if grad is not None and torch.is_grad_enabled() and transform() is None:
        # The gradients are constants here, but not to who asks for a second derivative.
        grads = differentiable_gradients(
            lambda x, weight, bias: reference.linear_cross_entropy(
                x,
                weight,
                target,
                bias,
                vocab_size=ctx.vocab_size,
                ignore_index=ctx.ignore_index,
                reduction="sum",
            ),
            tensors,
            needed,
            (grad,),
        )
    elif grad is not None:
        # In float32: the mean's 1 / t would lose its digits in half precision.
        grads = [
            (grad * T.to(grad.dtype)).to(like.dtype) if need else None
            for T, like, need in zip(found, tensors, needed, strict=True)
        ]
    return (grads[0], grads[1], None, grads[2], None, None, None, None, None)


_call = differentiable(_forward, _setup_context, _backward)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """The tokens of each chunk, about equally many."""
    t, v = len(x), len(weight)
    limit = CHUNK_CPU if x.device.type == "cpu" else CHUNK_ACCELERATOR
    most = max(1, limit // (v * weight.element_size()))
    size = -(-t // max(1, -(-t // most)))
    size = min(-(-size // MULTIPLE) * MULTIPLE, max(most, 1))
    for start in range(0, t, max(size, 1)):
        yield slice(start, min(start + size, t))


def _softmax_gradient(
    L: Tensor, target: Tensor, vocab_size: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss (c), in float32 or wider, and G in L's dtype, with torch's operators."""
    log_p = torch.log_softmax(L[:, :vocab_size], dim=-1, dtype=wide_dtype(L))
    index = target[:, None]
    losses = -log_p.gather(1, index)[:, 0]
    if not wanted:
        return losses, L
    p = log_p.exp_()
    p.scatter_(1, index, p.gather(1, index) - 1)
    if p.dtype == L.dtype and p.shape == L.shape:
        return losses, p
    L[:, :vocab_size] = p
    L[:, vocab_size:] = 0
    return losses, L


def _add_product(total: Tensor, G: Tensor, x: Tensor, *, first: bool) -> None:
    """total (v, d) += G^T x, the sum over chunks in total's dtype."""
    if total.dtype == G.dtype:
        if first:
            torch.mm(G.t(), x, out=total)
        else:
            total.addmm_(G.t(), x)
    elif G.is_cuda:
        # The matrix units add up in float32 anyway; so nothing is rounded on the way.
        torch.addmm(total, G.t(), x, out_dtype=total.dtype, out=total)
    else:
        total += G.t() @ x


def _refuses_gpu(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    """Why the Triton kernel cannot run a call, or None."""
    if x.device.type != "cuda":
        return f"it needs CUDA tensors, x is on {x.device.type}"
    if torch.float64 in (x.dtype, weight.dtype):
        return "it is for float32 and shorter"
    return None if HAS_TRITON else "triton is not installed"


def _reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition, which knows no autocast."""
    return reference.linear_cross_entropy(
        x,
        weight,
        target,
        bias,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        reduction="sum",
    )


BACKENDS = dispatch.register(
    "linear_cross_entropy",
    [
        dispatch.Backend("gpu", _run("triton"), _refuses_gpu),
        dispatch.Backend("chunked", _run("torch")),
        dispatch.Backend("reference", _reference),
    ],
)
