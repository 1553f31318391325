"""Mamba-2's step as one launch equals the step op by op; what is not planned runs op by op."""

import pytest
import torch
from torch import nn

from mambapy.config import Mamba2Config, Mamba3Config
from mambapy.lm import LM
from tests.test_fused import TOLERANCE, check, planned


def model(**changes) -> LM:
    torch.manual_seed(0)
    sizes = {"d_model": 40, "n_layers": 3, "d_state": 17, "d_head": 10, "n_groups": 2}
    lm = LM(Mamba2Config(**{**sizes, **changes}), 50).eval()
    for P in lm.parameters():
        nn.init.normal_(P, std=0.3)
    return lm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_op_by_op_in_every_dtype(dtype, batch):
    check(model().to(dtype), batch, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "conv_bias": False, "D_has_hdim": True},
        {"d_conv": 1, "n_groups": 8},
        {"d_model": 33, "d_head": 6, "n_groups": 1},
        {"d_state": 1, "d_head": 1},
        {"d_state": 128, "d_head": 80, "n_groups": 1},
        {"dt_limit": (0.3, 0.9)},
        {"learnable_init_states": True},
    ],
    ids=str,
)
def test_equals_op_by_op_in_every_shape(changes):  # trap 9
    check(model(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"d_ssm": 40},
        {"rmsnorm": False},
        {"norm_before_gate": True},
        {"d_intermediate": 8},
    ],
    ids=str,
)
def test_what_has_no_plan_runs_op_by_op(changes):
    check(model(**changes), fused=False)


def test_a_hook_on_the_norm_is_called():
    lm = model()
    check(lm)
    calls = []
    lm.backbone.layers[1].mixer.norm.register_forward_hook(lambda *_: calls.append(1))
    check(lm, fused=False)
    assert calls


def test_mamba3_is_not_planned():
    torch.manual_seed(0)
    lm = LM(Mamba3Config(d_model=8, n_layers=1, d_state=4, d_head=4), 50).eval()
    check(lm, fused=False)
    assert planned(lm) is None
