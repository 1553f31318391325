"""The backend `cpu` of the ops. Numba is imported when the first kernel is needed."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mambapy.ops.dispatch import is_traced
from mambapy.ops.reference import wide_dtype

# A dependency of the package, but it follows new versions of Python some months behind.
HAS_NUMBA = importlib.util.find_spec("numba") is not None


def refuses(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why the kernels cannot run a call on x, or None."""
    if not HAS_NUMBA:
        return "numba is not installed"
    return None if x.device.type == "cpu" else f"it needs CPU tensors, x is on {x.device.type}"


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan` in one pass: y (b, l, e) and the last state (b, e, n)."""
    from mambapy.ops import kernel_ops

    # x's dtype decides what the kernels calculate in.
    wide = wide_dtype(x, dt, A, B, C, options.get("state"))
    run_in = wide if wide == torch.float64 else x.dtype
    y, last = kernel_ops.selective_scan(x.to(run_in), dt, A, B, C, *optional, **options)
    return y.to(x.dtype), last


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`ops.causal_conv1d` in one pass."""
    from mambapy.ops import kernel_ops

    wide = wide_dtype(x, weight, options.get("state"))
    run_in = wide if wide == torch.float64 else x.dtype
    return kernel_ops.causal_conv1d(x.to(run_in), weight, bias, **options).to(x.dtype)


def keys_and_queries(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`turning.keys_and_queries` in one pass."""
    from mambapy.ops.cpu import heads_ops

    return heads_ops.keys_and_queries(*args)


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    n_groups: int,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """`ops.gated_rms_norm` in one pass."""
    from mambapy.ops.cpu import heads_ops

    wide = wide_dtype(y, z, weight)
    run_in = wide if wide == torch.float64 else y.dtype
    return heads_ops.gated_rms_norm(y.to(run_in), z, weight, n_groups, eps, out).to(y.dtype)


def refuses_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> str | None:
    """Why the kernel cannot run a norm, or None."""
    return "it needs a weight" if weight is None else refuses(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`ops.rms_norm` in one pass."""
    from mambapy.ops import kernel_ops

    return kernel_ops.rms_norm(x, weight, None, eps, dtype)[0]


def refuses_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> str | None:
    """Why the kernel cannot run an addition and a norm, or None."""
    return refuses_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm`: the sum, then the norm in one pass."""
    s = residual + x
    return rms_norm(s, weight, eps, dtype), s


def refuses_step(x: Tensor, *tensors: Tensor | None, **options: Any) -> str | None:
    """Why the kernels cannot run a step, or None. They are no operators: nothing sees through."""
    if is_traced():
        return "torch.compile and torch.func cannot see through it"
    given = [T for T in (x, *tensors, *options.values()) if isinstance(T, Tensor)]
    if torch.is_grad_enabled() and any(T.requires_grad for T in given):
        return "it has no gradient"
    return refuses(x)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan_step` in one pass."""
    from mambapy.ops.cpu import step

    wide = wide_dtype(x, dt, A, B, C, options["state"])
    run_in = wide if wide == torch.float64 else x.dtype
    y, state = step.selective_scan_step(x.to(run_in), dt, A, B, C, *optional, **options)
    return y.to(x.dtype), state


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """`ops.causal_conv1d_step` in one pass."""
    from mambapy.ops.cpu import step

    wide = wide_dtype(x, weight, state)
    run_in = wide if wide == torch.float64 else x.dtype
    y, state = step.conv1d_step(x.to(run_in), state, weight, bias, activation == "silu")
    return y.to(x.dtype), state


# With more rows, torch's products of two matrices read the weights no more often.
MOST_ROWS = 8


def refuses_plan(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why a model's step cannot be one launch, or None."""
    if is_traced():
        return "torch.compile and torch.func cannot see through it"
    if torch.is_grad_enabled():
        return "it has no gradient: use torch.no_grad()"
    if x.shape[0] > MOST_ROWS:
        return f"it is for at most {MOST_ROWS} rows, x has {x.shape[0]}"
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return "it does not follow autocast"
    if x.dtype == torch.float64 and dtype != torch.float64:
        return f"x is float64, the states are {dtype}"
    return refuses(x)
