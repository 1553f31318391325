"""What training keeps between the passes: bytes saved by one block for its backward pass."""

import importlib
import itertools

import pytest
import torch

from mambapy.config import Mamba2Config, Mamba3Config
from mambapy.mamba2 import Mamba2Block
from mambapy.mamba3 import Mamba3Block

SIZES = {"d_model": 256, "n_layers": 1, "d_state": 64, "d_head": 32}


def saved_bytes(block, l):
    """Bytes of the storages that autograd keeps, parameters apart."""
    found = {}

    def pack(T):
        storage = T.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), T)
        return T

    own = {P.untyped_storage().data_ptr() for P in block.parameters()}
    x = torch.randn(1, l, SIZES["d_model"], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
        y = block(x)
    assert y.requires_grad
    return sum(size for place, (size, _) in found.items() if place not in own)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("make", ["mamba2", "mamba3"])
def test_linear_in_the_length(make, backend):
    kinds = {"mamba2": (Mamba2Block, Mamba2Config), "mamba3": (Mamba3Block, Mamba3Config)}
    block_kind, config = kinds[make]
    block = block_kind(config(**SIZES, backend=backend))
    sizes = [saved_bytes(block, l) for l in (256, 512, 1024, 2048)]
    for shorter, longer in itertools.pairwise(sizes):
        assert 1.8 < longer / shorter < 2.05


@pytest.mark.filterwarnings("ignore")
def test_a_quarter_of_what_transformers_saves():
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    config = transformers.Mamba2Config(
        hidden_size=SIZES["d_model"],
        num_heads=2 * SIZES["d_model"] // SIZES["d_head"],
        head_dim=SIZES["d_head"],
        state_size=SIZES["d_state"],
        n_groups=1,
        num_hidden_layers=1,
    )
    theirs = saved_bytes(module.Mamba2Mixer(config, layer_idx=0), 1024)
    assert 4 * saved_bytes(Mamba2Block(Mamba2Config(**SIZES)), 1024) < theirs
