"""Ops that write their result over an argument: `out=`."""

import pytest
import torch

from mambapy import ops
from mambapy.config import Mamba2Config
from mambapy.errors import BackendError, ShapeError
from mambapy.mamba import MambaBlock
from mambapy.mamba2 import Mamba2Block
from mambapy.ragged import Ragged
from tests.helpers import scan_args, tiny


def plain(args):
    return {name: T.detach() for name, T in args.items()}


@pytest.mark.parametrize("backend", ["cpu", "chunked", "pscan", "reference"])
@pytest.mark.parametrize("over", ["x", "dt", "z"])
def test_a_scan_over_its_own_argument(backend, over):
    args = {**plain(scan_args(l=70, e=40, dtype=torch.float32)), "dt_softplus": True}
    # A slice, as a projection gives it: rows are apart.
    args[over] = torch.cat((args[over], args[over]), dim=-1)[..., :40]
    expected, last = ops.selective_scan(**args, return_state=True, backend=backend)
    out = args[over]
    y, state = ops.selective_scan(**args, return_state=True, backend=backend, out=out)
    assert y is out
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_over_its_own_input(backend, dtype):
    x, weight, state = torch.randn(2, 70, 80), torch.randn(40, 4), torch.randn(2, 3, 40)
    seq_idx = torch.arange(70).expand(2, 70) // 30
    x = x[..., 20:60].to(dtype)
    options = {"state": state, "seq_idx": seq_idx, "activation": "silu", "backend": backend}
    expected, last = ops.causal_conv1d(x, weight, return_state=True, **options)
    y, after = ops.causal_conv1d(x, weight, return_state=True, out=x, **options)
    assert y is x
    assert torch.equal(y, expected)
    assert torch.equal(after, last)


def test_a_result_in_another_precision_than_the_kernels():
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 4, dtype=torch.float64)
    expected = ops.causal_conv1d(x, weight)
    assert ops.causal_conv1d(x, weight, out=x) is x
    assert torch.equal(x, expected)


def test_what_out_cannot_be():
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 4, requires_grad=True)
    with pytest.raises(BackendError, match=r"out= has no gradient"):
        ops.causal_conv1d(x, weight, out=torch.empty_like(x))
    with torch.no_grad(), pytest.raises(ShapeError, match=r"out must be .*float32 \(2, 5, 8\)"):
        ops.causal_conv1d(x, weight, out=torch.empty(2, 5, 4))


@torch.no_grad()
def test_a_block_overwrites_nothing_that_a_hook_has_seen():
    block, x = MambaBlock(tiny()), torch.randn(2, 9, 8)
    expected = block(x)
    seen = []
    for layer in (block.in_proj, block.x_proj, block.dt_proj, block.out_proj):
        layer.register_forward_hook(lambda _, args, y: seen.extend((args[0], y)))
    copies = []
    block.in_proj.register_forward_hook(lambda _, args, y: copies.append(y.clone()))
    block.dt_proj.register_forward_hook(lambda _, args, y: copies.append(y.clone()))
    torch.testing.assert_close(block(x), expected)
    kept = [seen[1], seen[5]]
    assert all(torch.equal(T, copy) for T, copy in zip(kept, copies, strict=True))


@torch.no_grad()
def test_a_block_does_not_write_to_its_input():
    block, x = MambaBlock(tiny()), torch.randn(2, 9, 8)
    before = x.clone()
    ragged = Ragged.of(x, torch.rand(2, 9) > 0.3, None)
    block(x)
    block.prefill(x, None, ragged)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssd_over_its_own_input(backend, by_channel, dtype):
    x, dt = torch.randn(2, 300, 4, 24)[..., 4:20].to(dtype), torch.rand(2, 300, 4)
    B, C = torch.randn(2, 2, 300, 2, 5)
    args = {"dt": dt, "A": -torch.rand(4), "B": B, "C": C, "D": torch.randn(4, 16)}
    if not by_channel:
        args["D"] = args["D"][:, 0]
    options = {"return_state": True, "backend": backend, "state": torch.randn(2, 4, 16, 5)}
    expected, last = ops.ssd(x, **args, **options)
    y, state = ops.ssd(x, **args, **options, out=x)
    assert y is x
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gated_norm_over_its_own_input(backend):
    y, z, weight = torch.randn(2, 40, 90)[..., 3:83], torch.randn(2, 40, 80), torch.randn(80)
    expected = ops.gated_rms_norm(y, z, weight, 2, backend=backend)
    assert ops.gated_rms_norm(y, z, weight, 2, backend=backend, out=y) is y
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_block_of_mamba2_overwrites_nothing_that_a_hook_has_seen():
    config = Mamba2Config(d_model=8, n_layers=1, d_state=4, d_head=4)
    block, x = Mamba2Block(config), torch.randn(2, 9, 8)
    expected, before = block(x), x.clone()
    seen, copies = [], []
    for layer in (block.in_proj, block.norm, block.out_proj):
        layer.register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
        layer.register_forward_hook(lambda _, args, y: copies.extend(T.clone() for T in (*args, y)))
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)
    assert all(torch.equal(T, copy) for T, copy in zip(seen, copies, strict=True))
