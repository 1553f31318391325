"""The floor: matrix products alone, which no implementation of a Mamba can do without.

A block has four, d_model d, d_inner e, d_state n, rank R:

    in_proj  d -> 2e        x_proj  e -> R + 2n        dt_proj  R -> e        out_proj  e -> d

A block of Mamba-2, h heads of p channels, has two projections, and for each chunk of q tokens

    Q K^T  (q, n) (n, q)      M X  (q, q) (q, p) for each head
    Q S    (q, n) (n, h p)    K^T X  (n, q) (q, h p)

with the q that makes them fastest here. Experts of inner width f have two each, for the rows that
the router gives them, which lie side by side already:

    fc1  d -> 2f        fc2  f -> d

Both directions of Vision Mamba have an x_proj and a dt_proj; patches and head are two more.

A language model adds its head, d -> vocab_size. In training each product brings two more, for the
gradients of its two factors. Loss, optimiser, norms, convolution, recurrence and routing are no
part of it, and neither is taking memory: all results are written to where there was room before.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Of the values that a memory read adds up; they are drawn once and repeated.
_BLOCK = 1 << 14


class Product:
    """y = x W^T with random numbers, and its gradients."""

    def __init__(self, rows: int, inputs: int, outputs: int) -> None:
        self.x, self.weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        self.y, self.grad_y = torch.empty(rows, outputs), torch.randn(rows, outputs)
        self.grad_x, self.grad_weight = torch.empty_like(self.x), torch.empty_like(self.weight)

    def forward(self) -> None:
        """The product."""
        torch.mm(self.x, self.weight.t(), out=self.y)

    def training(self) -> None:
        """The product, and the two that make the gradients of x and of W."""
        self.forward()
        torch.mm(self.grad_y, self.weight, out=self.grad_x)
        torch.mm(self.grad_y.t(), self.x, out=self.grad_weight)


class Chunks:
    """The products of Mamba-2's recurrence for chunks of q of b l tokens, each chunk by itself."""

    def __init__(self, sizes: dict[str, int], q: int) -> None:
        h, p, n = 2 * sizes["d_model"] // sizes["d_head"], sizes["d_head"], sizes["d_state"]
        self.count = -(-sizes["batch"] * sizes["length"] // q)
        shapes = [(1, q, n, q), (h, q, q, p), (1, q, n, h * p), (1, n, q, h * p)]
        self.factors = [
            (torch.randn(batch, i, k), torch.randn(batch, k, j), torch.randn(batch, i, j))
            for batch, i, k, j in shapes
        ]
        self.results = [[torch.empty_like(T) for T in factors] for factors in self.factors]

    def forward(self) -> None:
        """Each product."""
        for _ in range(self.count):
            for (A, B, _), (_, _, C) in zip(self.factors, self.results, strict=True):
                torch.bmm(A, B, out=C)

    def training(self) -> None:
        """Each product, and those that make the gradients of its factors."""
        self.forward()
        for _ in range(self.count):
            for (A, B, grad), (grad_A, grad_B, _) in zip(self.factors, self.results, strict=True):
                torch.bmm(grad, B.mT, out=grad_A)
                torch.bmm(A.mT, grad, out=grad_B)


def best_chunks(sizes: dict[str, int]) -> Chunks:
    """The chunk size whose products take least time."""

    def seconds(chunks: Chunks) -> float:
        found = []
        for _ in range(4):
            start = time.perf_counter()
            chunks.forward()
            found.append(time.perf_counter() - start)
        return min(found)

    return min((Chunks(sizes, q) for q in (32, 64, 128, 256)), key=seconds)


def block_shapes(rows: int, d: int, n: int, expand: int = 2) -> list[tuple[int, int, int]]:
    """The (rows, inputs, outputs) of a block's four products."""
    e, R = expand * d, math.ceil(d / 16)
    return [(rows, d, 2 * e), (rows, e, R + 2 * n), (rows, R, e), (rows, e, d)]


def heads_shapes(rows: int, d: int, n: int, p: int) -> list[tuple[int, int, int]]:
    """The (rows, inputs, outputs) of the two projections of a block of Mamba-2."""
    return [(rows, d, 4 * d + 2 * n + 2 * d // p), (rows, 2 * d, d)]


def vision_shapes(sizes: dict[str, int]) -> list[tuple[int, int, int]]:
    """The (rows, inputs, outputs) of a Vision Mamba."""
    b, d, n, patch = (sizes[name] for name in ("batch", "d_model", "d_state", "patch"))
    patches = (sizes["image"] // patch) ** 2
    in_proj, x_proj, dt_proj, out_proj = block_shapes(b * (patches + 1), d, n)
    block = [in_proj, x_proj, x_proj, dt_proj, dt_proj, out_proj]
    return [(b * patches, 3 * patch**2, d), *block * sizes["n_layers"], (b, d, 1000)]


def experts_shapes(groups: list[int], d: int, f: int) -> list[tuple[int, int, int]]:
    """The (rows, inputs, outputs) of the two products of each expert that has rows."""
    return [shape for rows in groups if rows for shape in ((rows, d, 2 * f), (rows, f, d))]


def products(
    kind: str, sizes: dict[str, int], groups: list[int] | None = None
) -> list[Product | Chunks]:
    """The products of a block, a training step, or a prefill that keeps the last logits.

    Args:
        kind: of the case.
        sizes: of the case.
        groups: rows of each expert; without it, there are none.
    """
    if groups is not None:
        return [Product(*s) for s in experts_shapes(groups, sizes["d_model"], sizes["d_mlp"])]
    if kind == "vision":
        return [Product(*shape) for shape in vision_shapes(sizes)]
    rows, d, layers = sizes["batch"] * sizes["length"], sizes["d_model"], sizes.get("n_layers", 1)
    chunks: list[Chunks] = []
    if "d_head" in sizes:
        shapes = heads_shapes(rows, d, sizes["d_state"], sizes["d_head"]) * layers
        chunks = [best_chunks(sizes)] * layers
    else:
        shapes = block_shapes(rows, d, sizes["d_state"]) * layers
    if kind == "train":
        shapes.append((rows, d, sizes["vocab_size"]))
    if kind in ("decode", "heads") and "tokens" in sizes:
        shapes.append((sizes["batch"], d, sizes["vocab_size"]))
    return [*(Product(*shape) for shape in shapes), *chunks]


def memory_read(sizes: dict[str, int]) -> Callable[[], Tensor]:
    """A read of `bandwidth_bytes` bytes of memory, by adding them up."""
    values = sizes["bandwidth_bytes"] // 4
    numbers = torch.randn(min(values, _BLOCK), dtype=torch.float32).repeat(
        values // min(values, _BLOCK)
    )
    return numbers.sum
