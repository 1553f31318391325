"""The scan and the convolution from the last step to the first, by flips.

For backends that know one direction only, and for second derivatives.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def scan_from_the_end(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`run`, a backend's selective scan, with `reverse=True`.

    Args:
        run: the backend.
        x: (b, l, e).
        dt: (b, l, e).
        A: (e, n).
        B: (b, l, n).
        C: (b, l, n).
        D: (e) or None.
        z: (b, l, e) or None.
        seq_idx: (b, l) or None.
        **options: what else the backend takes, none of it with a row for each step.

    Returns:
        y (b, l, e), and the state (b, e, n) after the first step.
    """
    x, dt, B, C = x.flip(1), dt.flip(1), B.flip(1), C.flip(1)
    y, last = run(x, dt, A, B, C, D, _flipped(z), seq_idx=_flipped(seq_idx), **options)
    return y.flip(1), last


def conv_from_the_end(
    run: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`run`, a backend's causal convolution, with `reverse=True`.

    Args:
        run: the backend.
        x: (b, l, e).
        weight: (e, k).
        bias: (e) or None.
        seq_idx: (b, l) or None.
        **options: what else the backend takes, none of it with a row for each step.

    Returns:
        y (b, l, e).
    """
    return run(x.flip(1), weight, bias, seq_idx=_flipped(seq_idx), **options).flip(1)


def _flipped(T: Tensor | None) -> Tensor | None:
    """(b, l, ...) -> the same from the last step to the first; None stays None."""
    return None if T is None else T.flip(1)
