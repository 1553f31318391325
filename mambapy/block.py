"""What a mixer is, and the residual block around it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mambapy import ops
from mambapy.errors import ShapeError
from mambapy.experts import Experts
from mambapy.layers import RMSNorm, WideParameters, add_and_norm, is_plain, wide
from mambapy.ragged import Ragged
from mambapy.state import State

if TYPE_CHECKING:
    from mambapy.ops.step_plan import Rows, StepPlan

S = TypeVar("S", bound=State)


class Mixer(WideParameters, ABC, Generic[S]):
    """What every mixer is: (b, l, d) -> (b, l, d), looking at other tokens only through a state.

    Attributes:
        recompute: what lies between in_proj and out_proj and is computed again in the backward pass
            instead of kept: "none", "conv" (all but the recurrence) or "scan" (all).
    """

    recompute = "none"
    in_proj: nn.Linear
    out_proj: nn.Linear
    state_kind: type[S]

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""

    def forward(self, x: Tensor, ragged: Ragged = Ragged()) -> Tensor:
        """Run whole sequences, (b, l, d) -> (b, l, d)."""
        inputs = self.in_proj(x)
        if self.recompute != "none" and torch.is_grad_enabled():
            keep = ops.recurrences() if self.recompute == "conv" else []
            return recomputed(self.output, inputs, ragged, keep=keep)
        return self.output(inputs, ragged)

    @abstractmethod
    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, ...): (b, l, d)."""

    @abstractmethod
    def prefill(
        self, x: Tensor, state: Any = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, State]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""

    @abstractmethod
    def step(self, x: Tensor, state: Any, dt_scale: Tensor | None = None) -> tuple[Tensor, State]:
        """Run one token of each sequence, (b, d) -> (b, d), dt_scale (b) steps after the last."""

    def plan_step(self, plan: "StepPlan", x: "Rows", residual: "Rows") -> bool:
        """Append `step` to a plan, adding to `residual`; False where it must be called instead."""
        return False

    @abstractmethod
    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """The shape of each field of this layer's state, a `self.state_kind`, in order."""

    def init_state(self, batch_size: int) -> S:
        """The state before the first token: zeros, float32 or wider, on the layer's device."""
        dtype, device = self._made_of()
        shapes = self.state_shapes(batch_size)
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes.values()]
        return self.state_kind(*zeros)

    def restart(self, state: Any, goes_on: Tensor) -> Any:
        """The rows of `state` where goes_on (b) is True, a fresh start elsewhere."""
        fresh = iter(self.init_state(goes_on.shape[0]).tensors().values())
        return state.map(lambda T: torch.where(_rows(goes_on, T), T, next(fresh)))

    def check_state(self, state: Any, batch_size: int, name: str) -> None:
        """Raise a ShapeError, naming `name`, unless the state is this layer's, for that batch."""
        if not isinstance(state, self.state_kind):
            kind = type(state).__name__
            raise ShapeError(f"{name} must be of kind {self.state_kind.__name__}, got {kind}")
        dtype, device = self._made_of()
        for field, shape in self.state_shapes(batch_size).items():
            T = getattr(state, field)
            if T.shape != shape:
                raise ShapeError(f"{name}: {field} must be {shape}, got {tuple(T.shape)}")
            if T.dtype != dtype or T.device != device:
                raise ShapeError(
                    f"{name}: {field} must be {dtype} on {device}, got {T.dtype} on {T.device}"
                )

    def _made_of(self) -> tuple[torch.dtype, torch.device]:
        """What states are made of: the dtype of the wide parameters, and their device."""
        like: Tensor = getattr(self, self.wide[0])
        return wide(like.dtype), like.device


def _rows(chosen: Tensor, T: Tensor) -> Tensor:
    """chosen (b), shaped so that it broadcasts over T (b, ...)."""
    return chosen.view(-1, *[1] * (T.dim() - 1))


def recomputed(
    function: Callable[..., Any], x: Tensor, *args: Any, keep: Sequence[OpOverload] = ()
) -> Any:
    """function(x, *args), of which the backward pass keeps only x: it computes the rest again.

    But for what the operators in `keep` have returned. Random numbers are the same both times,
    except in a CUDA graph that is being captured: there, no state of a generator can be read.
    """
    capturing = (
        not torch.compiler.is_compiling() and x.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": not capturing}
    if keep and torch.compiler.is_compiling():
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(keep))
    elif keep:
        options["context_fn"] = partial(_keeping, keep)
    return checkpoint(function, x, *args, **options)


def _keeping(operators: Sequence[OpOverload]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a checkpoint's two passes: one notes what operators return, one gives it back.

    Unlike torch's own they serve any number of backward passes.
    """
    kept: list[Any] = []
    return _Note(operators, kept), _Recall(operators, kept)


_detach = partial(tree_map_only, Tensor, torch.detach)


# A class made for each call would keep its tensors until Python looks for cycles.
class _Note(TorchDispatchMode):
    """Adds to `kept` what operators return."""

    def __init__(self, operators: Sequence[OpOverload], kept: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.kept = operators, kept

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.operators:
            self.kept.append(_detach(result))
        return result


class _Recall(TorchDispatchMode):
    """Gives back what is in `kept`, from the first on each time, in place of calling operators."""

    def __init__(self, operators: Sequence[OpOverload], kept: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.kept = operators, kept
        self.place = 0

    def __enter__(self) -> Any:
        self.place = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in self.operators:
            return function(*args, **(kwargs or {}))
        self.place += 1
        return _detach(self.kept[self.place - 1])


class GatedMLP(nn.Module):
    """fc2(y * silu(gate)) with (y, gate) = fc1(x), (..., d) -> (..., d).

    Args:
        d_model: d.
        d_mlp: inner width.

    Source: Shazeer 2020 (arXiv 2002.05202); rows of fc1 in the order of the Mamba papers' code.
    """

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.fc2 = nn.Linear(d_mlp, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)  # (..., d_mlp)
        return self.fc2(y * F.silu(gate))


class ResidualBlock(nn.Module):
    """x + mixer(norm(x)), and where there is an MLP, x + mlp(norm2(x)) after it.

    The norm's output is in the weights' dtype, whatever the residual stream's is, so a float32
    stream does not make the layers behind it float32.

    Args:
        mixer: (b, l, d) -> (b, l, d).
        d_model: d.
        eps: of the norms.
        mlp: (..., d) -> (..., d), or None.

    Attributes:
        drop_path: probability that a row of a training batch skips the mixer; the others' is made
            up for it.
    """

    drop_path = 0.0

    def __init__(
        self, mixer: Mixer[Any], d_model: int, eps: float, mlp: GatedMLP | Experts | None = None
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps)
        self.mixer = mixer
        self.norm2 = None if mlp is None else RMSNorm(d_model, eps)
        self.mlp = mlp

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for part in (self.norm, self.mixer, self.norm2, self.mlp):
            if part is not None:
                part.reset_parameters()

    def last_weights(self) -> list[Tensor]:
        """The weight of the last layer of each residual branch."""
        weights: list[Tensor] = [self.mixer.out_proj.weight]
        if isinstance(self.mlp, Experts):
            weights.append(self.mlp.fc2)
        elif self.mlp is not None:
            weights.append(self.mlp.fc2.weight)
        return weights

    def forward(self, x: Tensor, ragged: Ragged) -> Tensor:
        """Map the residual stream (b, l, d) to the next."""
        x, y = self.go_on(x, None, ragged)
        return x + y

    def go_on(self, x: Tensor, added: Tensor | None, ragged: Ragged) -> tuple[Tensor, Tensor]:
        """`forward` of x + added, all (b, l, d): two tensors likewise, whose sum is the next.

        So that an addition and the norm after it, in the next block, are one pass.
        """
        y, x = add_and_norm(self.norm, x, added)
        return self._after(x, self._dropped(self.mixer(y, ragged)))

    def _dropped(self, y: Tensor) -> Tensor:
        """The mixer's branch (b, l, d) of the rows that do not skip it."""
        if self.training and self.drop_path:
            y = y * (torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path).to(y.dtype)
            y = y / (1 - self.drop_path)
        return y

    def routed(self, x: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor | None]:
        """The same, and the router's logits (b, l, E) where there are experts."""
        y = self.mixer(self.norm(x), ragged)
        if not isinstance(self.mlp, Experts) or self.norm2 is None:
            x, y = self._after(x, y)
            return x + y, None
        y, x = add_and_norm(self.norm2, x, y)
        y, logits = self.mlp.routed(y)
        return x + y, logits

    def prefill(
        self, x: Tensor, added: Tensor | None, state: State, ragged: Ragged
    ) -> tuple[Tensor, Tensor, State]:
        """`go_on` from a state, and the state after the last token."""
        y, x = add_and_norm(self.norm, x, added)
        y, state = self.mixer.prefill(y, state, ragged)
        return *self._after(x, y), state

    def step(self, x: Tensor, state: State, dt_scale: Tensor | None = None) -> tuple[Tensor, State]:
        """The same for one token, (b, d)."""
        y, state = self.mixer.step(self.norm(x), state, dt_scale)
        x, y = self._after(x, y)
        return x + y, state

    def _after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's branch of x + y: what it is of, and what it gives; x and y without an MLP."""
        if self.mlp is None or self.norm2 is None:
            return x, y
        y, x = add_and_norm(self.norm2, x, y)
        return x, self.mlp(y)

    def plan_step(self, plan: "StepPlan", residual: "Rows") -> bool:
        """Append `step` to a plan, in place; False where it must be called instead."""
        if type(self) is not ResidualBlock or not is_plain(self.norm, RMSNorm):
            return False
        if self.mlp is not None:
            return False
        x = plan.norm(residual, self.norm.weight, self.norm.eps)
        return self.mixer.plan_step(plan, x, residual)
