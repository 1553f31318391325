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
        backend: "auto", "cpu" or "reference".

    Returns:
        y, of x's shape.

    Raises:
        ShapeError: the weight does not fit x or is elsewhere, or x is not floating point.
        BackendError: the backend asked for cannot run this.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ShapeError(f"weight must be (d) = {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if weight is not None and weight.device != x.device:
        raise ShapeError(f"weight is on {weight.device}, x on {x.device}")
    run = dispatch.pick("rms_norm", BACKENDS, backend, x, weight, eps)
    with dispatch.without_autocast(x):
        return run(x, weight, eps, x.dtype if dtype is None else dtype)


BACKENDS = dispatch.register(
    "rms_norm",
    [
        dispatch.Backend("cpu", cpu.rms_norm, cpu.refuses_norm),
        dispatch.Backend("gpu", gpu.rms_norm, gpu.refuses_norm),
        dispatch.Backend("reference", reference.rms_norm),
    ],
)
