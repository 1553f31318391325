"""Initialisers of the state-space parameters, each with its formula and its source.

All write into the tensor they are given and return nothing. Random numbers are drawn in float32.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def init_A_log(A_log: Tensor) -> None:  # noqa: N802 (the papers' letter)
    """A = -1, -2, ..., -n in every channel, kept as A_log = log(-A).

    Args:
        A_log: (e, n).

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6 (S4D-Real).
    """
    n = A_log.shape[1]
    A_log.copy_(torch.log(torch.arange(1, n + 1, dtype=torch.float32, device=A_log.device)))


@torch.no_grad()
def init_A_log_uniform(A_log: Tensor, low: float, high: float) -> None:  # noqa: N802
    """A uniform in -[low, high], one number a head, kept as A_log = log(-A).

    Args:
        A_log: (h).
        low: least decay rate, > 0.
        high: largest decay rate.

    Source: Dao & Gu 2024 (arXiv 2405.21060), the paper's code (`A_init_range`).
    """
    rates = torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device)
    A_log.copy_(torch.log(rates.uniform_(low, high)))


@torch.no_grad()
def init_dt_bias(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """softplus(bias) = dt, with dt log-uniform in [dt_min, dt_max] and at least `floor`.

    The inverse of softplus is bias = dt + log(1 - exp(-dt)).

    Args:
        bias: (e).
        dt_min: least step size, > 0.
        dt_max: largest step size.
        floor: what smaller draws are raised to.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6, and the paper's code.
    """
    u = torch.rand(bias.shape, dtype=torch.float32, device=bias.device)
    dt = torch.exp(u * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_dt_weight(weight: Tensor, scheme: str, scale: float) -> None:
    """Uniform in +-scale / sqrt(R) ("random"), or that bound itself ("constant").

    Keeps the variance of dt at its start whatever the rank R is.

    Args:
        weight: (e, R).
        scheme: "random" or "constant".
        scale: factor of the bound.

    Source: the paper's code (state-spaces/mamba), `Mamba.__init__`.
    """
    bound = scale * weight.shape[1] ** -0.5
    if scheme == "constant":
        weight.fill_(bound)
    else:
        weight.uniform_(-bound, bound)


@torch.no_grad()
def rescale_residual(weight: Tensor, n_residuals: int) -> None:
    """Divide by sqrt(n_residuals): the sum of that many branches then keeps its variance.

    Args:
        weight: of the last projection of a residual branch.
        n_residuals: how many branches the whole model adds up.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    weight.div_(math.sqrt(n_residuals))
