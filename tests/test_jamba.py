"""Jamba: its configuration by any name, experts, routers, transformers' numbers, older layouts."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambapy import jamba_lm
from mambapy import lm as lm_module
from mambapy.config import JambaConfig
from mambapy.errors import CheckpointError, ConfigError, ShapeError
from mambapy.experts import Experts, load_balancing_loss, router_z_loss
from mambapy.jamba import Jamba
from mambapy.jamba_lm import JambaLM, from_pretrained
from mambapy.optim import make_optimizer, role
from tests.families import FAMILIES, VOCAB, InFloat64, perturb
from tests.helpers import assert_near

TINY = {
    "d_model": 16, "n_layers": 4, "d_intermediate": 12, "n_heads": 4, "n_kv_heads": 2, "d_state": 4,
    "n_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2,
}  # fmt: skip


def model(**changes) -> JambaLM:
    torch.manual_seed(0)
    lm = JambaLM(JambaConfig(**TINY | changes), VOCAB).double().eval()
    perturb(lm)
    return lm


def test_one_meaning_by_three_names():
    theirs = JambaConfig(
        hidden_size=64, num_hidden_layers=4, intermediate_size=100, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, mamba_d_state=8,
        mamba_d_conv=3, mamba_expand=4, mamba_dt_rank=5, mamba_conv_bias=False,
        mamba_proj_bias=True, initializer_range=0.1, tie_word_embeddings=True, vocab_size=9,
        pad_token_id=0, attention_dropout=0.0,
    )  # fmt: skip
    original = JambaConfig(
        d_model=64, n_layers=4, mlp_size=100, num_attention_heads=4, num_key_value_heads=2,
        num_experts=6, num_experts_per_tok=3, d_state=8, d_conv=3, expand_factor=4, dt_rank=5,
        conv_bias=False, bias=True, initializer_range=0.1, tie_lm_weights=True, vocab_size=9,
        inner_layernorms=True, pad_token_id=5,
    )  # fmt: skip
    ours = JambaConfig(
        d_model=64, n_layers=4, d_intermediate=100, n_heads=4, n_kv_heads=2, n_experts=6, top_k=3,
        d_state=8, d_conv=3, expand=4, dt_rank=5, conv_bias=False, bias=True, base_std=0.1,
        tie_embeddings=True, vocab_size=9, inner_norm="learned",
    )  # fmt: skip
    assert theirs == original == ours
    assert JambaConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    assert JambaConfig(**TINY, inner_layernorms=False).inner_norm == "none"
    lm = JambaLM(ours)
    assert lm.lm_head.weight is lm.embedding.weight
    assert lm.vocab_size == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "attention: n_kv_heads=2 must divide n_heads=3"),
        ({"n_heads": 3, "n_kv_heads": 3}, "attention: n_heads=3 must divide d_model=16"),
        ({"top_k": 5}, "top_k=5 must not exceed n_experts=4"),
        ({"top_k": 0}, "top_k=0 must be >= 1"),
        ({"n_experts": 0}, "n_experts=0 must be >= 1"),
        ({"attn_layer_offset": 4}, "attn_layer_offset=4 must be between 0 and 3"),
        ({"expert_layer_period": 0}, "expert_layer_period=0 must be >= 1"),
        ({"attn_layers": [1, 1]}, r"attn_layers=\[1, 1\] names a block twice"),
        ({"expert_layers": [4]}, r"expert_layers=\[4\]: 4 must be from 0 to 3"),
        ({"expert_layers": 3}, "expert_layers=3 must be a list"),
        ({"mixer": "attention"}, "mixer='attention' must be one of mamba, mamba2, mamba3"),
        ({"d_intermediate": 0}, "d_intermediate=0 must be >= 1"),
        ({"num_experts": 3}, "num_experts=3, but n_experts is 4 by another name"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
        ({"mixer": "mamba2"}, "mamba2: d_head=64 must divide|d_head=64 must divide"),
    ],
)
def test_a_jamba_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        JambaConfig(**TINY | changes)


def test_unknown_names_and_missing_sizes():
    with pytest.raises(TypeError, match="n_expert"):
        JambaConfig(**TINY, n_expert=3)
    with pytest.raises(ConfigError, match="vocab_size must be given"):
        JambaLM(JambaConfig(**TINY))
    with pytest.raises(ConfigError, match="config must be a JambaConfig, got MambaConfig"):
        JambaLM(lm_module.MambaConfig(d_model=8, n_layers=1), 9)


def test_where_attention_and_experts_are():
    config = JambaConfig(**TINY | {"n_layers": 9})
    assert [i for i, kind in enumerate(config.mixers) if kind == "attention"] == [2, 6]
    assert [i for i, kind in enumerate(config.feed_forwards) if kind == "moe"] == [1, 3, 5, 7]
    listed = JambaConfig(**TINY, attn_layers=[0, 3], expert_layers=[2])
    assert listed.mixers == ("attention", "mamba", "mamba", "attention")
    assert listed.feed_forwards == ("mlp", "mlp", "moe", "mlp")
    assert JambaConfig(**TINY | {"n_experts": 1, "top_k": 1}).feed_forwards == ("mlp",) * 4


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_another_mixer_is_one_field(mixer, tmp_path):
    lm = model(mixer=mixer, d_head=8)
    kinds = {type(layer.mixer).__name__ for layer in lm.backbone.layers}
    assert kinds == {"Attention", {"mamba": "MambaBlock"}.get(mixer, f"M{mixer[1:]}Block")}
    tokens = torch.randint(VOCAB, (2, 9))
    y, state = lm.prefill(tokens[:, :5])
    y2, state = lm.prefill(tokens[:, 5:8], state)
    y3, _ = lm.step(tokens[:, 8], state)
    assert_near(torch.cat((y, y2, y3[:, None]), 1), lm(tokens), 1e-11)
    lm.save_pretrained(tmp_path)
    assert_near(from_pretrained(tmp_path)(tokens), lm(tokens), 1e-12)
    if mixer != "mamba":
        with pytest.raises(CheckpointError, match=f"cannot express mixer='{mixer}'"):
            lm.save_pretrained(tmp_path / "hf", format="hf")


def naive_experts(layer, x):
    """Every expert on every token, and what was not chosen times zero."""
    logits = x @ layer.router.weight.T
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p)
    chosen.scatter_(-1, p.topk(layer.top_k, -1).indices, 1.0)
    y = torch.zeros_like(x)
    for e in range(p.shape[-1]):
        gate, up = (x @ layer.fc1[e].T).chunk(2, -1)
        y = y + (p * chosen)[..., e, None] * ((F.silu(gate) * up) @ layer.fc2[e].T)
    return y, logits


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 17), (1, 1), (4,), (2, 3, 5)])
def test_experts_and_all_their_gradients(
    shape, top_k
):  # trap 62: one softmax, not made to sum to 1
    layer = Experts(6, 7, 5, top_k).double()
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    y, logits = layer.routed(x)
    expected, theirs = naive_experts(layer, x)
    assert_near(y, expected, 1e-12)
    assert_near(logits, theirs, 1e-12)
    w = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad((y * w).sum() + logits.sum(), leaves)
    wanted = torch.autograd.grad((expected * w).sum() + theirs.sum(), leaves)
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want, 1e-11)
    assert torch.equal(layer(x), y)


def test_no_compute_for_experts_without_tokens(monkeypatch):
    """Decoding looks at the chosen experts' weights alone: the others may hold anything."""
    layer = Experts(6, 7, 8, 2)
    x = torch.randn(1, 6)
    chosen = layer.routed(x)[1].topk(2).indices[0].tolist()
    expected = layer(x)
    others = [e for e in range(8) if e not in chosen]
    with torch.no_grad():
        layer.fc1[others], layer.fc2[others] = float("nan"), float("nan")
    products = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, W, b=None: products.append(W.shape) or linear(x, W))
    assert torch.equal(layer(x), expected)
    # The router's, and two for each of the two experts.
    assert [tuple(shape) for shape in products] == [(8, 6), *[(14, 6), (6, 7)] * 2]
    y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.fc2.grad[others], torch.zeros(6, 6, 7))


def test_half_precision_routes_in_float32():
    layer = Experts(6, 7, 4, 2).to(torch.bfloat16)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    y, logits = layer.routed(x)
    assert y.dtype == logits.dtype == torch.bfloat16
    exact = Experts(6, 7, 4, 2)
    exact.load_state_dict(layer.state_dict())
    assert_near(y.float(), exact(x.float()), 2**-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(exact(x.float()).float(), exact(x.float()).float(), 0)
        assert exact.routed(x.float())[0].dtype == torch.bfloat16


def test_load_balancing_by_hand():  # trap 62: on raw logits
    logits = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    found = load_balancing_loss(logits, 2, mask)
    f, P = torch.zeros(2, 4).double(), torch.zeros(2, 4).double()
    for i, layer in enumerate(logits):
        for token in layer[mask]:
            P[i] += token.softmax(0) / 4
            for e in token.topk(2).indices:
                f[i, e] += 1 / 4
    assert_near(found.load, f, 1e-12)
    assert_near(found.layers, 4 * (f * P).sum(1), 1e-12)
    assert_near(found.total, 4 * (f.mean(0) * P.mean(0)).sum(), 1e-12)
    # Even loads have the least: k.
    even = torch.eye(4, dtype=torch.float64).repeat(2, 1) * 100
    assert load_balancing_loss([even], 1).total == pytest.approx(1)
    z = torch.stack([layer[mask].logsumexp(-1).square() for layer in logits]).mean()
    assert_near(router_z_loss(logits, mask), z, 1e-12)
    plain = torch.stack([layer.logsumexp(-1).square() for layer in logits]).mean()
    assert_near(router_z_loss(logits), plain, 1e-12)
    # Padding may hold anything.
    spoilt = [torch.where(mask[:, :, None], layer, 1e4) for layer in logits]
    assert_near(load_balancing_loss(spoilt, 2, mask).total, found.total, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_transformers_logits_routers_loss_and_gradients(tmp_path, masked):
    transformers = pytest.importorskip("transformers")
    FAMILIES["hf jamba"].write(tmp_path)
    ours = from_pretrained(tmp_path, dtype=torch.float64)
    tokens = torch.randint(VOCAB, (2, 13))
    mask = torch.ones(2, 13, dtype=torch.bool)
    if masked:
        mask[1, 8:] = False
    with InFloat64():
        theirs = transformers.JambaForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float64, experts_implementation="eager"
        )
        out = theirs(tokens, attention_mask=mask.long(), output_router_logits=True, use_cache=False)
        (out.logits[mask].square().mean() + out.aux_loss).backward()
    logits, routing = ours.routed(tokens, mask)
    balance = load_balancing_loss(routing, 2, mask)
    assert_near(logits[mask], out.logits[mask], 1e-10)
    for found, expected in zip(routing, out.router_logits, strict=True):
        assert_near(found[mask], expected.view(2, 13, -1)[mask], 1e-10)
    assert_near(balance.total, out.aux_loss, 1e-10)
    (logits[mask].square().mean() + balance.total).backward()
    theirs_grad = {name: P.grad for name, P in theirs.named_parameters()}
    for i in range(5):
        layer = ours.backbone.layers[i]
        names = [("mlp.fc2", "experts.down_proj"), ("mlp.fc1", "experts.gate_up_proj")]
        names += [("mlp.router.weight", "router.weight")]
        if ours.config.feed_forwards[i] == "moe":
            for mine, other in names:
                got = layer.get_parameter(mine).grad
                assert_near(got, theirs_grad[f"model.layers.{i}.feed_forward.{other}"], 1e-9)
        if ours.config.mixers[i] == "mamba":
            for name, P in layer.mixer.named_parameters():
                assert_near(P.grad, theirs_grad[f"model.layers.{i}.mamba.{name}"], 1e-9)
    # trap 58: token 0 pads in their configuration, and has no gradient there.
    other = theirs_grad["model.embed_tokens.weight"][1:]
    assert_near(ours.embedding.weight.grad[1:], other, 1e-9)


@pytest.mark.parametrize("layout", ["packed", "moe", "moe dense as its only expert"])
def test_other_layouts_of_the_same_weights(tmp_path, layout):
    FAMILIES["hf jamba"].write(tmp_path)
    tokens = torch.randint(VOCAB, (2, 9))
    expected = from_pretrained(tmp_path)(tokens)
    weights = load_file(tmp_path / "model.safetensors")
    if layout == "packed":
        for i in (1, 3):
            at = f"model.layers.{i}.feed_forward.experts"
            parts = [
                [weights.pop(f"{at}.{e}.{n}_proj.weight") for n in ("gate", "up", "down")]
                for e in range(4)
            ]
            weights[f"{at}.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
            weights[f"{at}.down_proj"] = torch.stack([part[2] for part in parts])
    else:
        renamed = {}
        for name, T in weights.items():
            name = name.replace("feed_forward", "moe").replace(
                "pre_ff_layernorm", "pre_moe_layernorm"
            )
            if layout != "moe" and ".moe." in name and ".experts." not in name:
                name = name.replace(".moe.", ".moe.experts.0.")
                name = name.replace("experts.0.router", "router")
            renamed[name] = T
        weights = renamed
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_near(from_pretrained(tmp_path)(tokens), expected, 1e-5)


def test_a_missing_expert_is_named(tmp_path):
    FAMILIES["hf jamba"].write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.feed_forward.experts.2.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"model.layers.3.feed_forward.experts.2.up_proj.weight \(20, 16\) is missing"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_a_checkpoint_of_something_else(tmp_path):
    lm_module.LM(lm_module.MambaConfig(d_model=8, n_layers=1), 9).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this is a 'mamba', not a Jamba"):
        from_pretrained(tmp_path)


def test_the_last_logits_alone():
    lm = model()
    tokens = torch.randint(VOCAB, (2, 8))
    mask = torch.tensor([[1] * 8, [0, 1, 1, 0, 1, 0, 0, 0]]).bool()
    logits = lm(tokens, mask)
    last = lm(tokens, mask, num_logits_to_keep=2)
    assert_near(last[0], logits[0, 6:], 1e-12)
    assert_near(last[1], logits[1, [2, 4]], 1e-12)
    assert_near(lm.prefill(tokens, mask=mask, logits_to_keep=2)[0], last, 1e-12)
    with pytest.raises(ShapeError, match="logits_to_keep=9 must be from 0 to l = 8"):
        lm(tokens, num_logits_to_keep=9)


def test_checkpointing_gives_the_same_gradients():
    lm = model()
    tokens = torch.randint(VOCAB, (2, 8))

    def grads():
        lm.zero_grad()
        logits, routing = lm.routed(tokens)
        (logits.square().mean() + load_balancing_loss(routing, 2).total).backward()
        return {name: P.grad.clone() for name, P in lm.named_parameters()}

    expected = grads()
    lm.gradient_checkpointing = True
    assert_near(grads(), expected, 1e-12)


def test_every_parameter_has_a_role():
    lm = model()
    roles = {name.split(".")[-1]: role(name) for name, _ in lm.named_parameters() if "mlp" in name}
    assert roles["fc1"] == roles["fc2"] == "experts"
    assert role("backbone.layers.1.mlp.router.weight") == "matrix"
    groups = make_optimizer(lm, lr=1e-3, weight_decay=0.1).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(lm.parameters()))


def test_second_derivatives_and_stack_alone():
    stack = Jamba(JambaConfig(**TINY)).double()
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: stack(x), (x,))


def test_generate_several_prompts_as_each_alone():
    from mambapy import ByteTokenizer

    torch.manual_seed(0)
    lm = JambaLM(JambaConfig(**TINY), 257).eval()
    prompts = ["a", "something longer", "def min(arr):"]
    together = lm.generate(ByteTokenizer(), prompts, num_tokens=8, sample=False)
    alone = [lm.generate(ByteTokenizer(), p, num_tokens=8, sample=False) for p in prompts]
    assert together == alone
    assert jamba_lm.JambaConfig is JambaConfig


def test_routed_loss_is_the_loss_of_the_routed_logits():
    lm = model()
    tokens, targets = torch.randint(VOCAB, (2, 8)), torch.randint(VOCAB, (2, 8))
    logits, routing = lm.routed(tokens)
    loss, found = lm.routed_loss(tokens, targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_near(loss, expected, 1e-12)
    assert_near(lm.loss(tokens, targets), expected, 1e-12)
    for got, want in zip(found, routing, strict=True):
        assert_near(got, want, 1e-12)
