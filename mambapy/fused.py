"""A decoding step as one launch, planned once and used while the model stays as it was.

FusedStep.fused_step      called by a model's `step`; None where that must run op by op
model.plan_step         the model's own account of its step, written with a `StepPlan`
Snapshot                whether everything that a plan relies on is still so
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambapy import ops
from mambapy.layers import hook_tables
from mambapy.state import ModelState

if TYPE_CHECKING:
    from mambapy.ops.cpu.step import Rows, StepPlan

# Attributes of a layer that its part of a plan depends on, besides its parameters.
READ = ("eps", "forward", "n_groups", "norm_before_gate")


class Snapshot:
    """What a plan has read of a model: its modules, their hooks, where their parameters are.

    Values are not part of it: weights that change in place are read anew at each step.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # Only what is called in a step can have a hook that matters.
        leaves = [module for module in modules if not module._modules]
        self._entries = [
            (table, name, value)
            for module in modules
            for table in (module._modules, module._parameters)
            for name, value in table.items()
        ]
        self._entries += [(M.__dict__, name, M.__dict__.get(name)) for M in leaves for name in READ]
        self._hooks = [(table, len(table)) for leaf in leaves for table in hook_tables(leaf)]
        parameters = [P for M in modules for P in M._parameters.values() if P is not None]
        self._places = [(P, P.data_ptr(), P.dtype) for P in parameters]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return (
            all(table.get(name) is value for table, name, value in self._entries)
            and all(P.data_ptr() == place and P.dtype == dtype for P, place, dtype in self._places)
            and all(len(table) == size for table, size in self._hooks)
        )


@dataclass
class _Planned:
    """A plan, what it holds for, and where its result is: None where a step cannot be planned."""

    batch: int
    dtype: torch.dtype
    snapshot: Snapshot
    plan: StepPlan
    output: Rows | None


class FusedStep(nn.Module):
    """A model whose step can run in one launch."""

    _planned: _Planned | None = None
    # False for a model of which no step will ever be planned: that need not be found out each time.
    can_plan: bool = True

    def plan_step(self, plan: StepPlan, residual: Rows) -> Rows | None:
        """Append the step's stages; where its result will be, or None if it cannot be planned."""
        return None

    def fused_step(
        self, x: Tensor, state: ModelState, backend: str
    ) -> tuple[Tensor, ModelState] | None:
        """Run a step in one launch.

        Args:
            x: (b, d) the residual stream before the first layer.
            state: checked already; its tensors, layer by layer, are those of the plan's stages.
            backend: the model's.

        Returns:
            What `plan_step` promised, (b, width), and the new state; None where the step must run
            op by op.
        """
        if not self.can_plan or ops.refuses_fused_step(x, state.dtype, backend) is not None:
            return None
        # Taken out while it is in use, so that another thread makes its own.
        planned, self._planned = self._planned, None
        if (
            planned is None
            or (planned.batch, planned.dtype) != (x.shape[0], state.dtype)
            or not planned.snapshot.holds()
        ):
            planned = self._make_plan(x, state.dtype)
        result = None
        if planned.output is not None:
            old = [T for layer in state.layers for T in layer.tensors().values()]
            new = iter(planned.plan.run([x], old))
            layers = tuple(layer.map(lambda _: next(new)) for layer in state.layers)
            result = planned.plan.result(planned.output), ModelState(layers, state.seq_idx)
        self._planned = planned
        return result

    def _make_plan(self, x: Tensor, dtype: torch.dtype) -> _Planned:
        """Plan a step as the model is now."""
        snapshot, plan = Snapshot(self), ops.step_plan(x.shape[0], dtype)
        # Numbers elsewhere than in plain CPU memory (another device, a quantised tensor of another
        # library) have no address that a kernel could read.
        readable = all(
            type(P) in (nn.Parameter, Tensor) and P.device.type == "cpu" for P in self.parameters()
        )
        residual = plan.input("residual", x.shape[1])
        output = self.plan_step(plan, residual) if readable else None
        return _Planned(x.shape[0], dtype, snapshot, plan, output)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not the plan, which is full of addresses."""
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}
