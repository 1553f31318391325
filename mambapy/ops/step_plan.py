"""What a model writes its decoding step with: the parts that plans for all devices share.

A plan collects stages: products, norms, convolutions and recurrences of one token for each row of a
batch, in the order in which they are called. Nothing happens until `run`. Models write their step
with it (`plan_step`) as they write it with tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Rows begin at multiples of this many numbers: whole vectors of every kernel.
ALIGNED = 32


class Rows(NamedTuple):
    """A (b, width) activation in the workspace: row i begins at number `start + i * pitch`."""

    start: int
    pitch: int
    width: int

    def split(self, *widths: int) -> list["Rows"]:
        """Its columns in pieces, as `Tensor.split` has them."""
        starts = [self.start + sum(widths[:i]) for i in range(len(widths))]
        return [Rows(start, self.pitch, width) for start, width in zip(starts, widths, strict=True)]


class Weights(NamedTuple):
    """y = scale * (W x) + bias; W (out, in) may be int8, with a scale (out) for each row."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class StepPlan(ABC):
    """The stages of one step.

    Args:
        batch: b, rows.
        dtype: what to calculate in, and that of states.
        device: where.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.dtype, self.device = batch, dtype, device
        # Where activations are in the workspace.
        self._places: dict[str, Rows] = {}
        self._size = 0
        self._inputs: list[Rows] = []
        self._workspace = torch.empty(0)

    def rows(self, name: str, width: int) -> Rows:
        """Room for a (b, width) activation; one name and width has one room in all layers."""
        key = f"{name}.{width}"
        if key not in self._places:
            pitch = -(-width // ALIGNED) * ALIGNED
            self._places[key] = Rows(self._size, pitch, width)
            self._size += self.batch * pitch
        return self._places[key]

    def input(self, name: str, width: int) -> Rows:
        """An activation (b, width) that `run` is given."""
        self._inputs.append(self.rows(name, width))
        return self._inputs[-1]

    @abstractmethod
    def norm(self, x: Rows, weight: Tensor | None, eps: float, name: str = "norm") -> Rows:
        """RMSNorm of each row, into the room `name`; without a weight, of scale one."""

    @abstractmethod
    def linear(
        self, x: Rows, weights: Weights, name: str = "", *, add_to: Rows | None = None
    ) -> Rows:
        """A product, into the room `name` or added to the rows `add_to`."""

    @abstractmethod
    def conv(self, x: Rows, weight: Tensor, bias: Tensor | None, silu: bool) -> Rows:
        """`ops.causal_conv1d_step` with a weight of e rows of k numbers; has a state."""

    @abstractmethod
    def scan(
        self,
        x: Rows,
        dt: Rows,
        A: Tensor,
        B: Rows,
        C: Rows,
        D: Tensor | None,
        z: Rows | None,
        *,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        A_is_log: bool = False,
    ) -> Rows:
        """`ops.selective_scan_step`; A may be given as log(-A); has a state."""

    @abstractmethod
    def ssd(
        self,
        x: Rows,
        dt: Rows,
        A_log: Tensor,
        B: Rows,
        C: Rows,
        D: Tensor,
        *,
        dt_bias: Tensor,
        dt_limit: tuple[float, float],
        d_head: int,
        n_groups: int,
    ) -> Rows:
        """`ops.ssd_step` with A = -exp(A_log) and softplus; has a state."""

    @abstractmethod
    def gated_norm(self, x: Rows, z: Rows, weight: Tensor, n_groups: int, eps: float) -> Rows:
        """`ops.gated_rms_norm` of each row."""

    @abstractmethod
    def run(self, inputs: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        """Run every stage.

        Args:
            inputs: (b, width) each, in the order in which `input` was called.
            states: in the order of the stages that have one; they are not changed.

        Returns:
            The new states.
        """

    def result(self, rows: Rows) -> Tensor:
        """A copy of an activation (b, width) after `run`."""
        return self.look(rows).clone()

    def look(self, rows: Rows) -> Tensor:
        """An activation (b, width) after `run`, where it lies until the next."""
        return self._view(rows)

    def _view(self, rows: Rows) -> Tensor:
        """An activation in the workspace."""
        shape, strides = (self.batch, rows.width), (rows.pitch, 1)
        return self._workspace.as_strided(shape, strides, rows.start)


class Choice(Protocol):
    """How a token is chosen; equal ones choose alike. `sampling.Choice` is one."""

    def __hash__(self) -> int: ...

    def __call__(self, logits: Tensor, noise: Tensor | None, last: Tensor | None) -> Tensor:
        """Tokens (b,) by logits (b, v), noise (b,), and the tokens before."""
        ...


class KeepingPlan(StepPlan):
    """A plan that keeps the states, and changes them in place."""

    @property
    @abstractmethod
    def chooses(self) -> bool:
        """Whether `choose` can be called: whether tokens are all it takes."""

    @abstractmethod
    def choose(
        self,
        token: Tensor,
        n: int,
        choice: Choice,
        noise: Tensor | None,
        logits: Callable[[], Tensor],
    ) -> Tensor:
        """`advance` n times, from tokens (b,) on and then from those that are chosen: (n, b).

        Args:
            token: (b,) where it begins.
            n: how many.
            choice: how a token is chosen.
            noise: (n, b) what it is given.
            logits: gives the logits of the last step, where they lie.
        """

    @abstractmethod
    def embed(self, table: Weights, name: str) -> Rows:
        """Rows of a table by tokens (b,), which `run` is given, into the room `name`."""

    @abstractmethod
    def load(self, states: list[Tensor]) -> None:
        """Take over states, in the order of the stages that have one; they are not changed."""

    @abstractmethod
    def advance(self, inputs: list[Tensor]) -> None:
        """Run every stage, from the states that the last one left."""

    @abstractmethod
    def states(self) -> list[Tensor]:
        """Copies of the states."""

    @abstractmethod
    def release(self) -> None:
        """Whoever used the plan does so no more, and another may, on another stream too."""

    def run(self, inputs: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        """Run every stage."""
        self.load(states)
        self.advance(inputs)
        return self.states()
