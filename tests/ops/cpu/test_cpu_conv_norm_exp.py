import math

import numpy as np
import pytest
import torch
from numba import cfunc, types

from mambapy.ops.cpu import conv1d, exp, step
from mambapy.ops.cpu.memory import load, pointer, store
from mambapy.ops.cpu.simd import LANES
from mambapy.ops.kernel_ops import causal_conv1d, rms_norm
from tests.ops.cpu import exact as reference


def relative(a, b):
    return (
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if b.numel() else 0.0
    )


def compare(ours, exact, outs, outs0, tolerance):
    gs = [torch.randn_like(o) for o in outs0]
    got = torch.autograd.grad(outs, ours, [g.to(o.dtype) for g, o in zip(gs, outs, strict=True)])
    want = torch.autograd.grad(outs0, exact, gs)
    errors = [relative(a, b) for a, b in zip([*outs, *got], [*outs0, *want], strict=True)]
    assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("l", [1, 2, 3, 31, 32, 33, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_conv(l, k, packed, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, l, 70), (70, k), (70,), (2, k - 1, 70))
    values = [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]
    seq = (torch.rand(2, l, generator=g) < 0.2).cumsum(1) if packed else None
    exact = [v.clone().requires_grad_() for v in values]
    ours = [v.to(dtype).requires_grad_() for v in values]
    for silu in (True, False):
        y = causal_conv1d(
            *ours[:3], activation="silu" if silu else None, state=ours[3], seq_idx=seq
        )
        y0 = reference.causal_conv1d(*exact, seq_idx=seq, silu=silu)
        used = slice(0, 4 if k > 1 else 3)
        compare(ours[used], exact[used], [y], [y0], 1e-12 if dtype == torch.float64 else 2e-6)


def test_conv_in_pieces_and_steps():
    x, w, bias = torch.randn(2, 50, 70), torch.randn(70, 4), torch.randn(70)
    seq = (torch.rand(2, 50) < 0.2).cumsum(1)
    whole = conv1d.forward(x, w, bias, activation=True, seq_idx=seq)
    first = conv1d.forward(x[:, :20], w, bias, activation=True, seq_idx=seq[:, :20])
    state = conv1d.next_state(x[:, :20], 4, None, seq[:, :20])
    state = torch.where((seq[:, 19] == seq[:, 20])[:, None, None], state, 0.0)
    rest = conv1d.forward(x[:, 20:], w, bias, activation=True, state=state, seq_idx=seq[:, 20:])
    assert torch.equal(torch.cat([first, rest], 1), whole)
    state, ys = torch.zeros(2, 3, 70), []
    for t in range(50):
        y, state = step.conv1d_step(x[:, t], state, w, bias, True)
        ys.append(y)
    assert torch.equal(torch.stack(ys, 1), conv1d.forward(x, w, bias, activation=True))
    assert torch.equal(state, x[:, -3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 32, 100, 768])
@pytest.mark.parametrize("fused", [False, True])
def test_norm(d, fused, dtype):
    values = [
        torch.randn(3, 50, d).double(),
        torch.randn(d).double(),
        torch.randn(3, 50, d).double(),
    ]
    values = values if fused else values[:2]
    exact = [v.clone().requires_grad_() for v in values]
    ours = [v.to(dtype).requires_grad_() for v in values]
    y, s = rms_norm(*ours)
    y0, s0 = reference.rms_norm(*exact)
    outs, outs0 = ([y, s], [y0, s0]) if fused else ([y], [y0])
    # At d = 1 the gradient is eps-small; its error is set by the cancellation p - u mean(p u).
    tolerance = (1e-11 if d > 1 else 1e-8) if dtype == torch.float64 else (2e-6 if d > 1 else 1.0)
    compare(ours, exact, outs, outs0, tolerance)


def kernel(function, F):
    def run(args):
        source, target = pointer(args[0], F), pointer(args[1], F)
        for i in range(0, args[2], LANES):
            store(target, i, function(load(source, i)))

    compiled = cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")(run)

    def call(x):
        padded = np.zeros(-(-len(x) // LANES) * LANES, F)
        padded[: len(x)] = x
        out = np.empty_like(padded)
        args = np.array([padded.ctypes.data, out.ctypes.data, len(padded)], np.int64)
        compiled.ctypes(args.ctypes.data_as(compiled.ctypes.argtypes[0]))
        return out[: len(x)]

    return call


@pytest.mark.parametrize("F", [np.float32, np.float64])
def test_exp(F):
    f = kernel(exp.exp, F)
    x = np.concatenate([np.linspace(-87.3, 88.7, 2000001), -np.logspace(-30, 1.9, 100001)]).astype(
        F
    )
    wide = np.exp(x.astype(np.longdouble))
    assert (np.abs(f(x) - wide) / np.spacing(wide.astype(F))).max() <= 2
    g = kernel(exp.exp2, F)
    x = np.linspace(-126, 127.99, 2000001).astype(F)
    wide = np.exp2(x.astype(np.longdouble))
    assert (np.abs(g(x) - wide) / np.spacing(wide.astype(F))).max() <= 2
    special = f(np.array([0, -0.0, -1e4, -np.inf, 1e4, np.inf, np.nan], F))
    assert special[:6].tolist() == [1, 1, 0, 0, math.inf, math.inf]
    assert np.isnan(special[6])
    special = g(np.array([0, -1e5, -np.inf, 1e5, np.inf, np.nan, 10], F))
    assert special[[0, 1, 2, 3, 4, 6]].tolist() == [1, 0, 0, math.inf, math.inf, 1024]
    assert np.isnan(special[5])


@pytest.mark.parametrize("F", [np.float32, np.float64])
def test_softplus_sigmoid_silu(F):
    x = np.concatenate([np.linspace(-80, 60, 1000001), np.linspace(-0.1, 0.1, 10001)]).astype(F)
    wide = x.astype(np.longdouble)
    bound = 4 * np.finfo(F).eps
    soft = np.where(wide > 20, wide, np.log1p(np.exp(wide)))
    assert np.abs(kernel(exp.softplus, F)(x) / soft - 1).max() <= bound
    assert np.abs(kernel(exp.sigmoid, F)(x) * (1 + np.exp(-wide)) - 1).max() <= bound
    silu = kernel(exp.silu, F)(x)
    assert np.abs(silu - wide / (1 + np.exp(-wide))).max() <= bound * 60
    # trap 8
    special = kernel(exp.softplus, F)(np.array([-30, 0, 19.9, 20.1, 100, -1e4, np.nan], F))
    want = [*[math.log1p(math.exp(v)) for v in (-30, 0, 19.9)], 20.1, 100, 0]
    assert np.allclose(special[:6], np.array(want, F), rtol=bound, atol=0)
    assert np.isnan(special[6])
