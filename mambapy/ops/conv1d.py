"""The short causal convolution before the scan: the public op, its one-step twin, its state."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, official, reference
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.direction import conv_from_the_end
from mambapy.ops.gpu import backend as gpu
from mambapy.ops.selective_scan import check_seq_idx


@overload
def causal_conv1d(
    *args: Any, return_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def causal_conv1d(*args: Any, **kwargs: Any) -> Tensor: ...
def causal_conv1d(  # type: ignore[misc]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j}).

    Args:
        x: (b, l, e) input, l >= 1.
        weight: (e, k), the last tap is the current token's.
        bias: (e) or None.
        activation: "silu" or None.
        state: (b, k-1, e) the inputs before the first; zeros without it.
        seq_idx: (b, l) integers, the document of each token. A tap into another document is zero;
            the initial state belongs to the first token's document.
        reverse: whether time runs from the last step to the first: y_t looks at x_t, x_{t+1}, ...
            The result is that of flipping x and seq_idx along l, and y back; states, too, stand in
            the order of processing, so the last of them is the input nearest to x.
        return_state: whether to return the last k-1 inputs too, see `conv_state`.
        out: (b, l, e) where to write y, in x's dtype; it may be x itself, which saves memory. Only
            where no gradient is needed.
        backend: "auto", "cpu", "official" or "reference".

    Returns:
        y (b, l, e) in x's dtype; with `return_state` also the state (b, k-1, e).

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot run this, or `out` would need a gradient.

    Source: Gu & Dao 2023 (arXiv 2312.00752), figure 3.
    """
    _check(x, weight, bias, activation, state, seq_idx)
    dispatch.check_out(out, x, weight, bias, state)
    options: dict[str, Any] = {"activation": activation, "state": state, "seq_idx": seq_idx}
    run = dispatch.pick("causal_conv1d", BACKENDS, backend, x, weight, bias, **options)
    if run in (cpu.causal_conv1d, gpu.causal_conv1d):
        options |= {"out": out, "reverse": reverse}
    elif reverse:
        run = partial(conv_from_the_end, run)
    # Before x may be overwritten.
    last = _last_inputs(x, weight.shape[1] - 1, state, seq_idx, reverse) if return_state else x
    with dispatch.without_autocast(x):
        y = dispatch.written(run(x, weight, bias, **options), out)
    return (y, last) if return_state else y


def conv_and_gate(
    xz: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    overwrite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_conv1d` of the first half of the channels; the second half, a gate, stays as it is.

    The same as `x, z = xz.chunk(2, dim=-1)` and a convolution of x, twice: one for each of two
    readers. But where a GPU calculates gradients, `selective_scan` and the convolution write those
    of z and x into one tensor, and what comes from both readers is added on the way.

    Args:
        xz: (b, l, 2e), l >= 1.
        weight: (e, k), the last tap is the current token's.
        bias: (e) or None.
        activation: "silu" or None.
        state: (b, k-1, e) the inputs before the first; zeros without it.
        seq_idx: (b, l) integers, the document of each token.
        overwrite: whether the result may be written over x, which saves memory. Only where no
            gradient is needed.
        backend: as for `causal_conv1d`.

    Returns:
        y (b, l, e) in xz's dtype; the same y again; z (b, l, e), a view of xz.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot run this.

    Source: Gu & Dao 2023 (arXiv 2312.00752), figure 3.
    """
    if xz.dim() != 3 or xz.shape[2] % 2:
        raise ShapeError(f"xz must be (b, l, 2e), got {tuple(xz.shape)}")
    x, z = xz.chunk(2, dim=-1)  # (b, l, e)
    options: dict[str, Any] = {"activation": activation, "seq_idx": seq_idx}
    if state is None and gpu.has_joint_gradient(xz):
        _check(x, weight, bias, activation, None, seq_idx)
        run = dispatch.pick("causal_conv1d", BACKENDS, backend, x, weight, bias, **options)
        if run is gpu.causal_conv1d:
            with dispatch.without_autocast(x):
                return gpu.conv_and_gate(xz, weight, bias, **options)
    out = x if overwrite else None
    y = causal_conv1d(x, weight, bias, state=state, out=out, backend=backend, **options)
    return y, y, z


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`.

    Args:
        x: (b, e) input.
        weight: (e, k).
        bias: (e) or None.
        state: (b, k-1, e) the inputs before this one; it is not written to.
        activation: "silu" or None.
        backend: "auto", "cpu" (where no gradient is needed) or "reference".

    Returns:
        y (b, e) in x's dtype, and the state after the step (b, k-1, e).

    Raises:
        ShapeError: a shape, dtype or device does not fit.
    """
    _check(x.unsqueeze(1), weight, bias, activation, state, None)
    options = {"state": state, "activation": activation}
    run = dispatch.pick("causal_conv1d_step", STEP_BACKENDS, backend, x, weight, bias, **options)
    with dispatch.without_autocast(x):
        return run(x, weight, bias, **options)


def conv_state(
    x: Tensor,
    width: int,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The last `width` inputs of each row's last document, zeros before its first.

    Args:
        x: (b, l, e) inputs.
        width: k - 1, how many to keep, >= 0.
        state: (b, k-1, e) the inputs before x.
        seq_idx: (b, l) the document of each token.
        lengths: (b) how many tokens of each row are real, 0 to l; the rest is padding on the
            right. All are real without it.

    Returns:
        (b, k-1, e), in the state's dtype where there is one, else in x's.
    """
    b, l, e = x.shape
    before = x.new_zeros(b, width, e) if state is None else state
    if lengths is None and seq_idx is None:
        inputs = torch.cat((before, x[:, max(0, l - width) :].to(before.dtype)), dim=1)
        return inputs[:, inputs.shape[1] - width :]
    if lengths is None:
        lengths = torch.full((b,), l, device=x.device)
    index = lengths[:, None] + torch.arange(width, device=x.device)  # (b, k-1)
    inputs = torch.cat((before, x.to(before.dtype)), dim=1)  # (b, k-1+l, e)
    last = inputs.gather(1, index[:, :, None].expand(-1, -1, e))
    if seq_idx is not None:
        seq_idx = reference.runs(seq_idx)
        documents = torch.cat((seq_idx[:, :1].expand(-1, width), seq_idx), dim=1).gather(1, index)
        last = last.masked_fill((documents != documents[:, -1:])[:, :, None], 0.0)
    return last


def _last_inputs(
    x: Tensor, width: int, state: Tensor | None, seq_idx: Tensor | None, reverse: bool
) -> Tensor:
    """`conv_state` (b, k-1, e) in the direction of processing."""
    if reverse:
        # The first k - 1 steps in time are all that it can hold.
        x = x[:, :width].flip(1)
        seq_idx = None if seq_idx is None else seq_idx[:, :width].flip(1)
    return conv_state(x, width, state=state, seq_idx=seq_idx)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise unless every argument fits x (b, l, e) and weight (e, k)."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ShapeError(f"x must be (b, l, e) with l >= 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ShapeError(f"weight must be (e, k) with k >= 1, got {tuple(weight.shape)}")
    (b, l, e), k = x.shape, weight.shape[1]
    expected = {
        "weight (e, k)": (weight, (e, k)),
        "bias (e)": (bias, (e,)),
        "state (b, k-1, e)": (state, (b, k - 1, e)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ShapeError(f"{name} is on {tensor.device}, x on {x.device}")
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}")
    if activation not in (None, "silu"):
        raise ShapeError(f"activation must be 'silu' or None, got {activation!r}")
    check_seq_idx(seq_idx, b, l, x.device)


BACKENDS = dispatch.register(
    "causal_conv1d",
    [
        dispatch.Backend("cpu", cpu.causal_conv1d, cpu.refuses),
        dispatch.Backend("gpu", gpu.causal_conv1d, gpu.refuses_triton),
        dispatch.Backend("official", official.causal_conv1d, official.refuses_conv),
        dispatch.Backend("reference", reference.causal_conv1d),
    ],
)

STEP_BACKENDS = dispatch.register(
    "causal_conv1d_step",
    [
        dispatch.Backend("cpu", cpu.causal_conv1d_step, cpu.refuses_step),
        dispatch.Backend("reference", reference.causal_conv1d_step),
    ],
)
