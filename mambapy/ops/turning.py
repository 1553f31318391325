"""Mamba-3's K and Q in plain PyTorch: B and C for each head, turned by the running phase."""

import math

import torch
from torch import Tensor

from mambapy.ops.reference_ssd import biased, turned
from mambapy.ops.running_sum import since_start


def keys_and_queries(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt: Tensor,
    omega: Tensor,
    before: Tensor,
    starts: Tensor | None,
    rotate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """K and Q (b, l, r, h, n), and the phases (b, l, h, s) that turned them.

    Args:
        B: (b, l, r, g, n).
        C: (b, l, r, g, n).
        B_bias: (h, r, n) or None.
        C_bias: (h, r, n) or None.
        dt: (b, l, h).
        omega: (b, l, s).
        before: (b, h, s) the phase before the first step.
        starts: (b, l) bool, True where another document than the token before's starts; or None.
        rotate: "pairs" or "halves", see `ops.mamba3_scan`.
    """
    phase = phases(dt, omega, before, starts)  # (b, l, h, s)
    heads = dt.shape[2]
    K = turned(biased(B, B_bias, heads), phase.unsqueeze(2), rotate)  # (b, l, r, h, n)
    Q = turned(biased(C, C_bias, heads), phase.unsqueeze(2), rotate)  # (b, l, r, h, n)
    return K, Q, phase


def phases(dt: Tensor, omega: Tensor, before: Tensor, starts: Tensor | None) -> Tensor:
    """(b, l, h, s) in [-pi, pi): the sum of omega dt since the document's start."""
    turns = dt.unsqueeze(-1) * omega.unsqueeze(2)  # (b, l, h, s)
    total, goes_on = since_start(turns.flatten(2), starts)
    total = total.unflatten(2, turns.shape[2:])  # (b, l, h, s)
    if goes_on is None:
        total = total + before.unsqueeze(1)
    else:
        total = total + torch.where(goes_on.unsqueeze(-1), before.unsqueeze(1), 0.0)
    return (torch.remainder(total + math.pi, 2 * math.pi) - math.pi).to(dt.dtype)
