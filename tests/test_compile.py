"""torch.compile without graph breaks, few graphs, and torch.export with dynamic sizes."""

import pytest
import torch

from mambapy.config import Mamba2Config, Mamba3Config
from mambapy.lm import LM
from tests.helpers import assert_near, tiny

# torch's own, on the way into its compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LENGTHS = (5, 9, 17, 70, 130)
HEADS = {"d_model": 8, "n_layers": 1, "d_state": 4, "d_head": 4}
LEARNED = {"learnable_init_states": True, "dt_limit": (0.01, 0.5)}
MODELS = {
    "mamba chunked": tiny(backend="chunked"),
    "mamba cpu": tiny(backend="cpu"),
    "mamba2 chunked": Mamba2Config(**HEADS, **LEARNED, chunk_size=16, backend="chunked"),
    "mamba2 cpu": Mamba2Config(**HEADS, n_groups=2, backend="cpu"),
    "mamba3 chunked": Mamba3Config(**HEADS, mimo_rank=2, chunk_size=8, backend="chunked"),
    "mamba3 cpu": Mamba3Config(**HEADS, n_groups=2, d_intermediate=5, backend="cpu"),
}
each = pytest.mark.parametrize("name", MODELS)


class Counter:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@each
def test_training_compiles_whole_in_two_graphs(name):  # row 11 of the users' list
    model, counter = LM(MODELS[name], 21), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for l in LENGTHS:
        tokens = torch.randint(21, (2, l))
        loss = compiled(tokens).square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
        for got, want in zip(found, expected, strict=True):
            assert_near(got, want, 1e-5)
    assert counter.graphs <= 2


@pytest.mark.parametrize("name", ["mamba chunked", "mamba cpu", "mamba2 cpu", "mamba3 cpu"])
def test_prefill_and_step_compile_whole(name):
    model, counter = LM(MODELS[name], 21), Counter()
    prefill = torch.compile(model.prefill, fullgraph=True, backend=counter)
    for l in LENGTHS:
        tokens = torch.randint(21, (2, l))
        _, state = prefill(tokens)
    assert counter.graphs <= 2
    state = state.detach()
    step = torch.compile(torch.no_grad()(model.step), fullgraph=True, backend=counter)
    before, token = counter.graphs, torch.tensor([1, 2])
    expected_state = state
    for _ in range(4):
        logits, state = step(token, state)
        expected, expected_state = model.step(token, expected_state)
        assert_near(logits, expected, 1e-5)
    assert counter.graphs - before <= 2


@pytest.mark.parametrize("name", ["mamba cpu", "mamba2 chunked", "mamba3 cpu"])
def test_masks_and_documents_compile_whole(name):  # trap 27
    model = LM(MODELS[name], 21)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, mask = torch.randint(21, (2, 9)), torch.rand(2, 9) > 0.3
    assert_near(compiled(tokens, mask=mask), model(tokens, mask=mask), 1e-5)
    ones = torch.ones_like(mask)
    assert_near(compiled(tokens, mask=ones), model(tokens), 1e-5)
    seq_idx = torch.randint(-1, 3, (2, 9)).sort(dim=1).values
    assert_near(compiled(tokens, seq_idx=seq_idx), model(tokens, seq_idx=seq_idx), 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_trains():
    model = LM(tiny(), 21)
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.randint(21, (2, 33))
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(tokens).float().square().mean()
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).float().square().mean()
    assert abs(float((loss - expected).detach())) < 0.02 * float(expected.detach())
    assert all(torch.isfinite(P.grad).all() for P in model.parameters())


@each
def test_export_with_dynamic_batch_and_length(name):  # trap 65
    model = LM(MODELS[name], 21).eval()
    b, l = torch.export.Dim("b"), torch.export.Dim("l")
    program = torch.export.export(
        model, (torch.randint(21, (2, 9)),), dynamic_shapes=({0: b, 1: l},)
    )
    for rows, length in ((1, 4), (3, 64), (2, 130)):
        tokens = torch.randint(21, (rows, length))
        assert_near(program.module()(tokens), model(tokens), 1e-5)


def test_operators_are_well_formed():
    """torch's own checks: schema, fake tensors, autograd, dynamic shapes."""
    from tests.helpers import scan_args

    args = scan_args(b=2, l=70, e=4, n=3, dtype=torch.float32)
    positional = [args[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")]
    torch.library.opcheck(
        torch.ops.mambapy.chunked_scan.default, (*positional, args["seq_idx"], True)
    )
    torch.library.opcheck(
        torch.ops.mambapy.chunked_scan.default,
        (*positional[:5], None, None, None, None, None, False),
    )
