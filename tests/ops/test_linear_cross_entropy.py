import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
from tests.helpers import assert_near, outputs_and_grads

# The package has a function of that name.
module = importlib.import_module("mambapy.ops.linear_cross_entropy")
V, D = 13, 5


def arguments(shape=(3, 7), dtype=torch.float64, *, bias=True):
    args = {
        "x": torch.randn(*shape, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, D, dtype=dtype, requires_grad=True),
    }
    if bias:
        args["bias"] = torch.randn(V, dtype=dtype, requires_grad=True)
    target = torch.randint(V, shape)
    target.view(-1)[1::4] = -100
    return args, target


@pytest.fixture(autouse=True, params=["in chunks", "at once"])
def few(request, monkeypatch):
    """Both ways of few logits on a CPU."""
    if request.param == "in chunks":
        monkeypatch.setattr(module, "FEW", 0)


def small_chunks(monkeypatch, tokens):
    monkeypatch.setattr(module, "CHUNK_CPU", tokens * V * 8)
    monkeypatch.setattr(module, "MULTIPLE", 1)
    monkeypatch.setattr(module, "FEW", 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [1, 4, 7, 20, 21, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition(monkeypatch, reduction, tokens, bias):
    small_chunks(monkeypatch, tokens)
    args, target = arguments(bias=bias)

    def expect(x, weight, bias=None):
        logits = F.linear(x, weight, bias).flatten(0, 1)
        return F.cross_entropy(logits, target.flatten(), reduction=reduction)

    expected = outputs_and_grads(expect, args)
    for backend in ("auto", "chunked", "reference"):
        found = outputs_and_grads(
            lambda backend=backend, **given: ops.linear_cross_entropy(
                target=target, reduction=reduction, backend=backend, **given
            ),
            args,
        )
        assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("tokens", [4, 100])
def test_padding_of_the_weight(monkeypatch, tokens):
    small_chunks(monkeypatch, tokens)
    args, target = arguments()
    target.clamp_(max=9)
    expected = outputs_and_grads(
        lambda x, weight, bias: F.cross_entropy(
            F.linear(x, weight[:10], bias[:10]).flatten(0, 1), target.flatten()
        ),
        args,
    )
    for backend in ("auto", "reference"):
        found = outputs_and_grads(
            lambda backend=backend, **given: ops.linear_cross_entropy(
                target=target, vocab_size=10, backend=backend, **given
            ),
            args,
        )
        assert_near(found, expected, 1e-12)
    with pytest.raises(ShapeError, match="vocab_size=14 must be from 1 to v = 13"):
        ops.linear_cross_entropy(target=target, vocab_size=14, **args)


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (2, 1, 3), (65,)])
def test_any_number_of_tokens(monkeypatch, shape):
    small_chunks(monkeypatch, 2)
    args, target = arguments(shape)
    found = ops.linear_cross_entropy(target=target, reduction="sum", **args)
    logits = F.linear(args["x"], args["weight"], args["bias"]).reshape(-1, V)
    assert_near(found, F.cross_entropy(logits, target.flatten(), reduction="sum"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(monkeypatch, dtype):
    # As near to float64 as the logits' dtype lets it be; the sum over chunks loses nothing.
    small_chunks(monkeypatch, 10)
    args, target = arguments((40, 50), torch.float64)
    exact = outputs_and_grads(
        lambda **given: ops.linear_cross_entropy(target=target, **given), args
    )
    args = {k: v.detach().to(dtype).requires_grad_() for k, v in args.items()}
    found = outputs_and_grads(
        lambda **given: ops.linear_cross_entropy(target=target, **given), args
    )
    assert found["output 0"].dtype == torch.float32
    assert {found[f"grad {name}"].dtype for name in args} == {dtype}
    eps = torch.finfo(dtype).eps
    assert_near(found["output 0"], exact["output 0"], max(4 * eps, 1e-6))
    assert_near(found, exact, max(8 * eps, 2e-6))


def test_float16_gradient_of_a_mean_over_many_does_not_vanish():
    x = torch.zeros(40_000, 2).half().requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).half().requires_grad_()
    ops.linear_cross_entropy(x, weight, torch.zeros(40_000, dtype=torch.int64)).backward()
    # 0.5 / 40,000 is below float16's smallest normal number, not below its smallest.
    assert float(x.grad[0, 0]) == pytest.approx(-0.5 / 40_000, rel=0.01)


def test_autocast_decides_the_dtype_of_the_logits_only():
    args, target = arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_grads(
            lambda **given: ops.linear_cross_entropy(target=target, **given), args
        )
        expected = outputs_and_grads(
            lambda x, weight, bias: F.cross_entropy(
                F.linear(x, weight, bias).float().flatten(0, 1), target.flatten()
            ),
            args,
        )
    assert {T.dtype for T in found.values()} == {torch.float32}
    assert_near(found, expected, 2e-2)
    assert_near(found["output 0"], expected["output 0"], 1e-6)


def test_what_is_ignored_may_hold_anything(monkeypatch):
    small_chunks(monkeypatch, 4)
    args, target = arguments()
    expected = outputs_and_grads(
        lambda **given: ops.linear_cross_entropy(target=target, **given), args
    )
    spoilt = args["x"].detach().clone()
    spoilt[target == -100] = float("nan")
    args["x"] = spoilt.requires_grad_()
    found = outputs_and_grads(
        lambda **given: ops.linear_cross_entropy(target=target, **given), args
    )
    assert_near(found, expected, 1e-12)


def test_nothing_that_counts():
    args, target = arguments()
    target.fill_(-100)
    assert ops.linear_cross_entropy(target=target, **args).isnan()
    assert ops.linear_cross_entropy(target=target, reduction="sum", **args) == 0


def test_large_logits():
    x = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = ops.linear_cross_entropy(x, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4
    assert x.grad.tolist() == [[1.0, -1.0]]


def test_only_what_is_asked_for():
    for name in ("x", "weight", "bias"):
        args, target = arguments()
        for other, T in args.items():
            T.requires_grad_(other == name)
        loss = ops.linear_cross_entropy(target=target, **args)
        loss.backward()
        assert {k for k, T in args.items() if T.grad is not None} == {name}
    with torch.no_grad():
        assert not ops.linear_cross_entropy(target=target, **args).requires_grad


def test_a_graph_that_is_kept_can_be_used_again():
    args, target = arguments()
    loss = ops.linear_cross_entropy(target=target, **args)
    first = torch.autograd.grad(loss, [*args.values()], retain_graph=True)
    second = torch.autograd.grad(loss, [*args.values()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tied_weight_adds_up():
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    tokens, target = torch.randint(V, (2, 6)), torch.randint(V, (2, 6))
    loss = ops.linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, target)
    (found,) = torch.autograd.grad(loss, weight)
    logits = F.embedding(tokens, weight).tanh() @ weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert_near(found, torch.autograd.grad(loss, weight)[0], 1e-12)


def test_second_derivatives():
    args, target = arguments((3,))
    names = list(args)

    def loss(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return ops.linear_cross_entropy(target=target, **given)

    assert torch.autograd.gradgradcheck(loss, tuple(args.values()))


def test_torch_func():
    args, target = arguments()
    x, weight = args["x"].detach(), args["weight"].detach()
    found = torch.func.grad(lambda W: ops.linear_cross_entropy(x, W, target))(weight)
    given = weight.clone().requires_grad_()
    expected = torch.autograd.grad(ops.linear_cross_entropy(x, given, target), given)[0]
    assert_near(found, expected, 1e-12)
    rows = torch.func.vmap(lambda x, t: ops.linear_cross_entropy(x, weight, t))(x, target)
    assert_near(rows[1], ops.linear_cross_entropy(x[1], weight, target[1]), 1e-12)


# torch's own, on the way into its compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole():
    torch._dynamo.reset()
    args, _ = arguments()
    given = [args["weight"], args["bias"]]

    def loss(x, target):
        return ops.linear_cross_entropy(2 * x, given[0], target, given[1])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for t in (3, 8, 21):
        x = torch.randn(t, D, dtype=torch.float64, requires_grad=True)
        target = torch.randint(V, (t,))
        found = torch.autograd.grad(compiled(x, target), [x, *given])
        expected = torch.autograd.grad(loss(x, target), [x, *given])
        for got, want in zip(found, expected, strict=True):
            assert_near(got, want, 1e-12)


def test_operator_is_well_formed():
    args, target = arguments((4,), torch.float32)
    x, weight, bias = args.values()
    torch.library.opcheck(
        torch.ops.mambapy.linear_cross_entropy.default,
        (x, weight, target, bias, V - 1, -100, torch.float32, "torch", [True, True, True]),
    )


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operator returns."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        sizes = [T.numel() for T in tree_leaves(result) if isinstance(T, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return result


def test_never_all_logits(monkeypatch):
    t, v, d = 300, 500, 4
    monkeypatch.setattr(module, "CHUNK_CPU", 64 * v * 4)
    x = torch.randn(t, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    target = torch.randint(v, (t,))
    with Largest() as seen:
        # The body itself, as eager calls have it: a mode sees the operator from outside only.
        module._forward._init_fn(
            *(x, weight, target, None, v, -100, torch.float32, "torch", [True, True, False])
        )
    assert 0 < seen.most <= 64 * v
    with Largest() as seen:
        ops.linear_cross_entropy(x, weight, target, backend="reference")
    assert seen.most == t * v


def test_bad_arguments():
    args, target = arguments()
    call = ops.linear_cross_entropy
    x, weight, bias = args.values()
    with pytest.raises(ShapeError, match=r"x must be \(..., d\) and weight \(v, d\)"):
        call(x, weight[:, 1:], target)
    with pytest.raises(ShapeError, match=r"target must be int64 \(3, 7\)"):
        call(x, weight, target[:, 1:])
    with pytest.raises(ShapeError, match="bias must be"):
        call(x, weight, target, bias[1:])
    with pytest.raises(ShapeError, match="reduction='none' must be mean or sum"):
        call(x, weight, target, reduction="none")
    with pytest.raises(ShapeError, match=r"targets must be in \[0, vocab_size = 13\) or"):
        call(x, weight, torch.full_like(target, V))
    with pytest.raises(ShapeError, match="weight must be floating"):
        call(x, weight.long(), target)
    with pytest.raises(BackendError, match="it needs CUDA tensors"):
        call(x, weight, target, backend="gpu")


INTERPRETED = """
import importlib
import torch
from mambapy.ops.gpu import cross_entropy
module = importlib.import_module("mambapy.ops.linear_cross_entropy")
cross_entropy.MOST_COLUMNS = 16
torch.manual_seed(0)
for t, width, v in ((3, 1, 1), (2, 16, 16), (5, 37, 37), (1, 64, 64), (3, 48, 31), (2, 40, 15)):
    for dtype in (torch.float32, torch.bfloat16):
        L, target = (4 * torch.randn(t, width)).to(dtype), torch.randint(v, (t,))
        losses, G = module._softmax_gradient(L.clone(), target, v, True)
        for wanted in (False, True):
            mine = L.clone()
            found, given = cross_entropy.softmax_gradient(mine, target, v, wanted)
            assert given is mine
            torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(mine, G if wanted else L, rtol=tolerance, atol=tolerance)
print("equal")
"""


def test_triton_kernel_in_its_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr
