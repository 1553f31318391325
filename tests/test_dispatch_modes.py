"""Modes that watch or replace torch's operators: kernels must not run behind their back."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mambapy.config import MambaConfig
from mambapy.lm import LM


class Names(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_have_shapes_and_no_values(grad):
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        model = LM(MambaConfig(d_model=8, n_layers=2), 16)
        tokens = torch.zeros(2, 5, dtype=torch.long)
        logits, state = model.prefill(tokens)
        assert logits.shape == (2, 5, 16)
        assert model.step(tokens[:, 0], state)[0].shape == (2, 16)
        if grad:
            logits.sum().backward()
            assert model.embedding.weight.grad.shape == (16, 8)


@pytest.mark.parametrize("grad", [False, True])
def test_a_mode_sees_our_operators(grad):
    model, tokens = LM(MambaConfig(d_model=8, n_layers=1), 16), torch.zeros(1, 5, dtype=torch.long)
    with Names() as names, torch.set_grad_enabled(grad):
        model(tokens)
    assert {"mambapy.selective_scan.default", "mambapy.rms_norm.default"} <= names.seen
