"""RMS normalisation of what a gate lets through: the public op and its backends."""

from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, reference
from mambapy.ops.cpu import backend as cpu


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    n_groups: int = 1,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """weight * norm(y silu(z)), each group of channels normalised on its own.

    In float32 or wider.

    Args:
        y: (..., d) input.
        z: (..., d) gate.
        weight: (d).
        n_groups: g, must divide d: groups of d / g channels.
        eps: added to the mean square, > 0.
        out: (..., d) where to write the result, in y's dtype; it may be y or z itself. Only where
            no gradient is needed.
        backend: "auto", "cpu" or "reference".

    Returns:
        Of y's shape and dtype.

    Raises:
        ShapeError: the tensors do not fit, or the groups do not divide d.
        BackendError: the backend asked for cannot run this, or `out` would need a gradient.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.1.
    """
    d = y.shape[-1]
    if z.shape != y.shape or weight.shape != (d,):
        raise ShapeError(
            f"z must be {tuple(y.shape)} as y is and weight ({d},), "
            f"got {tuple(z.shape)} and {tuple(weight.shape)}"
        )
    if n_groups < 1 or d % n_groups:
        raise ShapeError(f"n_groups={n_groups} must divide d = {d}")
    for name, T in {"y": y, "z": z, "weight": weight}.items():
        if not T.is_floating_point():
            raise ShapeError(f"{name} must be floating point, got {T.dtype}")
        if T.device != y.device:
            raise ShapeError(f"{name} is on {T.device}, y on {y.device}")
    dispatch.check_out(out, y, z, weight)
    run = dispatch.pick("gated_rms_norm", BACKENDS, backend, y, z, weight, n_groups, eps)
    with dispatch.without_autocast(y):
        options = {"out": out} if run is cpu.gated_rms_norm else {}
        return dispatch.written(run(y, z, weight, n_groups, eps, **options), out)


BACKENDS = dispatch.register(
    "gated_rms_norm",
    [
        dispatch.Backend("cpu", cpu.gated_rms_norm, cpu.refuses),
        dispatch.Backend("reference", reference.gated_rms_norm),
    ],
)
