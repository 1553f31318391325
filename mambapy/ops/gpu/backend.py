"""The backend `gpu` of the ops. What its kernels need is imported when the first one runs."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambapy.ops.dispatch import is_traced
from mambapy.ops.reference import wide_dtype


def _is_installed(package: str, module: str) -> bool:
    """Whether a module of a namespace package can be imported; nothing of it is run."""
    return importlib.util.find_spec(package) is not None and (
        importlib.util.find_spec(f"{package}.{module}") is not None
    )


# torch's CUDA builds bring both on Linux.
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA_BINDINGS = _is_installed("cuda", "bindings")
OLDEST = 8
MOST_STATES = 256
# Bytes of shared memory that this many states need.
ROOM = 200_000
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# One row of a norm stays in registers.
LARGEST_NORM = 16384


def why_not_this_card(x: Tensor) -> str | None:
    """Why kernels cannot run where x is, or None."""
    if x.device.type != "cuda":
        return f"it needs a CUDA device, x is on {x.device.type}"
    # torch.compile sees through this question, and not through get_device_capability.
    card = torch.cuda.get_device_properties(x.device)
    if card.major < OLDEST:
        return f"{card.name} has compute capability {card.major}.{card.minor}: it needs 8.0"
    return None


def refuses_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the CUDA C++ kernels cannot run a scan, or None."""
    why = why_not_this_card(x)
    if why is not None:
        return why
    if not HAS_CUDA_BINDINGS:
        return "cuda.bindings is not installed: pip install mambapy[gpu]"
    most = MOST_STATES
    if (
        x.is_cuda
        and torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin < ROOM
    ):
        most //= 2
    if A.shape[1] > most:
        return f"it is for at most {most} states on this card, A has {A.shape[1]}"
    tensors = (T for T in (x, dt, B, C, z) if T is not None)
    unknown = [T.dtype for T in tensors if T.dtype not in FORMATS]
    if wide_dtype(x, dt, A, B, C, options.get("state")) == torch.float64 or unknown:
        return f"it calculates in float32, and is given {unknown[0] if unknown else 'float64'}"
    return None


def refuses_triton(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why Triton's kernels cannot run a call on x and the rest, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    why = None if interpreted else why_not_this_card(x)
    if why is not None:
        return why
    tensors = (T for T in (x, *args, *kwargs.values()) if isinstance(T, Tensor))
    if any(T.dtype == torch.float64 for T in tensors):
        return "it calculates in float32, and is given float64"
    return None


def refuses_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> str | None:
    """Why the kernel cannot run a norm, or None."""
    if weight is None:
        return "it needs a weight"
    if x.shape[-1] > LARGEST_NORM:
        return f"it is for at most {LARGEST_NORM} channels, x has {x.shape[-1]}"
    return refuses_triton(x, weight)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan` in one pass: y (b, l, e) and the last state (b, e, n)."""
    from mambapy.ops import kernel_ops

    return kernel_ops.selective_scan(x, dt, A, B, C, *optional, **options)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`ops.causal_conv1d` in one pass."""
    from mambapy.ops import kernel_ops

    return kernel_ops.causal_conv1d(x, weight, bias, **options)


def has_joint_gradient(xz: Tensor) -> bool:
    """Whether `conv_and_gate` is worth its while: on a GPU, for autograd, which runs eagerly."""
    return (
        not torch.compiler.is_compiling()
        and xz.is_cuda
        and xz.requires_grad
        and torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def conv_and_gate(
    xz: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.conv_and_gate` with one gradient for both halves."""
    from mambapy.ops import joint_gradient

    return joint_gradient.conv_and_gate(xz, weight, bias, **options)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`ops.rms_norm` in one pass."""
    from mambapy.ops import kernel_ops

    return kernel_ops.rms_norm(x, weight, None, eps, dtype)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` in one pass."""
    from mambapy.ops import kernel_ops

    y, s = kernel_ops.rms_norm(x, weight, residual, eps, dtype)
    assert s is not None
    return y, s


def refuses_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> str | None:
    """Why the kernel cannot run an addition and a norm, or None."""
    return refuses_norm(x, weight, eps) or refuses_triton(residual)


def refuses_plan(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why a model's step cannot be one CUDA graph, or None."""
    if is_traced():
        return "torch.compile and torch.func cannot see through it"
    if torch.is_grad_enabled():
        return "it has no gradient: use torch.no_grad()"
    why = why_not_this_card(x)
    if why is not None:
        return why
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype != torch.float32:
        return f"it calculates in float32, the states are {dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "it does not follow autocast"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph cannot be part of another"
    return None
