"""Numbers against another implementation: transformers' Mamba and Mamba-2, the same weights."""

import math

import pytest
import torch

from mambapy.config import Mamba2Config, MambaConfig
from mambapy.lm import LM
from mambapy.pscan import pscan
from tests.helpers import assert_near

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_logits_and_gradients(tie, biases):
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=24,
            hidden_size=16,
            state_size=5,
            num_hidden_layers=2,
            conv_kernel=3,
            expand=2,
            time_step_rank=3,
            use_bias=biases,
            use_conv_bias=biases,
            tie_word_embeddings=tie,
        )
    ).double()
    ours = LM(
        MambaConfig(
            d_model=16, n_layers=2, d_state=5, d_conv=3, dt_rank=3, bias=biases, conv_bias=biases
        ),
        24,
        tie_embeddings=tie,
    ).double()
    perturb(theirs)
    tokens = torch.randint(24, (2, 19))
    # They run the scan itself in float32.
    assert_same(ours, theirs, tokens)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.2, 0.9)])
def test_mamba2_logits_and_gradients(groups, tie, limit):  # traps 6, 9, 41, 42, 43
    """All of it is comparable: the installed version normalises each group on its own.

    (Its older versions did not, nor did they clamp dt.) Its gated norm, like its scan, runs in
    float32. Its initial A is 1, 2, 3, ... where ours is uniform; here the weights are copied.
    """
    torch.manual_seed(groups)
    biases = tie
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=24,
            hidden_size=16,
            state_size=5,
            num_hidden_layers=2,
            conv_kernel=3,
            expand=2,
            num_heads=8,
            head_dim=4,
            n_groups=groups,
            use_bias=biases,
            use_conv_bias=biases,
            time_step_limit=limit,
            chunk_size=8,
            tie_word_embeddings=tie,
        )
    ).double()
    assert theirs.backbone.layers[0].mixer.norm.group_size == 32 // groups
    config = Mamba2Config(
        d_model=16,
        n_layers=2,
        d_state=5,
        d_head=4,
        d_conv=3,
        n_groups=groups,
        dt_limit=limit,
        chunk_size=4,
        bias=biases,
        conv_bias=biases,
    )
    ours = LM(config, 24, tie_embeddings=tie).double()
    perturb(theirs)
    # Whole chunks, part of one, and one token more or less.
    for l in (1, 5, 8, 15, 17, 37):
        assert_same(ours, theirs, torch.randint(24, (2, l)))


def perturb(model):
    """Away from initial values that are the same everywhere."""
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))


def assert_same(ours, theirs, tokens):
    """Copy their weights, and compare the logits and all gradients."""
    renamed = {
        name.replace("backbone.embeddings", "embedding").replace("backbone.norm_f", "norm_f"): T
        for name, T in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    ours.zero_grad()
    theirs.zero_grad()
    logits, expected = ours(tokens), theirs(tokens, use_cache=False).logits
    assert_near(logits, expected, 1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {name: P.grad for name, P in theirs.named_parameters()}
    assert len(grads) == len(list(ours.parameters()))
    for name, P in ours.named_parameters():
        other = name.replace("embedding", "backbone.embeddings").replace(
            "norm_f", "backbone.norm_f"
        )
        assert_near(P.grad, grads[other], 2e-5)


@pytest.mark.parametrize(
    ("family", "option"), [("Mamba", "use_mambapy"), ("FalconMamba", "use_falcon_mambapy")]
)
def test_transformers_runs_on_our_pscan(family, option, monkeypatch):
    """`use_mambapy=True` imports `mambapy.pscan`, in training; so its gradients are compared."""
    torch.manual_seed(0)
    config, model = (getattr(transformers, f"{family}{kind}") for kind in ("Config", "ForCausalLM"))
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    ours = model(config(**sizes, **{option: True}))
    plain = model(config(**sizes))
    perturb(plain)
    ours.load_state_dict(plain.state_dict())
    calls = []
    monkeypatch.setattr("mambapy.pscan.pscan", lambda *a: calls.append(1) or pscan(*a))
    tokens = torch.randint(24, (2, 11))
    results = []
    for each in (ours, plain):
        each.train()
        logits = each(tokens, use_cache=False).logits
        logits.square().mean().backward()
        results.append({"logits": logits} | {n: P.grad for n, P in each.named_parameters()})
    assert_near(results[0], results[1], 2e-5)
    assert len(calls) == 2
