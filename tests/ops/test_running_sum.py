"""Sums over the length and since the start of each document."""

import pytest
import torch

from mambapy.ops.running_sum import running_sum, since_start
from tests.helpers import assert_near


@pytest.mark.parametrize("l", [1, 2, 63, 64, 65, 128, 4096, 5000])
@pytest.mark.parametrize("block", [2, 64])
def test_is_cumsum_in_float64(l, block):
    T = torch.randn(2, l, 3)
    found = running_sum(T, block)
    assert found.dtype == torch.float64
    assert_near(found, T.double().cumsum(1), 1e-13)


def test_gradient():
    T = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda T: running_sum(T, 2), (T,))
    assert torch.autograd.gradgradcheck(lambda T: running_sum(T, 2), (T,))


def test_deterministic():  # trap 18
    T = torch.randn(2, 500, 3)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = running_sum(T), running_sum(T)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert torch.equal(running_sum(T[:, :300]), first[:, :300])


def test_without_starts_it_is_the_running_sum():
    T = torch.randn(2, 70, 3)
    total, goes_on = since_start(T, None)
    assert goes_on is None
    assert torch.equal(total, running_sum(T))


def one_by_one(T, starts):
    """The sums, in a loop."""
    rows, first = [], []
    for t in range(T.shape[1]):
        new = starts[:, t, None]
        rows.append(T[:, t] if t == 0 else torch.where(new, 0.0, rows[-1]) + T[:, t])
        first.append(~new if t == 0 else first[-1] & ~new)
    return torch.stack(rows, dim=1), torch.stack(first, dim=1)


@pytest.mark.parametrize("l", [1, 2, 40, 200])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_starts_over_with_each_document(l, share):  # trap 30
    T = torch.randn(3, l, 2, dtype=torch.float64)
    starts = torch.rand(3, l) < share
    starts[:, 0] = False
    total, goes_on = since_start(T, starts)
    expected, first = one_by_one(T, starts)
    assert_near(total, expected, 1e-12)
    assert goes_on.shape == (3, l, 1)
    assert torch.equal(goes_on, first)


def test_gradient_since_start():
    T = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0, 0], [0] * 9], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda T: since_start(T, starts)[0], (T,))
    last = since_start(T, starts)[0][:, -1].sum()
    (grad,) = torch.autograd.grad(last, T)
    # Nothing from another document, not even a rounding error.
    assert torch.equal(grad[0, :6], torch.zeros_like(grad[0, :6]))
    assert torch.equal(grad[0, 6:], torch.ones_like(grad[0, 6:]))
    assert torch.equal(grad[1], torch.ones_like(grad[1]))
