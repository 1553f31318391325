"""Which implementation of an op runs, and why. There is no kernel in this file.

Each op keeps a list of backends in the order that "auto" tries them. A backend has a function that
looks at the arguments of a call and returns the reason why it cannot run them, or None.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambapy.errors import BackendError, ShapeError


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: the name that `backend=` takes.
        run: the implementation.
        refuses: called with the op's own arguments; why they cannot run here, or None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_, **__: None


@dataclass(frozen=True)
class Verdict:
    """What one backend says to one call: `reason` is None where it can run it."""

    op: str
    backend: str
    reason: str | None
    chosen: bool

    def __str__(self) -> str:
        """One line for a person."""
        mark = "->" if self.chosen else "  "
        return f"{mark} {self.backend:<10} {self.reason or 'can run this'}"


_REGISTRY: dict[str, tuple[Backend, ...]] = {}


def register(op: str, backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """Make an op's backends known to `explain`; in the order in which "auto" tries them."""
    _REGISTRY[op] = tuple(backends)
    return _REGISTRY[op]


def is_traced() -> bool:
    """Whether torch.compile, torch.func or a dispatch mode (fake tensors, for instance) looks on.

    What happens must then go through torch's operators.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def pick(
    op: str, backends: tuple[Backend, ...], wanted: str, *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """The implementation that runs this call.

    Raises:
        BackendError: the backend asked for is unknown, or cannot run these tensors.
    """
    for backend in backends:
        if wanted in ("auto", backend.name):
            reason = backend.refuses(*args, **kwargs)
            if reason is None:
                return backend.run
            if wanted != "auto":
                raise BackendError(f"{op} cannot run on backend {wanted!r}: {reason}")
    raise BackendError(
        f"{op} has no backend {wanted!r}; it has: auto, {', '.join(b.name for b in backends)}"
    )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves the products of an op in the dtype they are given."""
    kind = x.device.type
    # The meta device has no autocast. (torch.compile cannot trace the question which devices have.)
    # Where there is none, to leave one takes as long as a small kernel.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def written(y: Tensor, out: Tensor | None) -> Tensor:
    """The result of an op where the caller wants it: `out`, if given, holding y."""
    return y if out is None or y is out else out.copy_(y)


def check_out(out: Tensor | None, x: Tensor, *others: Tensor | None) -> None:
    """Raise unless the result of an op on these tensors can be written to `out`.

    Raises:
        ShapeError: it has not x's shape, dtype and device.
        BackendError: a gradient would be asked of numbers that are overwritten.
    """
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ShapeError(
            f"out must be {x.dtype} {tuple(x.shape)} on {x.device} as x is, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    watched = any(T is not None and T.requires_grad for T in (out, x, *others))
    if torch.is_grad_enabled() and watched:
        raise BackendError("out= has no gradient: use torch.no_grad(), or leave it out")


def explain(op: str, *args: Any, **kwargs: Any) -> list[Verdict]:
    """Say of every backend of an op whether it can run a call, and which one "auto" takes.

    Args:
        op: its name, "selective_scan" for instance.
        *args: the arguments of the call.
        **kwargs: the same.

    Returns:
        A verdict for each backend, in the order of preference; print them, one a line.

    Raises:
        BackendError: there is no such op.
    """
    if op not in _REGISTRY:
        raise BackendError(f"there is no op {op!r}; there are: {', '.join(_REGISTRY)}")
    verdicts: list[Verdict] = []
    for backend in _REGISTRY[op]:
        reason = backend.refuses(*args, **kwargs)
        chosen = reason is None and not any(verdict.chosen for verdict in verdicts)
        verdicts.append(Verdict(op, backend.name, reason, chosen))
    return verdicts
