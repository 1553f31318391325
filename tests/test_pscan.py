import pytest
import torch

from mambapy.errors import ShapeError
from mambapy.pscan import pscan, pscan_reverse
from tests.helpers import assert_near


def loop(A, X, reverse=False):
    h, H = torch.zeros_like(X[:, 0]), [None] * X.shape[1]
    for t in reversed(range(X.shape[1])) if reverse else range(X.shape[1]):
        h = A[:, t] * h + X[:, t]
        H[t] = h
    return torch.stack(H, dim=1)


def draw(b, l, *rest):
    return torch.rand(b, l, *rest, dtype=torch.float64), torch.randn(
        b, l, *rest, dtype=torch.float64
    )


@pytest.mark.parametrize("l", [*range(1, 40), 63, 64, 65, 100, 127, 128, 129, 1000])
def test_any_length_both_directions(l):  # trap 48
    A, X = draw(2, l, 3, 2)
    assert_near(pscan(A, X), loop(A, X), 1e-12)
    assert_near(pscan_reverse(A, X), loop(A, X, reverse=True), 1e-12)


@pytest.mark.parametrize("function", [pscan, pscan_reverse])
@pytest.mark.parametrize("l", [1, 2, 5, 8])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives(function, l):
    A, X = (T.requires_grad_() for T in draw(2, l, 2))
    assert torch.autograd.gradcheck(function, (A, X), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (A, X))


def test_derivatives_at_zero():  # trap 17
    A = torch.zeros(1, 6, 2, dtype=torch.float64, requires_grad=True)
    X = torch.zeros(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pscan, (A, X))


def test_arguments_are_not_written_to():  # trap 37
    A, X = (T.requires_grad_() for T in draw(2, 9, 3))
    before = A.detach().clone(), X.detach().clone()
    pscan(A, X).sum().backward()
    assert torch.equal(A, before[0])
    assert torch.equal(X, before[1])


def test_vmap_over_either_argument():
    A, X = draw(4, 5, 3)
    many = torch.randn(6, 4, 5, 3, dtype=torch.float64)
    expected = torch.stack([pscan(A, x) for x in many])
    assert_near(torch.func.vmap(pscan, (None, 0))(A, many), expected, 1e-12)
    decays = torch.rand(4, 5, 3, 6, dtype=torch.float64)
    expected = torch.stack([pscan(decays[..., i], X) for i in range(6)])
    assert_near(torch.func.vmap(pscan, (3, None))(decays, X), expected, 1e-12)


def test_half_precision_is_scanned_in_float32():  # trap 11
    A, X = draw(1, 300, 4)
    low = pscan(A.bfloat16(), X.bfloat16())
    assert low.dtype == torch.bfloat16
    exact = loop(A.bfloat16().double(), X.bfloat16().double())
    # One rounding to bfloat16 at the end, none on the way.
    assert_near(low, exact, 2**-8)


def test_transposed_and_expanded_arguments():  # trap 46
    A, X = draw(3, 4, 7)
    A, X = A.transpose(1, 2), X.transpose(1, 2)
    assert_near(pscan(A, X), loop(A, X), 1e-12)
    row = A[:1].expand(3, -1, -1)
    assert_near(pscan(row, X), loop(row, X), 1e-12)


def test_memory_has_no_jump_at_powers_of_two():  # trap 48
    sizes = {}
    for l in (127, 128, 129, 130):
        A, X = (T.requires_grad_() for T in draw(1, l, 64))
        saved = {}

        def pack(T, saved=saved):
            saved[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
            return T

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
            pscan(A, X)
        sizes[l] = sum(saved.values()) / l
    assert max(sizes.values()) == min(sizes.values())


@pytest.mark.parametrize(
    ("A", "X"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)),
        (torch.zeros(1, 0, 3), torch.zeros(1, 0, 3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3)),
    ],
)
def test_bad_arguments(A, X):
    with pytest.raises(ShapeError):
        pscan(A, X)


def test_as_transformers_calls_it():
    # transformers' slow path: pscan(discrete_A.transpose(1, 2), deltaB_u.transpose(1, 2))
    A, X = draw(2, 6, 5, 3)
    h = pscan(A.transpose(1, 2).contiguous().transpose(1, 2), X)
    assert_near(h, loop(A, X), 1e-12)
