"""What a model remembers between calls: immutable values that can be indexed, moved and saved.

A state is a tree: `ModelState` holds one state a layer, a layer's state holds tensors whose first
dimension is the batch. No call of a model changes the state it was given; it returns a new one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree

from mambapy.errors import CheckpointError, ShapeError

S = TypeVar("S", bound="State")


class State:
    """What all states can do. Subclasses are frozen dataclasses of tensors, or of such states."""

    _kinds: ClassVar[dict[str, type["State"]]] = {}

    def __init_subclass__(cls) -> None:
        """Make the class known to `load`, and to torch.compile and torch.export as a tree."""
        State._kinds[cls.__name__] = cls
        _pytree.register_pytree_node(
            cls,
            lambda state: ([getattr(state, f.name) for f in fields(state)], None),
            lambda values, _: cls(*values),
            serialized_type_name=f"mambapy.{cls.__name__}",
        )

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The state with `function` applied to every tensor of it."""
        return type(self)(*(_map(value, function) for value in self._values()))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its path, "layers.0.ssm" for instance."""
        found: dict[str, Tensor] = {}
        for field, value in zip(fields(self), self._values(), strict=True):  # type: ignore[arg-type]
            _collect(value, field.name, found)
        return found

    @property
    def batch_size(self) -> int:
        """How many sequences the state stands for."""
        return next(iter(self.tensors().values())).shape[0]

    def __getitem__(self: S, index: int | slice | list[int] | Tensor) -> S:
        """The chosen rows of the batch, in the order given; an int gives a batch of one.

        Raises:
            ShapeError: an int is outside the batch.
        """
        if isinstance(index, int):
            if not -self.batch_size <= index < self.batch_size:
                raise ShapeError(f"row {index} of a state with a batch of {self.batch_size}")
            index = [index]
        return self.map(lambda tensor: tensor[index])

    def reorder(self: S, index: Tensor) -> S:
        """The rows `index` (b',) int64: what beam search does after each step."""
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def repeat(self: S, times: int) -> S:
        """Every row `times` times, copies side by side: one prompt, several continuations."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(
        self: S, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S:
        """Moved to a device; a dtype applies to the floating-point tensors alone."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def detach(self: S) -> S:
        """Cut off from the graph: truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self: S) -> S:
        """A deep copy."""
        return self.map(Tensor.clone)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, from which `load` makes an equal state, bit for bit."""
        tensors = {name: t.detach().contiguous() for name, t in self.tensors().items()}
        save_file(tensors, path, metadata={"state": json.dumps(_describe(self))})

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> "State":
        """The state that `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it holds no state.
        """
        try:
            with safe_open(path, "pt", device=device) as file:
                description = (file.metadata() or {}).get("state")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
        if description is None:
            raise CheckpointError(f"{path} holds no state of a model")
        state = _rebuild(json.loads(description), "", tensors)
        if not isinstance(state, State):
            raise CheckpointError(f"{path} holds no state of a model")
        return state

    def _values(self) -> list[Any]:
        """The fields' values, in order."""
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class SSMState(State):
    """The state of one Mamba-1 layer.

    Args:
        conv: (b, k-1, e) the last inputs of the convolution.
        ssm: (b, e, n) h, the state of the recurrence.
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True)
class Mamba2State(State):
    """The state of one Mamba-2 layer.

    Args:
        conv: (b, k-1, h p + 2 g n) the last inputs of the convolution: x, B and C.
        ssm: (b, h, p, n) h, the state of the recurrence.
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True)
class Mamba3State(State):
    """The state of one Mamba-3 layer.

    Args:
        phase: (b, h, s) the angle that each pair of channels has been turned by, radians.
        ssm: (b, h, p, n) h, the state of the recurrence.
        key: (b, r, h, n) the last token's B, with its bias, turned.
        value: (b, h, p) the last token's x.
    """

    phase: Tensor
    ssm: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionState(State):
    """The state of one attention layer: the keys and values of each row's document so far.

    Rows may have got different numbers of tokens; what stands beyond a row's length means nothing.

    Args:
        conv: (b, k-1, (h + 2 kv) p) the last inputs of the convolution; all sizes but b are 0
            where there is none.
        keys, values: (b, t, kv, p) those of each row's tokens, in order, at the left.
        lengths: (b,) int64, how many of the t each row has.
        time: (b,) the position that the next token will have, if it comes one step later.
    """

    conv: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    time: Tensor


@dataclass(frozen=True)
class ModelState(State):
    """The state of a stack of layers.

    Args:
        layers: one state a layer.
        seq_idx: (b,) int64, the document of each row's last token; -1 where none was named, which
            the next token continues whatever its document.
    """

    layers: tuple[State, ...]
    seq_idx: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What recurrences run in: float32 or float64."""
        return next(iter(self.layers[0].tensors().values())).dtype


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply to a tensor, a state, or a tuple of states."""
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    return value.map(function) if isinstance(value, State) else function(value)


def _collect(value: Any, path: str, found: dict[str, Tensor]) -> None:
    """Gather the tensors below a field under their paths."""
    if isinstance(value, Tensor):
        found[path] = value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _collect(item, f"{path}.{i}", found)
    else:
        for name, tensor in value.tensors().items():
            found[f"{path}.{name}"] = tensor


def _describe(value: Any) -> Any:
    """The tree as JSON: {class: {field: ...}}, lists for tuples, null for a tensor."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, tuple):
        return [_describe(item) for item in value]
    described = {f.name: _describe(getattr(value, f.name)) for f in fields(value)}
    return {type(value).__name__: described}


def _rebuild(description: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_describe`, with the tensors put back at their paths."""
    if description is None:
        return tensors[path]
    if isinstance(description, list):
        return tuple(_rebuild(d, f"{path}.{i}", tensors) for i, d in enumerate(description))
    ((kind, described),) = description.items()
    prefix = f"{path}." if path else ""
    values = {name: _rebuild(d, prefix + name, tensors) for name, d in described.items()}
    return State._kinds[kind](**values)
