"""Custom operators that autograd, torch.compile and torch.func all go through."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from mambapy.ops.dispatch import is_traced, without_autocast

Call = Callable[..., Any]

_ONCE = "this operator has no second derivative here: use backend='reference' or 'pscan'"


def never_twice(ctx: Any, *grads: Tensor) -> None:
    """The backward of a backward: it raises."""
    raise RuntimeError(_ONCE)


def nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing: there is no backward."""


def transform() -> Any:
    """The innermost torch.func transform (grad, vmap, ...) that is active, or None."""
    return torch._C._functorch.peek_interpreter_stack()


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    """Raise under forward-mode differentiation, which would see a function without derivative."""
    active = transform()
    if active is not None:
        dual = active.key() == torch._C._functorch.TransformType.Jvp
    elif forward_ad._current_level >= 0:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        dual = any(forward_ad.unpack_dual(T).tangent is not None for T in tensors)
    else:
        dual = False
    if dual:
        raise RuntimeError(
            "this operator has no forward-mode derivative: use an op's backend='reference'"
        )


def _map_rule(call: Call, rows: tuple[int, ...], kind: type) -> Call:
    """vmap: the mapped axis is folded into the batch where only `rows` are mapped; else a loop."""

    def fold(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
        if value is None:
            return None
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten(0, 1)

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        pairs = [
            (v, d if isinstance(v, Tensor) else None) for v, d in zip(inputs, in_dims, strict=True)
        ]
        if all(i in rows for i, (_, dim) in enumerate(pairs) if dim is not None):
            outputs = call(
                *[fold(v, d, size) if i in rows else v for i, (v, d) in enumerate(pairs)]
            )
            single = isinstance(outputs, Tensor)
            outputs = [outputs] if single else list(outputs)
            dims = [0 if out.numel() else None for out in outputs]
            outputs = [out.unflatten(0, (size, -1)) if out.numel() else out for out in outputs]
        else:
            calls = [
                call(*[v if d is None else v.select(d, i) for v, d in pairs]) for i in range(size)
            ]
            single = isinstance(calls[0], Tensor)
            outputs = (
                [torch.stack(calls)]
                if single
                else [torch.stack(c) for c in zip(*calls, strict=True)]
            )
            dims = [0] * len(outputs)
        return (outputs[0], dims[0]) if single else (kind(outputs), kind(dims))

    return rule


def differentiable(
    op: Any,
    setup: Call,
    gradient: Call,
    rows: tuple[int, ...] = (),
    kind: type = tuple,
) -> Call:
    """Register autograd and vmap for `op`; returns a call of it for torch.func.grad as well.

    torch.func.grad refuses custom ops with registered autograd, but not an autograd.Function around
    them.

    Args:
        op: the custom op.
        setup: what to save for the backward pass, as for `register_autograd`.
        gradient: the backward pass, likewise.
        rows: the inputs whose first axis is the batch, if rows of the batch do not depend on each
            other.
        kind: the type of several outputs, as the op's schema has it.
    """
    # Eagerly the function itself runs: the operator's own machinery would take longer than the
    # kernel does for few tokens.
    function = op._init_fn

    def backward_pass(ctx: Any, *grads: Tensor | None) -> Any:
        # The forward pass knew no autocast either.
        given = next((grad for grad in grads if isinstance(grad, Tensor)), None)
        with nullcontext() if given is None else without_autocast(given):
            return gradient(ctx, *grads)

    def as_tuple(result: Any) -> Any:
        # autograd.Function watches no tensors in a list.
        return tuple(result) if isinstance(result, list) else result

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return as_tuple(function(*args))

        setup_context = staticmethod(setup)
        backward = staticmethod(backward_pass)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_tangents(args)
        if not is_traced():
            watched = torch.is_grad_enabled() and any(
                isinstance(arg, Tensor) and arg.requires_grad for arg in args
            )
            return as_tuple((Eager.apply if watched else function)(*args))
        active = None if torch.compiler.is_compiling() else transform()
        if active is not None and active.key() == torch._C._functorch.TransformType.Grad:
            return Around.apply(*args)  # type: ignore[no-untyped-call]
        return as_tuple(op(*args))

    class Around(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return call(*args)

        setup_context = staticmethod(setup)
        backward = staticmethod(backward_pass)
        vmap = staticmethod(_map_rule(call, rows, tuple))

    op.register_autograd(backward_pass, setup_context=setup)
    op.register_vmap(_map_rule(call, rows, kind))
    return call


def differentiable_gradients(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of a reference op that autograd can differentiate again (`create_graph=True`).

    Kernels know their first derivative only. Where a second one is asked for, they take the first
    from here: slow, exact, and rarely needed.

    Args:
        function: the reference op, as a function of the tensors.
        tensors: its arguments; None stays None.
        needed: which of them need a gradient.
        grad_outputs: the gradients of its outputs; None counts as zero.

    Returns:
        A gradient for each tensor; None where none is needed.
    """
    # In a model some arguments are functions of others: dt of x. As views, each stands for itself,
    # and the paths between them are left to autograd, which goes along them anyway.
    tensors = [None if T is None else T.view_as(T) for T in tensors]
    results = function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(r, g) for r, g in zip(results, grad_outputs, strict=True) if g is not None]
    wanted = [i for i, need in enumerate(needed) if need]
    found = torch.autograd.grad(
        [result for result, _ in pairs],
        [T for i in wanted if (T := tensors[i]) is not None],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    grads: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def recurrences() -> list[OpOverload]:
    """The operators of the recurrences over time: what costs most of a mixer's own work."""
    from mambapy.ops import chunked, kernel_ops, ssd_chunked  # noqa: F401 (they define them)

    names = ("selective_scan", "chunked_scan", "ssd_chunked")
    return [getattr(torch.ops.mambapy, name).default for name in names]
