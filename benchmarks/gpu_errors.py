"""Errors of the GPU's kernels against the reference in float64, of every output and gradient.

    python benchmarks/gpu_errors.py [--device cpu] [--out benchmarks/results/h100]

Each is the largest difference, relative to the largest number of that tensor, over all cases of a
dtype. In 16 bits the inputs are rounded before either calculates.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambapy import ops
from mambapy.bench.machine import facts

Tensors = dict[str, Tensor]
LENGTHS = (1, 2, 3, 63, 64, 65, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scans(device: str) -> Iterator[tuple[str, Callable[..., Any], Tensors]]:
    """selective_scan with all arguments; some lengths for other numbers of states."""
    sizes = [(l, n) for l, n in product(LENGTHS, (16, 5, 64, 256)) if n == 16 or l in (1, 65, 1000)]
    for (l, n), reverse in product(sizes, (False, True)):
        b, e = 2, 200
        draw = partial(torch.randn, device=device)
        args = {name: draw(b, l, e) for name in ("x", "dt", "z")}
        args |= {name: draw(b, l, n) for name in ("B", "C")}
        args |= {"A": -4 * torch.rand(e, n, device=device), "D": draw(e), "dt_bias": draw(e) - 3}
        args |= {"state": draw(b, e, n)}
        args["seq_idx"] = torch.randint(0, 3, (b, l), device=device).sort(dim=1).values

        def run(reverse: bool = reverse, **args: Any) -> dict[str, Tensor]:
            options = {"dt_softplus": True, "return_state": True, "reverse": reverse}
            return dict(zip(("y", "state'"), ops.selective_scan(**args, **options), strict=True))

        yield "selective_scan", run, args


def convolutions(device: str) -> Iterator[tuple[str, Callable[..., Any], Tensors]]:
    """causal_conv1d with SiLU."""
    for l, e in product(LENGTHS, (33, 1536)):
        args = {"x": torch.randn(2, l, e), "weight": torch.randn(e, 4), "bias": torch.randn(e)}
        args |= {"state": torch.randn(2, 3, e)}
        args |= {"seq_idx": torch.randint(0, 3, (2, l)).sort(dim=1).values}

        def run(**args: Any) -> dict[str, Tensor]:
            return {"y": ops.causal_conv1d(**args, activation="silu")}

        yield "causal_conv1d", run, {name: T.to(device) for name, T in args.items()}


def mixers(device: str) -> Iterator[tuple[str, Callable[..., Any], Tensors]]:
    """conv_and_gate and the scan behind it, as a block runs them: one gradient for x and z."""
    for l in LENGTHS:
        b, e, n = 2, 64, 16
        draw = partial(torch.randn, device=device)
        args = {
            "xz": draw(b, l, 2 * e),
            "dt": draw(b, l, e),
            "B": draw(b, l, n),
            "C": draw(b, l, n),
        }
        args |= {"weight": draw(e, 4), "bias": draw(e), "A": -4 * torch.rand(e, n, device=device)}

        def run(backend: str, **args: Any) -> dict[str, Tensor]:
            taps = args.pop("weight"), args.pop("bias")
            options = {"activation": "silu", "backend": backend}
            x, again, z = ops.conv_and_gate(args.pop("xz"), *taps, **options)
            options = {"dt_softplus": True, "backend": backend}
            return {"y": ops.selective_scan(x, z=z, **args, **options), "conv": again}

        yield "conv_and_gate, selective_scan", run, args


def norms(device: str) -> Iterator[tuple[str, Callable[..., Any], Tensors]]:
    """rms_norm."""
    for l, d in product(LENGTHS, (24, 768, 2560)):
        args = {"x": torch.randn(2, l, d, device=device), "weight": torch.randn(d, device=device)}
        yield "rms_norm", lambda **args: {"y": ops.rms_norm(**args)}, args
        # The residual stream is in float32, as in training.
        added = {**args, "residual": torch.randn(2, l, d, device=device)}
        yield "add_rms_norm", _sum_and_norm, added


def _sum_and_norm(**args: Any) -> dict[str, Tensor]:
    return dict(zip(("y", "s"), ops.add_rms_norm(**args), strict=True))


def losses(device: str) -> Iterator[tuple[str, Callable[..., Any], Tensors]]:
    """linear_cross_entropy, of which no backend keeps all logits."""
    for l, v in product(LENGTHS, (50, 5000)):
        draw = partial(torch.randn, device=device)
        args = {"x": draw(2, l, 64), "weight": draw(v, 64) / 8}
        args["target"] = torch.randint(0, v, (2, l), device=device)
        yield (
            "linear_cross_entropy",
            lambda **args: {"loss": ops.linear_cross_entropy(**args)},
            args,
        )


def results(run: Callable[..., dict[str, Tensor]], args: Tensors, backend: str) -> Tensors:
    """Every output, and the gradients of a weighted sum of them."""
    leaves = {k: T.detach().requires_grad_() for k, T in args.items() if T.is_floating_point()}
    found = run(**args | leaves, backend=backend)
    total: Any = 0.0
    for T in found.values():
        # Numbers that 16 bits hold exactly, as they reach the op in its output's dtype.
        weight = torch.randn(T.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        total = total + (T.double() * weight.to(T.device)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    named = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: T.detach().double() for name, T in {**found, **named}.items()}


def errors(device: str, backend: str) -> dict[str, dict[str, dict[str, float]]]:
    """The largest error of each tensor, by op and dtype."""
    worst: dict[str, dict[str, dict[str, float]]] = {}
    for dtype, make in product(DTYPES, (scans, convolutions, mixers, norms, losses)):
        for op, run, args in make(device):
            # What belongs to a model and not to a token stays in float32, as in training.
            given = {k: T.to(dtype) if _is_activation(k, T) else T for k, T in args.items()}
            wide = {k: T.double() if T.is_floating_point() else T for k, T in given.items()}
            kind = "auto" if op == "linear_cross_entropy" else backend
            found, exact = results(run, given, kind), results(run, wide, "reference")
            into = worst.setdefault(op, {}).setdefault(str(dtype).removeprefix("torch."), {})
            for name, T in exact.items():
                error = float((found[name] - T).abs().max() / T.abs().max().clamp(min=1e-30))
                into[name] = max(into.get(name, 0.0), math.inf if math.isnan(error) else error)
    return worst


def _is_activation(name: str, T: Tensor) -> bool:
    """Whether a tensor has a row for each token."""
    return name in ("x", "dt", "B", "C", "z", "xz") and T.is_floating_point()


def main() -> None:
    """Calculate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="gpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h100"))
    args = parser.parse_args()
    torch.manual_seed(0)
    found = errors(args.device, args.backend)
    for op, by_dtype in found.items():
        for dtype, tensors in by_dtype.items():
            line = " ".join(f"{name} {error:.1e}" for name, error in tensors.items())
            sys.stdout.write(f"{op} {dtype} {line}\n")
    card = torch.cuda.get_device_name() if args.device == "cuda" else None
    record = {"machine": facts(None, card), "errors": found}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.device}-errors.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    main()
