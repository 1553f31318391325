"""One decoding step of a whole model in one launch: whether that can be done, and an empty plan."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mambapy.ops import dispatch
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.step_plan import StepPlan

# PyTorch for CUDA brings it, on Linux.
HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_GPU = (8, 0)


def refuses_fused_step(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """Why a model's step must run op by op, or None.

    Args:
        x: (b, d) the residual stream at the first layer, or (b,) tokens.
        dtype: what the step calculates in: that of the recurrent states.
        backend: the model's.
    """
    refuses = _refuses_gpu if x.device.type == "cuda" else _refuses_cpu
    return refuses(x, dtype, backend)


def step_plan(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> StepPlan:
    """An empty plan for a step that is not refused."""
    if x.device.type == "cuda":
        return _gpu_plan(x, dtype)
    return _cpu_plan(x, dtype)


def plan_looks_up(tokens: Tensor) -> bool:
    """Whether a plan takes tokens, and not their embedding."""
    return tokens.device.type == "cuda"


def _cpu_plan(x: Tensor, dtype: torch.dtype) -> StepPlan:
    """A plan whose launch is one kernel."""
    from mambapy.ops.cpu.step import CpuPlan

    return CpuPlan(x.shape[0], dtype)


def _gpu_plan(x: Tensor, dtype: torch.dtype) -> StepPlan:
    """A plan whose launch is a CUDA graph."""
    from mambapy.ops.gpu.step import GpuPlan

    return GpuPlan(x.shape[0], x.device)


def _refuses_cpu(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """Why the CPU's plan cannot run it, or None."""
    if backend not in ("auto", "cpu"):
        return f"the model's backend is {backend}"
    return cpu.refuses_plan(x, dtype)


def _refuses_gpu(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """Why the GPU's plan cannot run it, or None."""
    if backend not in ("auto", "gpu"):
        return f"the model's backend is {backend}"
    if dispatch.is_traced():
        return "torch.compile and torch.func cannot see through it"
    if torch.is_grad_enabled():
        return "it has no gradient: use torch.no_grad()"
    if x.device.type != "cuda":
        return f"it needs a CUDA device, x is on {x.device.type}"
    if not HAS_TRITON:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < OLDEST_GPU:
        return "the GPU has compute capability {}.{}: it needs 8.0 or newer".format(*capability)
    if dtype != torch.float32:
        return f"it calculates in float32, the states are {dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "it does not follow autocast"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph cannot be part of another"
    return None


def _op_by_op(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> None:
    """There is nothing to launch."""


BACKENDS = dispatch.register(
    "model_step",
    [
        dispatch.Backend("cpu", _cpu_plan, _refuses_cpu),
        dispatch.Backend("gpu", _gpu_plan, _refuses_gpu),
        dispatch.Backend("op by op", _op_by_op),
    ],
)
