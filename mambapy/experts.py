"""Mixture of experts: many gated MLPs, of which each token goes through a few.

    Experts               router -> the top k of n experts -> their weighted sum
      run_experts         tokens sorted by expert, so that each expert sees its own as one product
    load_balancing_loss   what keeps the router from always taking the same ones
    router_z_loss         what keeps its logits small

Letters: t tokens, d d_model, E n_experts, k top_k, f inner width of an expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy.layers import wide


class Experts(nn.Module):
    """y = sum over a token's top k of p_e fc2_e(silu(gate) * up), (gate, up) = fc1_e(x).

    p is the softmax over all experts in float32 or wider, not made to sum to one again over the k.

    Args:
        d_model: d.
        d_mlp: f.
        n_experts: E.
        top_k: k, 1 to E.

    Source: Lieber et al. 2024 (arXiv 2403.19887), section 3; Shazeer et al. 2017 (arXiv
    1701.06538).
    """

    def __init__(self, d_model: int, d_mlp: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(d_model, n_experts, bias=False)
        # Rows in the order of transformers' packed experts: gate, then up.
        self.fc1 = nn.Parameter(torch.empty(n_experts, 2 * d_mlp, d_model))
        self.fc2 = nn.Parameter(torch.empty(n_experts, d_model, d_mlp))
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        self.router.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        """Each expert as its own linear layers would be: uniform in +-1 / sqrt(inputs)."""
        for weight in (self.fc1, self.fc2):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the router's logits (..., E) before the softmax."""
        logits = self.router(x)
        p = torch.softmax(logits, dim=-1, dtype=wide(logits.dtype))
        p, chosen = p.topk(self.top_k, dim=-1)  # (..., k)
        flat = x.flatten(0, -2)
        y = run_experts(
            flat, chosen.reshape(len(flat), -1), p.reshape(len(flat), -1), self.fc1, self.fc2
        )
        return y.view(x.shape), logits


def run_experts(x: Tensor, chosen: Tensor, p: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """The weighted sum of what each token's experts make of it; the others are not touched.

    Args:
        x: (t, d) tokens.
        chosen: (t, k) int64, the experts of each.
        p: (t, k) their weights.
        fc1: (E, 2f, d) rows of gate, then up.
        fc2: (E, d, f).

    Returns:
        (t, d) in x's dtype.
    """
    k = chosen.shape[1]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, fc1, fc2 = x.to(dtype), fc1.to(dtype), fc2.to(dtype)
    if len(x) == 1 and not x.is_cuda:
        return _one_token(x, chosen[0].tolist(), p[0].to(x.dtype), fc1, fc2)
    # (t k) the pairs of a token and an expert, those of one expert side by side.
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(fc1))
    token, p = order // k, p.flatten()[order].to(x.dtype)[:, None]
    if not _has_grouped_mm(x):
        return _looped(x, token, p, counts, fc1, fc2)
    # Back to each token's own place: a sum of k terms in a fixed order, not a scattered one.
    y = p * _grouped(x[token], counts, fc1, fc2)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y[back].unflatten(0, (-1, k)).sum(dim=1)


def _looped(
    x: Tensor, token: Tensor, p: Tensor, counts: Tensor, fc1: Tensor, fc2: Tensor
) -> Tensor:
    """Each present expert on its tokens, one after the other."""
    y = torch.zeros_like(x)
    places = counts.tolist()
    # Unbound at once: the gradient of fc1[e] would be a whole fc1 of zeros for every expert.
    weights = zip(token.split(places), p.split(places), fc1.unbind(), fc2.unbind(), strict=True)
    for index, share, W1, W2 in weights:
        if len(index):
            gate, up = F.linear(x[index], W1).chunk(2, dim=-1)
            # Each token once for each expert, in the order of the experts: the same bits each time.
            y.index_add_(0, index, share * F.linear(F.silu(gate) * up, W2))
    return y


def _one_token(x: Tensor, chosen: list[int], p: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """The same for x (1, d), with nothing to sort: decoding."""
    y = torch.zeros_like(x)
    for e, share in zip(chosen, p, strict=True):
        gate, up = F.linear(x, fc1[e]).chunk(2, dim=-1)
        y = y + share * F.linear(F.silu(gate) * up, fc2[e])
    return y


def _grouped(rows: Tensor, counts: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """The same as one product over groups of rows, without reading the counts back."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, fc2.transpose(1, 2), offs=ends)


def _has_grouped_mm(x: Tensor) -> bool:
    """Whether torch has a product over groups of rows for these; on a CPU it is no faster."""
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


class LoadBalance(NamedTuple):
    """What the routers of a model do.

    Args:
        total: () the loss of all layers together.
        layers: (L,) the loss of each layer alone.
        load: (L, E) the share of tokens that chose each expert, k in sum; no gradient.
    """

    total: Tensor
    layers: Tensor
    load: Tensor


def load_balancing_loss(
    router_logits: list[Tensor] | tuple[Tensor, ...], top_k: int, mask: Tensor | None = None
) -> LoadBalance:
    """E sum_e f_e P_e: f is the share of tokens that chose e, P its mean probability; least is k.

    Args:
        router_logits: (b, l, E) or (t, E) of each layer, before the softmax.
        top_k: k, experts of a token.
        mask: (b, l) bool, True at real tokens; padding is left out.

    Returns:
        The loss of all layers' tokens together, as transformers calculates it, and of each layer.

    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, without their 1 / k.
    """
    weight = None if mask is None else mask.flatten().to(wide(router_logits[0].dtype))
    shares, means = [], []
    for logits in router_logits:
        flat = logits.flatten(0, -2)
        p = torch.softmax(flat, dim=-1, dtype=wide(flat.dtype))  # (t, E)
        chosen = F.one_hot(p.topk(top_k, dim=-1).indices, p.shape[-1]).sum(1).to(p.dtype)  # (t, E)
        if weight is not None:
            p, chosen = p * weight[:, None], chosen * weight[:, None]
        count = len(flat) if weight is None else weight.sum().clamp(min=1)
        shares.append(chosen.sum(0) / count)
        means.append(p.sum(0) / count)
    f, P = torch.stack(shares).detach(), torch.stack(means)  # (L, E)
    E = f.shape[1]
    return LoadBalance(E * (f.mean(0) * P.mean(0)).sum(), E * (f * P).sum(1), f)


def router_z_loss(
    router_logits: list[Tensor] | tuple[Tensor, ...], mask: Tensor | None = None
) -> Tensor:
    """The mean over tokens and layers of logsumexp(logits)^2.

    Args:
        router_logits: (b, l, E) or (t, E) of each layer.
        mask: (b, l) bool, True at real tokens; padding is left out.

    Source: Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    z = torch.stack([L.flatten(0, -2).to(wide(L.dtype)).logsumexp(-1) for L in router_logits])
    squares = z.square()  # (L, t)
    if mask is None:
        return squares.mean()
    real = mask.flatten().to(squares.dtype)
    return (squares * real).sum() / (real.sum().clamp(min=1) * len(squares))
