import dataclasses

import pytest
import torch

from mambapy.errors import CheckpointError, ShapeError
from mambapy.mamba import Mamba
from mambapy.state import SSMState, State
from tests.helpers import assert_near, tiny


@pytest.fixture
def model():
    return Mamba(tiny())


@pytest.fixture
def state(model):
    return model.prefill(torch.randn(3, 5, 8))[1]


def same(a, b):
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


def test_rows_are_sequences(model, state):
    x = torch.randn(3, 8)
    y, _ = model.step(x, state)
    for chosen in ([2, 0], [1], [1, 1, 2]):
        found, _ = model.step(x[chosen], state[chosen])
        assert_near(found, y[chosen], 1e-6)
    assert same(state[torch.tensor([2, 0])], state.reorder(torch.tensor([2, 0])))
    assert state[1].batch_size == 1
    assert same(state[-1], state[2])
    assert same(state[torch.tensor([True, False, True])], state[[0, 2]])
    assert same(state.repeat(2), state[[0, 0, 1, 1, 2, 2]])
    with pytest.raises(ShapeError, match="row 3 of a state with a batch of 3"):
        state[3]


def test_immutable(state):
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.layers = ()
    copy = state.clone()
    copy.layers[0].ssm.zero_()
    assert float(state.layers[0].ssm.detach().abs().max()) > 0


def test_moved_and_cut_off(state):
    assert state.layers[0].ssm.requires_grad
    assert not any(T.requires_grad for T in state.detach().tensors().values())
    wide = state.to(dtype=torch.float64)
    assert wide.layers[1].conv.dtype == torch.float64
    assert wide.seq_idx.dtype == torch.int64
    assert {T.device.type for T in state.to("meta").tensors().values()} == {"meta"}


def test_save_load_continue_is_bit_equal(model, state, tmp_path):
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert type(loaded) is type(state)
    assert same(loaded, state)
    x = torch.randn(3, 4, 8)
    assert torch.equal(model.prefill(x, loaded)[0], model.prefill(x, state)[0])


def test_files_that_hold_no_state(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        State.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        State.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no state"):
        State.load(tmp_path / "other.safetensors")


def test_beam_search_equals_brute_force(model):  # trap 38
    """The best of all 4^3 paths through a toy model, found by reordering states."""
    torch.manual_seed(3)
    choices, head = torch.randn(4, 8), torch.randn(8, 4)

    def scores(y):
        return torch.log_softmax(y @ head, dim=-1)

    start = torch.randn(1, 2, 8)
    y, state = model.prefill(start)
    totals = scores(y[:, -1])[0]
    paths = [[i] for i in range(4)]
    state = state.repeat(4)
    for _ in range(2):
        y, state = model.step(choices[[p[-1] for p in paths]], state)
        new = totals[:, None] + scores(y)
        totals, best = new.flatten().topk(min(64, new.numel()))
        paths = [[*paths[int(i) // 4], int(i) % 4] for i in best]
        state = state.reorder(best // 4)
    brute = {}
    for path in ((a, b, c) for a in range(4) for b in range(4) for c in range(4)):
        x = torch.cat((start, choices[list(path[:2])][None]), dim=1)
        s = scores(model(x))[0]
        brute[path] = float((s[1, path[0]] + s[2, path[1]] + s[3, path[2]]).detach())
    best = max(brute, key=brute.get)
    assert tuple(paths[0]) == best
    assert abs(float(totals[0].detach()) - brute[best]) < 1e-4


def test_kinds_are_known():
    assert State._kinds["SSMState"] is SSMState
