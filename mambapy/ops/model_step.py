"""One decoding step of a whole model in one launch: whether that can be done, and an empty plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambapy.ops import dispatch
from mambapy.ops.cpu import backend as cpu

if TYPE_CHECKING:
    from mambapy.ops.cpu.step import StepPlan


def refuses_fused_step(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> str | None:
    """Why a model's step must run op by op, or None.

    Args:
        x: (b, d) the residual stream at the first layer.
        dtype: what the step calculates in: that of the recurrent states.
        backend: the model's.
    """
    if backend not in ("auto", "cpu"):
        return f"the model's backend is {backend}"
    return cpu.refuses_plan(x, dtype)


def step_plan(batch: int, dtype: torch.dtype) -> StepPlan:
    """An empty plan for a step of `batch` rows."""
    from mambapy.ops.cpu.step import StepPlan

    return StepPlan(batch, dtype)


def _op_by_op(x: Tensor, dtype: torch.dtype, backend: str = "auto") -> None:
    """There is nothing to launch."""


BACKENDS = dispatch.register(
    "model_step",
    [
        dispatch.Backend("cpu", lambda x, dtype: step_plan(x.shape[0], dtype), refuses_fused_step),
        dispatch.Backend("op by op", _op_by_op),
    ],
)
