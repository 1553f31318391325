"""LoRA through PEFT: an adapter is part of every path through a model, trains there, and merges.

An oracle checks all paths: the plain model in float64, by definition (backend "reference"), with
s B A added to its weights by hand.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mambapy.errors import CheckpointError, ConfigError
from mambapy.generation import generate_tokens
from mambapy.layers import DtProjection
from mambapy.lm import LM, HybridConfig, Mamba2Config, Mamba3Config, MambaConfig
from tests.helpers import assert_near
from tests.test_fused import planned as fused_plan

peft = pytest.importorskip("peft")

VOCAB, RANK, ALPHA = 21, 2, 3
SCALE = ALPHA / RANK
BASE = {"d_model": 16, "n_layers": 2, "mlp_multiple_of": 4}
MAMBA = BASE | {"d_state": 3, "dt_rank": 3}
HEADS = BASE | {"d_state": 4, "d_head": 8}
CONFIGS = {
    "mamba": MambaConfig(**MAMBA, bias=True),
    "mamba mlp": MambaConfig(**MAMBA, d_intermediate=12),
    "mamba2": Mamba2Config(**HEADS),
    "mamba2 mlp": Mamba2Config(**HEADS, n_groups=2, d_ssm=16, d_intermediate=12),
    "mamba3 mlp": Mamba3Config(**HEADS, d_intermediate=12),
    "mamba3 mimo": Mamba3Config(**HEADS, mimo_rank=2, outproj_norm=True),
    "hybrid": HybridConfig(
        d_model=16,
        layers=("attention+mlp", "mamba2+mlp"),
        d_intermediate=12,
        mlp_multiple_of=4,
        attention={"n_heads": 2, "rotary_dim": 4, "d_conv": 3},
        mamba2={"d_head": 8, "d_state": 4},
    ),
}
# Where a step without gradients is one launch, which reads weights instead of calling layers.
FUSED = ("mamba", "mamba2")
each = pytest.mark.parametrize("name", [*CONFIGS])
each_mode = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


def make(name: str, seed: int = 0, **changes) -> LM:
    """A model whose parameters are all away from their special initial values."""
    torch.manual_seed(seed)
    lm = LM(dataclasses.replace(CONFIGS[name], **changes), VOCAB).eval()
    with torch.no_grad():
        for P in lm.parameters():
            P.add_(0.2 * torch.randn_like(P))
    return lm


def targets_of(lm: LM) -> list[str]:
    """The layers that get an adapter."""
    names = ["in_proj", "out_proj"]
    names += ["x_proj", "dt_proj"] if isinstance(lm.config, MambaConfig) else []
    return names + (["fc1", "fc2"] if lm.config.d_mlp else [])


def lora_config(targets: list[str], **options):
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters: A and B of every layer."""
    return {name: P for name, P in model.named_parameters() if ".lora_" in name}


def draw_adapter(model: nn.Module) -> None:
    """Random A and B: as PEFT makes it, B is zero, and nothing would show."""
    with torch.no_grad():
        for P in adapter_of(model).values():
            nn.init.normal_(P, std=0.2)


def adapt(lm: LM, targets: list[str] | None = None, **options):
    """PEFT's model around `lm`, which is changed in place."""
    targets = targets_of(lm) if targets is None else targets
    model = peft.get_peft_model(lm, lora_config(targets, **options)).eval()
    assert len(adapter_of(model)) == 2 * lm.config.n_layers * len(targets)
    draw_adapter(model)
    return model


def by_hand(name: str, adapted: nn.Module) -> LM:
    """The oracle: in float64, each step by definition, W + s B A where there is an adapter."""
    oracle = make(name, backend="reference").double()
    with torch.no_grad():
        for path, layer in layers_with_adapter(adapted):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            oracle.get_submodule(path).weight += SCALE * B.double() @ A.double()
    return oracle


def layers_with_adapter(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """PEFT's layers and their paths inside the LM."""
    found = [(path, M) for path, M in model.named_modules() if hasattr(M, "base_layer")]
    return [(path.removeprefix("base_model.model."), M) for path, M in found]


def some_tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def in_two_chunks(model, tokens: Tensor) -> Tensor:
    first, state = model.prefill(tokens[:, :3])
    second, _ = model.prefill(tokens[:, 3:], state)
    return torch.cat((first, second), dim=1)


def in_steps(model, tokens: Tensor) -> Tensor:
    state, logits = model.init_state(tokens.shape[0]), []
    for token in tokens.unbind(dim=1):
        found, state = model.step(token, state)
        logits.append(found)
    return torch.stack(logits, dim=1)


PATHS = {
    "forward": lambda model, tokens: model(tokens),
    "prefill": in_two_chunks,
    "step": in_steps,
}


def outputs(model) -> dict[str, Tensor]:
    """The logits of the same tokens, on each path."""
    return {path: run(model, some_tokens()).detach() for path, run in PATHS.items()}


def all_paths(logits: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(PATHS, logits.detach())


def assert_far(actual: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Nobody could take the one for the other at a tolerance of 1e-5."""
    for path, logits in base.items():
        change = float((actual[path] - logits).abs().max())
        assert change > 1e-3 * float(logits.abs().max()), f"{path}: {change:.3g}"


def last_step_was_fused(lm: LM) -> bool:
    return bool(fused_plan(lm))


@each
@pytest.mark.parametrize("path", [*PATHS])
def test_every_adapter_gets_its_gradient(name, path):  # traps 36, 63
    model = adapt(make(name))
    tokens = some_tokens()
    weights = torch.randn(*tokens.shape, VOCAB)
    logits = PATHS[path](model, tokens)
    (logits * weights).sum().backward()
    oracle = by_hand(name, model)
    (oracle(tokens) * weights).sum().backward()
    assert_near(logits, oracle(tokens), 1e-5)
    found, expected = {}, {}
    for layer_path, layer in layers_with_adapter(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        G = oracle.get_submodule(layer_path).weight.grad  # of W = W_0 + s B A
        expected[f"{layer_path} A"] = SCALE * B.detach().double().T @ G
        expected[f"{layer_path} B"] = SCALE * G @ A.detach().double().T
        found |= {f"{layer_path} A": A.grad, f"{layer_path} B": B.grad}
    assert len(found) == len(adapter_of(model))
    for which, grad in found.items():
        assert torch.isfinite(grad).all(), which
        assert float(grad.abs().max()) > 1e-4, which
    assert_near(found, expected, 1e-4)
    frozen = set(dict(model.named_parameters())) - set(adapter_of(model))
    assert all(model.get_parameter(which).grad is None for which in frozen)


@each
@each_mode
def test_merged_is_unmerged_on_every_path(name, grad):  # trap 63
    with torch.set_grad_enabled(grad):
        lm = make(name)
        base = outputs(lm)
        # So that there is a fast path which could go around the adapter, already planned.
        assert last_step_was_fused(lm) == (name in FUSED and not grad)
        model = adapt(lm)
        unmerged = outputs(model)
        assert not last_step_was_fused(lm)
        assert_far(unmerged, base)
        # forward == prefill == step == the oracle.
        assert_near(unmerged, all_paths(unmerged["forward"]), 1e-5)
        assert_near(unmerged, all_paths(by_hand(name, model)(some_tokens())), 1e-5)
        with model.disable_adapter():
            assert_near(outputs(model), base, 1e-5)
        model.merge_adapter()
        assert_near(outputs(model), unmerged, 1e-5)
        model.unmerge_adapter()
        assert_near(outputs(model), unmerged, 1e-5)


@each
@pytest.mark.parametrize(("grad", "safe"), [(True, False), (False, True)])
def test_plain_again_after_merge_and_unload(name, grad, safe):  # trap 63
    with torch.set_grad_enabled(grad):
        lm = make(name)
        model = adapt(lm)
        unmerged = outputs(model)
        plain = model.merge_and_unload(safe_merge=safe)
        assert plain is lm
        assert [*plain.state_dict()] == [*make(name).state_dict()]
        assert_near(outputs(plain), unmerged, 1e-5)
        assert last_step_was_fused(plain) == (name in FUSED and not grad)


@each
@torch.no_grad()
def test_base_again_after_unload(name):  # trap 63
    lm = make(name)
    base = outputs(lm)
    model = adapt(lm)
    outputs(model)
    plain = model.unload()
    assert plain is lm
    weights = make(name).state_dict()
    assert [*plain.state_dict()] == [*weights]
    assert all(torch.equal(T, weights[which]) for which, T in plain.state_dict().items())
    assert_near(outputs(plain), base, 1e-6)
    assert last_step_was_fused(plain) == (name in FUSED)


@each
@torch.no_grad()
def test_one_layer_at_a_time(name):  # trap 63
    # The layers beside the adapter are plain: without gradients, what they return is written over.
    lm = make(name)
    base = outputs(lm)
    for target in targets_of(lm):
        model = adapt(lm, [target])
        unmerged = outputs(model)
        assert_far(unmerged, base)
        assert_near(unmerged, all_paths(by_hand(name, model)(some_tokens())), 1e-5)
        lm = model.unload()


@each
def test_greedy_decoding(name):  # trap 63
    prompt, options = some_tokens(rows=3, length=5), {"sample": False, "num_tokens": 8}
    lm = make(name)
    base = generate_tokens(lm, prompt, **options)
    model = adapt(lm)
    unmerged = generate_tokens(model, prompt, **options)
    assert not torch.equal(unmerged, base)
    # The choices are clear ones, so that rounding cannot change them.
    with torch.no_grad():
        logits = by_hand(name, model)(torch.cat((prompt, unmerged), dim=1))[:, 4:-1]
    best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    assert float((best - second).min()) > 1e-4 * float(logits.abs().max())
    assert torch.equal(logits.argmax(dim=-1), unmerged)
    model.merge_adapter()
    assert torch.equal(generate_tokens(model, prompt, **options), unmerged)
    plain = model.unload()
    assert torch.equal(generate_tokens(plain, prompt, **options), unmerged)


@each
def test_injected_into_the_model_itself(name):  # trap 63
    lm = make(name)
    with torch.no_grad():
        base = outputs(lm)  # whatever can be planned is, before the adapter comes
        peft.inject_adapter_in_model(lora_config(targets_of(lm)), lm).eval()
        draw_adapter(lm)
        found = outputs(lm)
    assert_far(found, base)
    assert_near(found, all_paths(by_hand(name, lm)(some_tokens())), 1e-5)
    assert_near(outputs(lm), found, 1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba mlp"])
@each_mode
def test_dt_projection(name, grad):  # trap 63
    # Its bias, float32 in a model of any dtype, is added by the layer when PEFT calls it, and by
    # the scan when nothing is around it: once in either case.
    lm = make(name)
    for layer in lm.backbone.layers:
        nn.init.normal_(layer.mixer.dt_proj.bias)
    bias = lm.backbone.layers[0].mixer.dt_proj.bias.detach().clone()
    with torch.set_grad_enabled(grad):
        base = outputs(lm)
        model = adapt(lm, ["dt_proj"])
        wrapped = lm.backbone.layers[0].mixer.dt_proj
        assert type(wrapped.base_layer) is DtProjection
        delta = SCALE * wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
        expected = wrapped.base_layer.weight + delta
        unmerged = outputs(model)
        assert_far(unmerged, base)
        dt_proj = model.merge_and_unload().backbone.layers[0].mixer.dt_proj
        assert type(dt_proj) is DtProjection
        assert torch.equal(dt_proj.bias, bias)
        assert_near(dt_proj.weight, expected, 1e-6)
        assert_near(outputs(lm), unmerged, 1e-5)


def test_dt_projection_in_bfloat16():  # traps 44, 63
    exact = outputs(adapt(make("mamba"), ["dt_proj"]))["forward"]
    lm = make("mamba")
    model = adapt(lm, ["dt_proj"]).bfloat16()
    assert lm.backbone.layers[0].mixer.dt_proj.base_layer.bias.dtype == torch.float32
    with torch.no_grad():
        unmerged = outputs(model)
        assert_near(unmerged, all_paths(exact), 2**-5)
        plain = model.merge_and_unload()
        assert plain.backbone.layers[0].mixer.dt_proj.bias.dtype == torch.float32
        assert_near(outputs(plain), all_paths(exact), 2**-5)


def test_gradient_checkpointing():  # trap 63
    def grads(checkpointing: bool) -> dict[str, Tensor]:
        lm = make("mamba mlp")
        model = adapt(lm)
        lm.gradient_checkpointing = checkpointing
        model(some_tokens()).square().mean().backward()
        return {which: P.grad for which, P in adapter_of(model).items()}

    assert_near(grads(True), grads(False), 1e-6)


@each
def test_merged_model_is_saved_and_loaded(name, tmp_path):
    model = adapt(make(name))
    unmerged = outputs(model)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    loaded = LM.from_pretrained(tmp_path)
    weights = plain.state_dict()
    assert all(torch.equal(T, weights[which]) for which, T in loaded.state_dict().items())
    with torch.no_grad():
        found = outputs(loaded)
        assert_near(found, outputs(plain), 1e-6)
        assert_near(found, unmerged, 1e-5)


@each
def test_adapter_is_saved_and_loaded(name, tmp_path):
    model = adapt(make(name))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(name), tmp_path)
    with torch.no_grad():
        assert_near(outputs(loaded), outputs(model), 1e-6)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "hybrid"])
def test_the_convolution_takes_no_adapter(name):  # trap 63
    """It would change nothing until it is merged; so it is refused."""
    lm = make(name)
    channels = [m.in_channels for m in lm.modules() if isinstance(m, nn.Conv1d)]
    config = peft.LoraConfig(r=channels[0], target_modules=["layers.0.mixer.conv1d"])
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = peft.get_peft_model(lm, config)
    with pytest.raises(ConfigError, match="Leave conv1d out, and adapt in_proj"):
        model(some_tokens())


def test_a_tied_head_with_an_adapter_can_be_moved():
    lm = make("mamba")
    model = peft.get_peft_model(lm, lora_config("all-linear")).to("cpu").to(torch.float64)
    assert lm.lm_head.weight is lm.embedding.weight
    assert model(some_tokens()).dtype == torch.float64
    kept = lora_config(["in_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make("mamba"), kept).to("cpu").to(torch.float64)
    assert model(some_tokens()).dtype == torch.float64


def test_what_is_saved_and_quantised_has_no_adapter(tmp_path):
    lm = make("mamba")
    model = adapt(lm)
    with pytest.raises(CheckpointError, match="merge or unload adapters first"):
        lm.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="merge or unload adapters first"):
        lm.quantize("int8")
    model.merge_and_unload().save_pretrained(tmp_path)
    assert LM.from_pretrained(tmp_path).config == lm.config
