import math
import os
import signal
import threading
import time

import pytest
import torch

from mambapy.ops import kernel_ops
from mambapy.ops.cpu import selective_scan, step
from mambapy.ops.cpu.selective_scan import channels_of_a_task
from tests.helpers import assert_near
from tests.ops.cpu import exact as reference

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def inputs(b, l, e, n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    A = -torch.arange(1, n + 1, dtype=torch.float64).repeat(e, 1) * (
        0.5 + torch.rand(e, n, generator=g)
    )
    values = {
        "x": normal(b, l, e),
        "dt": normal(b, l, e) - 2,
        "A": A,
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(e),
        "z": normal(b, l, e),
        "dt_bias": normal(e) * 0.3,
        "state": normal(b, e, n),
    }
    return {k: v.to(dtype).double() for k, v in values.items()}


def documents(b, l, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(b, l, generator=g) < 0.1).cumsum(1)


def call(values, dtype, seq_idx=None, softplus=True):
    v = {k: t.to(dtype) for k, t in values.items() if t is not None}
    x, dt, A, B, C = (v[k] for k in NAMES[:5])
    return kernel_ops.selective_scan(
        x, dt, A, B, C, v.get("D"), v.get("z"), dt_bias=v.get("dt_bias"), dt_softplus=softplus,
        state=v.get("state"), seq_idx=seq_idx,
    )  # fmt: skip


def check(values, dtype, seq_idx=None, softplus=True, tolerance=None, floor=1e-30):
    """Outputs and all gradients against the reference in float64; errors relative to the largest
    value."""
    tolerance = tolerance or (1e-12 if dtype == torch.float64 else 3e-6)
    names = [k for k in NAMES if values.get(k) is not None]
    exact = {k: values[k].clone().requires_grad_() for k in names}
    ours = {k: values[k].to(dtype).clone().requires_grad_() for k in names}
    y0, h0 = reference.selective_scan(**exact, seq_idx=seq_idx, softplus=softplus)
    x, dt, A, B, C = (ours[k] for k in NAMES[:5])
    y, h = kernel_ops.selective_scan(
        x, dt, A, B, C, ours.get("D"), ours.get("z"), dt_bias=ours.get("dt_bias"),
        dt_softplus=softplus, state=ours.get("state"), seq_idx=seq_idx,
    )  # fmt: skip
    assert y.dtype == dtype
    assert y.is_contiguous()
    gy, gh = torch.randn_like(y0).to(dtype).double(), torch.randn_like(h0).to(dtype).double()
    expected = torch.autograd.grad([y0, h0], [exact[k] for k in names], [gy, gh])
    got = torch.autograd.grad([y, h], [ours[k] for k in names], [gy.to(y.dtype), gh.to(h.dtype)])
    pairs = {
        "y": (y, y0),
        "h": (h, h0),
        **{k: (a, c) for k, a, c in zip(names, got, expected, strict=True)},
    }
    errors = {
        k: ((a.double() - c).abs().max() / c.abs().max().clamp_min(floor)).item()
        for k, (a, c) in pairs.items()
    }
    assert all(error <= tolerance for error in errors.values()), errors
    return errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("l", [1, 2, 3, 63, 64, 65, 1000])
def test_lengths(l, dtype):
    check(inputs(2, l, 40, 5), dtype)
    check(inputs(2, l, 40, 5), dtype, documents(2, l))


@pytest.mark.parametrize("missing", [*NAMES[5:], "all"])
def test_missing_tensors(missing):
    values = inputs(2, 70, 33, 4)
    for name in NAMES[5:] if missing == "all" else [missing]:
        values[name] = None
    check(values, torch.float32)


@pytest.mark.parametrize(
    ("e", "n"), [(1, 1), (31, 3), (32, 16), (33, 17), (129, 2), (256, 8), (5, 256)]
)
def test_shapes(e, n):
    check(inputs(2, 66, e, n), torch.float32)


def test_without_softplus():
    values = inputs(1, 70, 20, 4)
    values["dt"] = values["dt"].abs() * 0.1
    values["dt_bias"] = values["dt_bias"].abs()
    check(values, torch.float32, softplus=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.012), (torch.float16, 0.002)])
def test_half_precision(dtype, tolerance):
    values = inputs(2, 70, 40, 5, dtype)
    check(values, dtype, documents(2, 70), tolerance=tolerance)
    # Only the storage is narrow: against the same numbers in float32 nothing but the rounding of y
    # differs.
    v = {k: t.to(dtype) for k, t in values.items()}
    y, h = call({k: t.double() for k, t in v.items()}, torch.float32)
    y2, h2 = call(v, dtype)
    assert torch.equal(y.to(dtype), y2)
    assert torch.equal(h, h2)


def test_extremes():
    values = inputs(2, 130, 40, 4)
    values["dt"][:, ::3] = -1e4
    values["dt"][:, 1::7] = 1e4
    errors = check(values, torch.float32, tolerance=1e-5)
    assert errors
    values = {k: t.float() for k, t in values.items()}
    # trap 24: a step of size 0 leaves the state alone, to the bit.
    values["dt"][:, 65:] = -1e4
    whole = call({k: t.double() for k, t in values.items()}, torch.float32)[1]
    part = {
        k: (t[:, :65] if k in ("x", "dt", "B", "C", "z") else t).double() for k, t in values.items()
    }
    assert torch.equal(whole, call(part, torch.float32)[1])


@pytest.mark.parametrize("dt", [1e4, math.nan])
def test_one_long_step_changes_nothing_before_it(dt):
    # Where all decays of a tile are in range, they are taken without clamps.
    values = inputs(2, 130, 40, 5)
    before = call(values, torch.float32)[0]
    values["dt"][:, 40, 3] = dt
    after = call(values, torch.float32)[0]
    assert torch.equal(before[:, :40], after[:, :40])
    assert torch.equal(before[..., 4:], after[..., 4:])
    assert not torch.equal(before[:, 40, 3], after[:, 40, 3])


def test_large_inputs():
    values = inputs(2, 130, 40, 4)
    for name in ("x", "B", "C", "z", "state"):
        values[name] = values[name] * 1000
    check(values, torch.float32)


def test_strides_and_no_writes():
    v = {k: t.float() for k, t in inputs(2, 70, 48, 6).items()}
    xz = torch.cat([v["x"], v["z"]], -1)
    bc = torch.cat([v["B"], v["C"]], -1)
    before = xz.clone(), bc.clone()
    plain = call(v, torch.float32)
    x, z = xz.chunk(2, -1)
    B, C = bc.chunk(2, -1)
    views = {
        **v,
        "x": x,
        "z": z,
        "B": B,
        "C": C,
        "dt": v["dt"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for a, c in zip(plain, call(views, torch.float32), strict=True):
        assert torch.equal(a, c)
    views["dt"] = v["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    views["C"] = v["C"][:, :1].expand(-1, 70, -1)
    v["C"] = v["C"][:, :1].repeat(1, 70, 1)
    for a, c in zip(call(v, torch.float32), call(views, torch.float32), strict=True):
        assert torch.equal(a, c)
    assert torch.equal(before[0], xz)
    assert torch.equal(before[1], bc)


def gradients(values, dtype=torch.float32):
    v = {k: t.to(dtype).requires_grad_() for k, t in values.items()}
    y, h = kernel_ops.selective_scan(
        *[v[k] for k in NAMES[:7]], dt_bias=v["dt_bias"], dt_softplus=True, state=v["state"]
    )
    (y.square().sum() + h.sum()).backward()
    return [y.detach(), h.detach(), *[t.grad for t in v.values()]]


@pytest.mark.parametrize("batch", [1, 3])
def test_same_bits_again_and_outputs_with_any_threads(batch):
    values = inputs(batch, 200, 300, 16)
    first = gradients(values)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 7, 16):
            torch.set_num_threads(threads)
            found, again = gradients(values), gradients(values)
            assert all(torch.equal(a, c) for a, c in zip(found, again, strict=True))
            assert all(torch.equal(a, c) for a, c in zip(first[:2], found[:2], strict=True))
            # Sums over channels are made in blocks, whose width follows the threads.
            for a, c in zip(first, found, strict=True):
                assert_near(c, a, 1e-6)
    finally:
        torch.set_num_threads(before)


def test_a_batch_of_one_fills_every_thread(monkeypatch):
    for threads, e in ((2, 1536), (12, 1536), (16, 1536), (16, 512), (4, 64)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        width = channels_of_a_task(1, e)
        rounds = math.ceil(math.ceil(e / width) / threads)
        assert rounds * width * threads <= 1.34 * max(e, 32 * threads)


def test_two_python_threads():
    values = [inputs(2, 150, 300, 16, seed=s) for s in range(4)]
    expected = [gradients(v) for v in values]
    results = [None] * 4

    def work(i):
        for _ in range(5):
            results[i] = gradients(values[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    for want, got in zip(expected, results, strict=True):
        assert all(torch.equal(a, c) for a, c in zip(want, got, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_after_fork(threads):
    v = {k: t.float() for k, t in inputs(2, 150, 300, 16).items()}
    x, dt, A, B, C = (v[k] for k in NAMES[:5])
    expected = selective_scan.forward(x, dt, A, B, C, dt_softplus=True)[0].numpy().tobytes()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    child = os.fork()
    if child == 0:
        # torch's own parallel loops hang in such a child: only our kernel runs here, and NumPy
        # compares.
        got = selective_scan.forward(x, dt, A, B, C, dt_softplus=True)[0].numpy().tobytes()
        os._exit(0 if got == expected else 2)
    torch.set_num_threads(before)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


def test_nan_and_inf_stay_where_they_are():
    v = {k: t.float() for k, t in inputs(2, 70, 64, 4).items()}
    v["x"][0, 30, 7] = float("nan")
    y, _ = kernel_ops.selective_scan(*[v[k] for k in NAMES[:5]], dt_softplus=True)
    assert y[0, 30:, 7].isnan().all()
    y[0, 30:, 7] = 0
    assert y.isfinite().all()


def test_chunks_of_a_sequence():
    v = {k: t.float() for k, t in inputs(2, 150, 48, 6).items()}
    y, h = call({k: t.double() for k, t in v.items()}, torch.float32)
    parts, state = [], v["state"]
    for a, c in ((0, 1), (1, 64), (64, 149), (149, 150)):
        piece = {
            k: (t[:, a:c] if k in ("x", "dt", "B", "C", "z") else t).double() for k, t in v.items()
        }
        part, state = call({**piece, "state": state.double()}, torch.float32)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, h)


@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step(n, dtype):
    values = inputs(2, 1, 130, n)
    v = {k: t.to(dtype) for k, t in values.items()}
    state = v["state"].clone()
    rows = [v[k][:, 0] if k in ("x", "dt", "B", "C", "z") else v[k] for k in NAMES[:7]]
    y, h = step.selective_scan_step(*rows, dt_bias=v["dt_bias"], dt_softplus=True, state=v["state"])
    y0, h0 = reference.selective_scan(**{k: t.double() for k, t in v.items()})
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]
    assert (y - y0[:, 0]).abs().max() <= tolerance * y0.abs().max()
    assert (h - h0).abs().max() <= min(tolerance, 1e-6) * h0.abs().max()
    assert torch.equal(state, v["state"])
