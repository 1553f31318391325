"""Numbers against another implementation: transformers' Mamba with the same weights."""

import pytest
import torch

from mambapy.config import MambaConfig
from mambapy.lm import LM
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
    with torch.no_grad():
        for P in theirs.parameters():
            P.add_(0.2 * torch.randn_like(P))
    renamed = {
        name.replace("backbone.embeddings", "embedding").replace("backbone.norm_f", "norm_f"): T
        for name, T in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    tokens = torch.randint(24, (2, 19))
    logits, expected = ours(tokens), theirs(tokens, use_cache=False).logits
    # They run the scan itself in float32.
    assert_near(logits, expected, 1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {name: P.grad for name, P in theirs.named_parameters()}
    for name, P in ours.named_parameters():
        other = name.replace("embedding", "backbone.embeddings").replace(
            "norm_f", "backbone.norm_f"
        )
        assert_near(P.grad, grads[other], 2e-5)


def test_transformers_runs_on_our_pscan():
    """`use_mambapy=True` imports `mambapy.pscan`."""
    torch.manual_seed(0)
    config = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config, use_mambapy=True))
    plain = transformers.MambaForCausalLM(transformers.MambaConfig(**config))
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(24, (2, 11))
    assert_near(model(tokens).logits, plain(tokens, use_cache=False).logits, 1e-5)
