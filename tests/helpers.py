"""What several test files share: random arguments of the ops, and comparisons."""

import torch
from torch import Tensor

from mambapy.config import MambaConfig


def tiny(**changes) -> MambaConfig:
    """A configuration small enough for any test."""
    return MambaConfig(**{"d_model": 8, "n_layers": 2, "d_state": 3} | changes)


def scan_args(b=2, l=7, e=5, n=3, dtype=torch.float64, *, full=True) -> dict[str, Tensor]:
    """Random arguments of selective_scan, with or without the optional ones."""

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    args = {
        "x": draw(b, l, e),
        "dt": draw(b, l, e),
        "A": (-4 * torch.rand(e, n, dtype=dtype)).requires_grad_(),
        "B": draw(b, l, n),
        "C": draw(b, l, n),
    }
    if full:
        args |= {
            "D": draw(e),
            "z": draw(b, l, e),
            "dt_bias": draw(e),
            "state": draw(b, e, n),
            "seq_idx": torch.randint(0, 3, (b, l)).sort(dim=1).values,
        }
    return args


def outputs_and_grads(function, args: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """What a function returns, and the gradients of a random weighted sum of it."""
    results = function(**args)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    weights = [draw.to(r.dtype) for draw, r in zip(draws, results, strict=True)]
    loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    named = {name: T for name, T in args.items() if T.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    found = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return found | {f"grad {name}": g for name, g in zip(named, grads, strict=True)}


def assert_near(actual, expected, tolerance: float) -> None:
    """Every tensor within `tolerance` of the expected one, relative to its largest number."""
    if isinstance(actual, Tensor):
        actual, expected = {"it": actual}, {"it": expected}
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), name
        scale = max(float(want.detach().abs().max()), 1e-3) if want.numel() else 1.0
        error = float((got.double() - want.double()).detach().abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error:.3g}, scale {scale:.3g}"
