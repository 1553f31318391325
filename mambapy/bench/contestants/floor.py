"""The floor: matrix products alone, which no implementation of a Mamba can do without.

A block has four, d_model d, d_inner e, d_state n, rank R:

    in_proj  d -> 2e        x_proj  e -> R + 2n        dt_proj  R -> e        out_proj  e -> d

A language model adds its head, d -> vocab_size. In training each product brings two more, for the
gradients of its input and of its weight. Loss, optimiser, norms, convolution and scan are no part
of it, and neither is taking memory: all results are written to where there was room before.
"""

import math
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


def block_shapes(rows: int, d: int, n: int, expand: int = 2) -> list[tuple[int, int, int]]:
    """The (rows, inputs, outputs) of a block's four products."""
    e, R = expand * d, math.ceil(d / 16)
    return [(rows, d, 2 * e), (rows, e, R + 2 * n), (rows, R, e), (rows, e, d)]


def products(kind: str, sizes: dict[str, int]) -> list[Product]:
    """The products of a block, a training step, or a prefill that keeps the last logits."""
    rows, d = sizes["batch"] * sizes["length"], sizes["d_model"]
    shapes = block_shapes(rows, d, sizes["d_state"]) * sizes.get("n_layers", 1)
    if kind == "train":
        shapes.append((rows, d, sizes["vocab_size"]))
    if kind == "decode":
        shapes.append((sizes["batch"], d, sizes["vocab_size"]))
    return [Product(*shape) for shape in shapes]


def memory_read(sizes: dict[str, int]) -> Callable[[], Tensor]:
    """A read of `bandwidth_bytes` bytes of memory, by adding them up."""
    values = sizes["bandwidth_bytes"] // 4
    numbers = torch.randn(min(values, _BLOCK)).repeat(values // min(values, _BLOCK))
    return numbers.sum
