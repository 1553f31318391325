"""A decoding step as one launch, planned once and used while the model stays as it was.

FusedStep.fused_step    called by a model's `step`; None where that must run op by op
model.plan_step         the model's own account of its step, written with a `StepPlan`
Decoder                 steps from a state that a plan may keep, and change in place
Snapshot                whether everything that a plan relies on is still so
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from mambapy import ops
from mambapy.errors import ShapeError
from mambapy.layers import hook_tables
from mambapy.ops.step_plan import Choice, KeepingPlan, Rows, StepPlan
from mambapy.state import ModelState

# Attributes of a layer that its part of a plan depends on, besides its parameters.
READ = ("eps", "forward", "max_norm", "n_groups", "norm_before_gate")
# How many plans a model keeps, of different batch sizes for instance.
MOST_PLANS = 4

_dtype = attrgetter("dtype")


class Snapshot:
    """What a plan has read of a model: its modules, their hooks, where their parameters are.

    Values are not part of it: weights that change in place are read anew at each step.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # Only what is called in a step can have a hook that matters.
        leaves = [module for module in modules if not module._modules]
        tables: list[dict[str, Any]] = [T for M in modules for T in (M._modules, M._parameters)]
        # What a layer has not, but for a `forward` of its own, it does not read.
        pairs = [(M.__dict__, name) for M in leaves for name in READ]
        pairs = [(D, name) for D, name in pairs if name in D or name == "forward"]
        self._own = [D for D, _ in pairs]
        self._names = [name for _, name in pairs]
        self._filled = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._counts = list(map(len, self._filled))
        self._values = list(self._seen())
        hooks = {id(table): table for leaf in leaves for table in hook_tables(leaf)}
        self._hooks = list(hooks.values())
        self._sizes = list(map(len, self._hooks))
        self._parameters = [P for M in modules for P in M._parameters.values() if P is not None]
        self._places = list(map(Tensor.data_ptr, self._parameters))
        self._dtypes = list(map(_dtype, self._parameters))

    def holds(self) -> bool:
        """Whether all of it is as it was; asked before every step, so it must be quick."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._counts
            and all(map(is_, self._seen(), self._values))
            and list(map(Tensor.data_ptr, self._parameters)) == self._places
            and list(map(_dtype, self._parameters)) == self._dtypes
            and list(map(len, self._hooks)) == self._sizes
        )

    def _seen(self) -> Iterator[Any]:
        """What the modules consist of."""
        parts = chain.from_iterable(map(dict.values, self._filled))
        return chain(parts, map(dict.get, self._own, self._names))


@dataclass
class _Planned:
    """A plan, what it holds for, and where its result is: None where a step cannot be planned."""

    key: tuple[Any, ...]
    snapshot: Snapshot
    plan: StepPlan
    output: Rows | None


class FusedStep(nn.Module, ABC):
    """A model whose step can run in one launch."""

    # False for a model of which no step will ever be planned: that need not be found out each time.
    can_plan: bool = True

    def __init__(self) -> None:
        super().__init__()
        # The last used is the last.
        self._plans: dict[tuple[Any, ...], _Planned] = {}

    @abstractmethod
    def step(
        self, x: Tensor, state: ModelState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run one token of each row."""

    def step_input(self, x: Tensor) -> Tensor:
        """What `step` is given, as `plan_input` takes it."""
        return x

    def step_output(self, y: Tensor) -> Tensor:
        """What `step` returns, from the plan's result."""
        return y

    def plan_input(self, plan: StepPlan, x: Tensor) -> Rows:
        """Append what comes before the step's stages; where the residual stream begins."""
        return plan.input("residual", x.shape[1])

    def plan_step(self, plan: StepPlan, residual: Rows) -> Rows | None:
        """Append the step's stages; where its result will be, or None if it cannot be planned."""
        return None

    def fused_step(
        self, x: Tensor, state: ModelState, backend: str
    ) -> tuple[Tensor, ModelState] | None:
        """Run a step in one launch.

        Args:
            x: (b, d) the residual stream before the first layer, or what `plan_input` takes.
            state: checked already; its tensors, layer by layer, are those of the plan's stages.
            backend: the model's.

        Returns:
            What `plan_step` promised, (b, width), and the new state; None where the step must run
            op by op.
        """
        planned = self.take_plan(x, state, backend)
        if planned is None:
            return None
        result = None
        if planned.output is not None:
            new = planned.plan.run([x], _tensors(state))
            result = planned.plan.result(planned.output), _with(state, new)
        self.keep_plan(planned)
        return result

    def take_plan(self, x: Tensor, state: ModelState, backend: str) -> _Planned | None:
        """A plan for such a step, the caller's alone until `keep_plan`; None if there is none."""
        if not self.can_plan or ops.refuses_fused_step(x, state.dtype, backend) is not None:
            return None
        key = (x.shape[0], x.is_floating_point(), x.device, state.dtype)
        # Taken out while it is in use, so that another thread makes its own.
        planned = self._plans.pop(key, None)
        if planned is not None and not planned.snapshot.holds():
            # Nor do the others, and they keep parameters alive that may be gone.
            self._plans.clear()
            planned = None
        return planned or self._make_plan(key, x, state.dtype, backend)

    def keep_plan(self, planned: _Planned) -> None:
        """Put a plan away for the next step."""
        if isinstance(planned.plan, KeepingPlan):
            planned.plan.release()
        self._plans[planned.key] = planned
        # Of a copy of the keys: another thread may take a plan meanwhile.
        for oldest in [*self._plans][:-MOST_PLANS]:
            self._plans.pop(oldest, None)

    def _make_plan(
        self, key: tuple[Any, ...], x: Tensor, dtype: torch.dtype, backend: str
    ) -> _Planned:
        """Plan a step as the model is now."""
        snapshot = Snapshot(self)
        # Numbers elsewhere than in plain memory of x's device (a quantised tensor of another
        # library, for instance) have no address that a kernel could read.
        readable = all(
            type(P) in (nn.Parameter, Tensor) and P.device == x.device for P in self.parameters()
        )
        # What a plan makes is used again outside of inference mode.
        with torch.inference_mode(False):
            plan = ops.step_plan(x, dtype, backend)
            output = self.plan_step(plan, self.plan_input(plan, x)) if readable else None
        return _Planned(key, snapshot, plan, output)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: no plan, which is full of addresses."""
        return {**self.__dict__, "_plans": {}}


class Decoder:
    """A model's `step` as a function of the token alone, from a state on that nobody else sees.

    So a GPU can keep the state where its kernels read it, and change it in place: nothing is copied
    but the token and the result.

    Args:
        model: what steps.
        state: where it starts; it is not changed.
        backend: the model's.
    """

    def __init__(self, model: FusedStep, state: ModelState, backend: str) -> None:
        self._model, self._state, self._backend = model, state, backend
        self._planned: _Planned | None = None
        self._op_by_op = False

    def __call__(self, token: Tensor) -> Tensor:
        """Run one token of each row; what the model's `step` returns beside the state.

        Raises:
            ShapeError: there is not one token for each row of the state.
        """
        found = self._current(token)
        if found is None:
            result, self._state = self._model.step(token, self._state)
            return result
        plan, output = found
        plan.advance([self._model.step_input(token)])
        seen = plan.look(output)
        result = self._model.step_output(seen)
        # Most often that was a conversion, and so a copy already.
        result = result.clone() if result.data_ptr() == seen.data_ptr() else result
        plan.release()
        return result

    def choose(self, token: Tensor, n: int, choice: Choice, noise: Tensor | None) -> Tensor | None:
        """The next n tokens, where a plan can choose them itself: each follows the one before.

        Args:
            token: (b,) the last one.
            n: how many.
            choice: a `sampling.Choice`.
            noise: (n, b) what it is given.

        Returns:
            (n, b), or None where it has to be done step by step.
        """
        found = self._current(token)
        if found is None or not found[0].chooses:
            return None
        plan, output = found
        # A token that is out of range is refused.
        given = self._model.step_input(token)
        return plan.choose(
            given, n, choice, noise, lambda: self._model.step_output(plan.look(output))
        )

    def _current(self, token: Tensor) -> tuple[KeepingPlan, Rows] | None:
        """A plan that has the state, and where its result is; None if it goes op by op."""
        planned = self._planned
        if len(token) != self._state.batch_size:
            raise ShapeError(f"{len(token)} tokens for a state of {self._state.batch_size} rows")
        if not self._op_by_op and (planned is None or not planned.snapshot.holds()):
            planned = self._begin(token)
        if planned is None or planned.output is None:
            return None
        assert isinstance(planned.plan, KeepingPlan)
        return planned.plan, planned.output

    @property
    def state(self) -> ModelState:
        """The state after the last token."""
        plan = None if self._planned is None else self._planned.plan
        return _with(self._state, plan.states()) if isinstance(plan, KeepingPlan) else self._state

    def close(self) -> None:
        """Give the plan back to the model, for the next decoder; this one starts again."""
        self._state = self.state
        if self._planned is not None:
            self._model.keep_plan(self._planned)
        self._planned = None

    def _begin(self, token: Tensor) -> _Planned | None:
        """Go on from the last state in a plan that can keep it, or op by op if there is none."""
        self._state, self._planned = self.state, None
        planned = self._model.take_plan(self._model.step_input(token), self._state, self._backend)
        if planned is None or planned.output is None or not isinstance(planned.plan, KeepingPlan):
            self._op_by_op = True
            if planned is not None:
                self._model.keep_plan(planned)
            return None
        planned.plan.load(_tensors(self._state))
        self._planned = planned
        return planned


def _tensors(state: ModelState) -> list[Tensor]:
    """The layers' tensors, in order."""
    return [T for layer in state.layers for T in layer.tensors().values()]


def _with(state: ModelState, new: list[Tensor]) -> ModelState:
    """The state with other tensors in its layers."""
    left = iter(new)
    layers = tuple(layer.map(lambda _: next(left)) for layer in state.layers)
    return ModelState(layers, state.seq_idx)
