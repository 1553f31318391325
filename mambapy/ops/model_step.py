"""One decoding step of a whole model in one launch: whether that can be done, and an empty plan."""

from __future__ import annotations

import torch
from torch import Tensor

from mambapy.ops import dispatch
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.gpu import backend as gpu
from mambapy.ops.step_plan import StepPlan


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
    return gpu.refuses_plan(x, dtype)


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
