"""A step as one launch: it equals the step op by op, and it notices what has changed."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from mambapy import ops
from mambapy.config import MambaConfig
from mambapy.errors import ShapeError
from mambapy.lm import LM
from mambapy.mamba import Mamba
from tests.helpers import assert_near

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


def model(seed=0, **changes) -> LM:
    torch.manual_seed(seed)
    sizes = {"d_model": 40, "n_layers": 3, "d_state": 17, "expand": 1.8, "dt_rank": 5}
    lm = LM(MambaConfig(**{**sizes, **changes}), 50).eval()
    for P in lm.parameters():
        nn.init.normal_(P, std=0.3)
    return lm


def warm_state(lm, batch):
    with torch.no_grad():
        return lm.prefill(torch.randint(0, 50, (batch, 5)))[1]


def plain_step(lm, token, state):
    """The step op by op: what a model does where gradients are enabled."""
    with torch.enable_grad():
        logits, new = lm.step(token, state)
    assert logits.requires_grad
    return logits.detach(), new.detach()


def planned(lm) -> bool | None:
    """Whether the last step was one launch; None where none was ever tried."""
    plans = list(lm._plans.values())
    return plans[-1].output is not None if plans else None


def check(lm, batch=2, tolerance=1e-5, *, fused=True):
    """One step in both ways; `fused` says whether it should be one launch."""
    state, token = warm_state(lm, batch), torch.randint(0, 50, (batch,))
    before = state.map(torch.clone)
    with torch.no_grad():
        logits, new = lm.step(token, state)
    assert bool(planned(lm)) == fused
    expected, after = plain_step(lm, token, state)
    assert logits.dtype == expected.dtype
    assert_near(logits, expected, tolerance)
    assert_near(new.tensors(), after.tensors(), tolerance)
    assert_near(state.tensors(), before.tensors(), 0.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_op_by_op_in_every_dtype(dtype, batch):
    check(model().to(dtype), batch, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True},
        {"conv_bias": False},
        {"d_conv": 1},
        {"d_conv": 2},
        {"d_model": 33, "expand": 3, "dt_rank": 40},
        {"d_state": 1},
        {"d_state": 64},
        {"d_model": 160, "expand": 2},
        {"inner_norm": "plain"},
        {"inner_norm": "learned", "d_state": 5, "dt_rank": 3},
    ],
    ids=str,
)
def test_equals_op_by_op_in_every_shape(changes):
    check(model(**changes))


def test_inference_mode_leaves_nothing_behind():
    lm = model().to(torch.bfloat16)
    state, token = warm_state(lm, 2), torch.tensor([1, 2])
    with torch.inference_mode():
        expected, _ = lm.step(token, state)
    with torch.no_grad():
        assert torch.equal(lm.step(token, state)[0], expected)
    assert len(lm._plans) == 1


def test_stack_alone():
    torch.manual_seed(0)
    stack = Mamba(MambaConfig(d_model=40, n_layers=2))
    state, x = stack.init_state(2), torch.randn(2, 40)
    for _ in range(3):
        expected, after = stack.step(x, state)
        with torch.no_grad():
            y, state = stack.step(x, state)
        assert_near(y, expected.detach(), 1e-5)
        assert_near(state.tensors(), after.detach().tensors(), 1e-5)


def test_results_do_not_share_memory():
    lm = model()
    state = warm_state(lm, 1)
    with torch.no_grad():
        first, state_1 = lm.step(torch.tensor([1]), state)
        kept, kept_1 = first.clone(), state_1.map(torch.clone)
        lm.step(torch.tensor([2]), state_1)
    assert torch.equal(first, kept)
    assert_near(state_1.tensors(), kept_1.tensors(), 0.0)


def test_two_runs_give_the_same_bits_on_any_number_of_threads():
    lm = model(d_model=256, d_state=16, expand=2)
    state, token, results = warm_state(lm, 1), torch.tensor([3]), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            fresh = copy.deepcopy(lm)
            with torch.no_grad():
                results.append(fresh.step(token, state))
    finally:
        torch.set_num_threads(threads)
    for logits, new in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert_near(new.tensors(), results[0][1].tensors(), 0.0)


def scale_in_place(lm):
    with torch.no_grad():
        lm.backbone.layers[1].mixer.in_proj.weight.mul_(2)
        lm.backbone.layers[0].norm.weight.mul_(3)


def replace_a_parameter(lm):
    lm.backbone.layers[0].mixer.D = nn.Parameter(torch.randn(72))


def replace_data(lm):
    lm.backbone.layers[2].mixer.A_log.data = torch.randn(72, 17)


def load_other_weights(lm):
    lm.load_state_dict(model(seed=1).state_dict())


def load_by_assignment(lm):
    lm.load_state_dict(model(seed=1).state_dict(), assign=True)
    lm.tie()


def replace_a_norm(lm):
    lm.norm_f.eps = 3.0


def replace_a_layer(lm):
    lm.backbone.layers[1] = copy.deepcopy(lm.backbone.layers[0])


@pytest.mark.parametrize(
    "change",
    [
        scale_in_place,
        replace_a_parameter,
        replace_data,
        load_other_weights,
        load_by_assignment,
        replace_a_norm,
        replace_a_layer,
    ],
)
def test_notices_a_change_after_the_first_step(change):
    lm = model()
    check(lm)
    token, state = torch.tensor([1, 2]), warm_state(lm, 2)
    with torch.no_grad():
        before, _ = lm.step(token, state)
        change(lm)
        assert not torch.allclose(lm.step(token, state)[0], before)
    check(lm)


def test_notices_half_precision_weights_that_change_in_place():
    lm = model().to(torch.bfloat16)
    check(lm, tolerance=0.03)
    scale_in_place(lm)
    check(lm, tolerance=0.03)


class Doubled(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def hook(lm):
    lm.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda _, __, y: y * 2)


def adapt(lm):
    lm.backbone.layers[1].mixer.out_proj = Doubled(lm.backbone.layers[1].mixer.out_proj)


def patch(lm):
    layer = lm.backbone.layers[2].mixer.in_proj
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


def parametrise(lm):
    norm = nn.utils.parametrizations.weight_norm
    norm(lm.backbone.layers[0].mixer.out_proj)


@pytest.mark.parametrize("change", [hook, adapt, patch, parametrise])
def test_calls_a_layer_that_is_not_plain(change):
    lm = model()
    check(lm)
    change(lm)
    check(lm, fused=False)


def test_a_hook_that_is_taken_away():
    lm = model()
    handle = lm.lm_head.register_forward_hook(lambda _, __, y: y * 2)
    check(lm, fused=False)
    handle.remove()
    check(lm)


def test_copies_and_pickles_carry_no_plan():
    lm = model()
    check(lm)
    size = len(pickle.dumps(lm))
    for twin in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert planned(twin) is None
        scale_in_place(twin)
        check(twin)
    assert size < 1.2 * sum(P.numel() * P.element_size() for P in lm.parameters()) + 50_000


def test_two_python_threads_on_one_model():
    lm = model(d_model=64, expand=2)
    state, tokens = warm_state(lm, 1), [torch.tensor([i]) for i in range(8)]
    with torch.no_grad():
        expected = [lm.step(token, state)[0] for token in tokens]
    wrong = []

    def work(i):
        with torch.no_grad():
            results = [lm.step(tokens[i], state)[0] for _ in range(50)]
        wrong.extend(i for logits in results if not torch.equal(logits, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Wrapped(torch.Tensor):
    """A tensor whose numbers are not where its address says, as other libraries quantise."""


def test_weights_that_have_no_address_are_left_to_torch():
    lm = model()
    layer = lm.backbone.layers[0].mixer.in_proj
    weight = layer.weight.detach().as_subclass(Wrapped)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert type(layer.weight) is Wrapped
    check(lm, fused=False)


def test_weights_on_another_device_raise():
    stack = Mamba(MambaConfig(d_model=8, n_layers=1)).to("meta")
    with torch.no_grad(), pytest.raises(ShapeError, match="weight is on meta, x on cpu"):
        stack.step(torch.randn(1, 8), stack.init_state(1))


def test_who_refuses_and_why():
    x = torch.zeros(1, 4)

    def reasons(x, dtype=torch.float32, **options):
        return [v.reason for v in ops.explain("model_step", x, dtype, **options)]

    with torch.no_grad():
        assert reasons(x) == [None, "it needs a CUDA device, x is on cpu", None]
        assert "at most 8 rows" in str(reasons(torch.zeros(9, 4))[0])
        assert "float64" in str(reasons(x.double())[0])
        assert "backend is chunked" in str(reasons(x, backend="chunked")[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in str(reasons(x)[0])
    assert "no gradient" in str(reasons(x)[0])


def test_a_named_backend_is_not_bypassed():
    lm = model(backend="reference")
    check(lm, fused=False)
    assert planned(lm) is None


def test_more_rows_than_it_is_for():
    lm = model()
    state = warm_state(lm, 9)
    with torch.no_grad():
        logits, _ = lm.step(torch.arange(9), state)
    assert planned(lm) is None
    assert_near(logits, plain_step(lm, torch.arange(9), state)[0], 1e-5)


@pytest.mark.parametrize("kind", ["plain", "learned"])
def test_an_inner_norm_that_is_another_layer_is_called(kind):
    lm = model(inner_norm=kind)
    mixer = lm.backbone.layers[1].mixer
    mixer.b_layernorm = nn.Sequential(mixer.b_layernorm)
    check(lm, fused=False)
