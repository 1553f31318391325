"""The backend `gpu` of the ops. Triton is imported when the first kernel is needed."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

# PyTorch for CUDA brings it, on Linux.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# From this compute capability on a card calculates in bfloat16.
OLDEST = 8
# One row of a norm stays in registers.
LARGEST_NORM = 16384


def refuses_triton(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why Triton's kernels cannot run a call on x and the rest, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if x.device.type == "cuda":
        # torch.compile sees through this question, and not through get_device_capability.
        card = torch.cuda.get_device_properties(x.device)
        if card.major < OLDEST:
            has = f"compute capability {card.major}.{card.minor}"
            return f"{card.name} has {has}: it needs {OLDEST}.0 or newer"
    elif x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, x is on {x.device.type}"
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
