"""RMS normalisation: the public op and its backends."""

import torch
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, reference
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.gpu import backend as gpu


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Root-mean-square norm: y = weight * x / sqrt(mean(x^2) + eps), in float32 or wider.

    Args:
        x: (..., d) input.
        weight: (d) or None.
        eps: added to the mean square, > 0.
        dtype: of y; x's without it.
        backend: "auto", "cpu", "gpu" or "reference".

    Returns:
        y, of x's shape.

    Raises:
        ShapeError: the weight does not fit x or is elsewhere, or x is not floating point.
        BackendError: the backend asked for cannot run this.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    _check(x, weight)
    run = dispatch.pick("rms_norm", BACKENDS, backend, x, weight, eps)
    with dispatch.without_autocast(x):
        return run(x, weight, eps, x.dtype if dtype is None else dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A residual addition and the norm after it: s = residual + x, y = rms_norm(s, weight).

    A GPU reads and writes each number once: backward, the gradient that comes to s by other ways
    is added on the way, and x gets its own in x's dtype. On a CPU these are two operations.

    Args:
        x: (..., d) what is added.
        residual: (..., d) what it is added to.
        weight: (d) or None.
        eps: added to the mean square, > 0.
        dtype: of y; x's without it.
        backend: "auto", "cpu", "gpu" or "reference".

    Returns:
        y (..., d), and s (..., d) in the dtype that torch gives x + residual.

    Raises:
        ShapeError: the weight or the residual does not fit x or is elsewhere, or is not floating
            point.
        BackendError: the backend asked for cannot run this.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ShapeError(f"residual must be {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ShapeError(f"residual is on {residual.device}, x on {x.device}")
    if not residual.is_floating_point():
        raise ShapeError(f"residual must be floating point, got {residual.dtype}")
    run = dispatch.pick("add_rms_norm", ADD_BACKENDS, backend, x, residual, weight, eps)
    with dispatch.without_autocast(x):
        return run(x, residual, weight, eps, x.dtype if dtype is None else dtype)


def _check(x: Tensor, weight: Tensor | None) -> None:
    """Raise unless x is floating point and the weight fits it."""
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ShapeError(f"weight must be (d) = {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if weight is not None and weight.device != x.device:
        raise ShapeError(f"weight is on {weight.device}, x on {x.device}")


BACKENDS = dispatch.register(
    "rms_norm",
    [
        dispatch.Backend("cpu", cpu.rms_norm, cpu.refuses_norm),
        dispatch.Backend("gpu", gpu.rms_norm, gpu.refuses_norm),
        dispatch.Backend("reference", reference.rms_norm),
    ],
)

ADD_BACKENDS = dispatch.register(
    "add_rms_norm",
    [
        dispatch.Backend("cpu", cpu.add_rms_norm, cpu.refuses_add_norm),
        dispatch.Backend("gpu", gpu.add_rms_norm, gpu.refuses_add_norm),
        dispatch.Backend("reference", reference.add_rms_norm),
    ],
)
