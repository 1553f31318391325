import pytest
import torch
from torch import nn

from mambapy.config import MambaConfig
from mambapy.errors import ConfigError
from mambapy.lm import LM
from mambapy.optim import ROLES, make_optimizer, param_groups, role


def build(**options: bool) -> LM:
    torch.manual_seed(0)
    return LM(MambaConfig(d_model=8, n_layers=2, d_state=4, bias=True), 20, **options)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_once(tied: bool) -> None:
    model = build(tie_embeddings=tied)
    grouped = [p for group in param_groups(model, 0.1) for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_decay_goes_by_role_not_by_shape() -> None:
    # trap 56: A_log is two-dimensional and must not decay.
    model = build(tie_embeddings=False)
    decayed, others = param_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    endings = {
        name.removeprefix("backbone.layers.")[2 * ("layers" in name) :]
        for name in names_of(model, decayed["params"])
    }
    assert endings == {
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.x_proj.weight",
        "mixer.dt_proj.weight",
        "mixer.out_proj.weight",
        "lm_head.weight",
    }
    still = names_of(model, others["params"])
    for name in ("A_log", "D", "dt_proj.bias", "conv1d.bias", "in_proj.bias", "out_proj.bias"):
        assert f"backbone.layers.1.mixer.{name}" in still
    assert {"embedding.weight", "norm_f.weight", "backbone.layers.0.norm.weight"} <= still


def test_tied_head_counts_as_embedding() -> None:
    model = build(tie_embeddings=True)
    decayed, others = param_groups(model, 0.1)
    assert all(p is not model.lm_head.weight for p in decayed["params"])
    assert sum(p is model.lm_head.weight for p in others["params"]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A_log", "A_log"),
        ("mixer.D", "D"),
        ("mixer.dt_proj.bias", "dt_bias"),
        ("layers.0.norm.weight", "norm"),
        ("lm_head.weight", "matrix"),
    ],
)
def test_role(name: str, expected: str) -> None:
    assert role(name) == expected
    assert expected in ROLES


@pytest.mark.parametrize("name", ["mixer.gain", "mixer.ABCD", "my_in_proj.weight", "A_log.extra"])
def test_parameter_without_role_raises(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        role(name)


def test_model_with_unknown_parameter_raises() -> None:
    model = build()
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match="'gain' has no role"):
        param_groups(model, 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = build()
    model.embedding.weight.requires_grad_(False)
    grouped = [p for group in param_groups(model, 0.1) for p in group["params"]]
    assert all(p is not model.embedding.weight for p in grouped)


def test_zero_gradients_shrink_only_what_decays() -> None:
    model = build(tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if ROLES[role(name)][1] else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_making_an_optimizer_changes_no_weight() -> None:
    # trap 52: nothing after the model's own initialisation may redraw dt_proj.
    model, twin = build(), build()
    make_optimizer(model, lr=1e-3)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_token_0_learns() -> None:
    # trap 58: no padding_idx, which would freeze token 0.
    model = build(tie_embeddings=False)
    before = model.embedding.weight.detach()[0].clone()
    optimizer = make_optimizer(model, lr=1e-2)
    model(torch.tensor([[0, 1, 2]])).square().sum().backward()
    optimizer.step()
    assert (model.embedding.weight.detach()[0] - before).abs().min() > 1e-3


def test_bfloat16_parameters_lose_small_updates_and_float32_ones_do_not() -> None:
    # trap 13: AdamW moves a weight by about lr a step; bfloat16 has 8 bits of mantissa.
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Module()
        model.D = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.0)
        for _ in range(100):
            model.D.grad = torch.ones_like(model.D)
            optimizer.step()
        moved[dtype] = float((1 - model.D.detach().float()).mean())
    assert moved[torch.float32] == pytest.approx(0.1, rel=1e-3)
    assert moved[torch.bfloat16] == 0.0


def test_the_step_is_fused_on_the_cpu() -> None:
    assert make_optimizer(build(), lr=1e-3).defaults["fused"]
