"""Every format of checkpoints: loaded, judged, spoken with, saved, and brought back bit for bit.

The names of these tests and of their cases are the columns and rows of the table in
docs/formats.md: `pytest tests/test_formats.py --write-formats` writes it from what passed.
"""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambapy.checkpoints import Architecture, open_checkpoint, save
from mambapy.config import HybridConfig, JambaConfig, Mamba2Config, Mamba3Config, MambaConfig
from mambapy.convert import convert
from mambapy.errors import CheckpointError
from mambapy.generation import generate_tokens, pad_right
from mambapy.lm import LM, from_pretrained
from tests.families import FAMILIES, VOCAB, Papers
from tests.helpers import assert_near
from tests.table import CANNOT, TABLE, rows_of

pytest.importorskip("transformers")

each = pytest.mark.parametrize("family", [*FAMILIES])
TARGETS = ("mambapy", "official", "hf")
CAN = [(f, target) for f in FAMILIES for target in TARGETS if (f, target) not in CANNOT]


@pytest.fixture
def written(family, tmp_path):
    FAMILIES[family].write(tmp_path / "theirs")
    return tmp_path / "theirs"


@each
def test_load(family, written):  # traps 53, 59: nothing is drawn anew, tied weights are one
    raw = FAMILIES[family].raw(written)
    state = torch.get_rng_state()
    model = from_pretrained(written)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert (model.lm_head.weight is model.embedding.weight) is model.tie_embeddings
    found = model.state_dict()
    tied = {"lm_head.weight"} if model.tie_embeddings else set()
    assert set(found) - tied == set(raw) - tied
    for name, T in raw.items():
        # A_log, D and their like are widened, which is exact.
        assert found[name].dtype in (T.dtype, torch.float32), name
        assert torch.equal(found[name], T.to(found[name].dtype)), name


@each
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)
def test_logits(family, written, dtype, tolerance):  # traps 41 to 45
    model = from_pretrained(written, dtype=dtype)
    for l in (1, 2, 15, 40):
        tokens = torch.randint(VOCAB, (2, l))
        with torch.no_grad():
            expected = FAMILIES[family].judge(written, tokens)
            assert expected.dtype == torch.float64
            # The vocabulary's padding is in the weights alone.
            assert model(tokens).shape == expected.shape == (2, l, VOCAB)
            assert_near(model(tokens), expected, tolerance)
            assert_near(model.train()(tokens), expected, tolerance)
            model.eval()


@each
def test_generate(family, written):  # traps 21, 23, 24, 57
    """Greedy, prompts of several lengths in one batch; each as the judge continues it alone."""
    model = from_pretrained(written, dtype=torch.float64)
    prompts = [torch.randint(VOCAB, (l,)) for l in (1, 3, 9)]
    ids, mask = pad_right([p.tolist() for p in prompts], torch.device("cpu"))
    found = generate_tokens(model, ids, mask=mask, num_tokens=5, sample=False)
    for row, prompt in enumerate(prompts):
        text = prompt[None]
        for _ in range(5):
            logits = FAMILIES[family].judge(written, text)
            text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
        assert found[row].tolist() == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "target"), CAN)
def test_save(family, target, written, tmp_path):
    """What is written has the same logits, in the judge of that format where there is one."""
    model = from_pretrained(written, dtype=torch.float64)
    model.save_pretrained(tmp_path / "ours", format=target)
    again = from_pretrained(tmp_path / "ours")
    assert again.vocab_size == VOCAB
    tokens = torch.randint(VOCAB, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
        # Mapped from a file, matrices are aligned otherwise: the last bit may differ.
        assert_near(again(tokens), expected, 1e-12)
        if target == "hf":
            kind = next(f for f in FAMILIES.values() if f.__class__.__name__ == "Theirs")
            config = json.loads((tmp_path / "ours" / "config.json").read_text())
            theirs = type(kind)(config["architectures"][0].removesuffix("ForCausalLM"), {})
            logits = theirs.judge(tmp_path / "ours", tokens)
            assert_near(logits[..., :VOCAB], expected, 1e-10)
        if target == "official":
            values = json.loads((tmp_path / "ours" / "config.json").read_text())
            if "learnable" not in values and not unusual(values):
                judge = Papers(values, {})
                assert_near(judge.judge(tmp_path / "ours", tokens), expected, 1e-10)


def unusual(values):
    """Whether a checkpoint has what naive.py, kept simple, does not do."""
    ssm = values["ssm_cfg"]
    return ssm.get("bias") or "dt_limit" in ssm or ssm.get("d_conv", 4) != 4


@pytest.mark.parametrize(("family", "target"), CAN)
def test_round_trip(family, target, written, tmp_path):
    """To another format and back: every tensor's dtype and bits, and the configuration."""
    source = open_checkpoint(written)
    back = source.format.name if source.format.name in TARGETS else "official"
    convert(written, tmp_path / "there", target)
    convert(tmp_path / "there", tmp_path / "back", back)
    again = open_checkpoint(tmp_path / "back")
    there = open_checkpoint(tmp_path / "there")
    assert essence(there) == essence(again) == essence(source)
    if back != "official" or source.format.name == "official":
        assert set(again.shapes) | {"lm_head.weight"} == set(source.shapes) | {"lm_head.weight"}
    for name in again.shapes:
        T, U = source.tensors[name](), again.tensors[name]()
        assert T.dtype == U.dtype, name
        assert torch.equal(T, U), name


def essence(checkpoint):
    """What decides the logits: not how parameters start, nor what is said or left to a default."""
    architecture = checkpoint.architecture
    config = architecture.config
    if isinstance(config, JambaConfig):
        return dataclasses.replace(config, base_std=1, rescale_out_proj=False, dt_rank=1)
    kinds = config.mixers if isinstance(config, HybridConfig) else [architecture.model_type]
    mixers = {k: config.mixer_config(k) if len(kinds) > 1 else config for k in set(kinds)}
    start = {"base_std", "rescale_out_proj", "d_intermediate", "mlp_multiple_of"}
    start |= {"dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "A_init_range"}
    values = {
        kind: {n: v for n, v in mixer.to_dict().items() if n not in start and n != "dt_rank"}
        | {"rank": getattr(mixer, "rank", None)}
        for kind, mixer in mixers.items()
    }
    if "attention" in mixers:
        # Whether said or derived.
        attention = mixers["attention"]
        sizes = {"n_kv_heads": attention.kv_heads, "d_head": attention.head_channels}
        values["attention"] |= sizes
    return (
        values, [*kinds], config.d_mlp, config.feed_forwards, architecture.vocab_size,
        architecture.rows, architecture.tie_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "target"), [*CANNOT])
def test_what_a_format_cannot_express_is_said(family, target, written, tmp_path):
    model = from_pretrained(written)
    with pytest.raises(CheckpointError, match=re.escape(CANNOT[family, target])):
        model.save_pretrained(tmp_path / "ours", format=target)
    with pytest.raises(CheckpointError, match=re.escape(CANNOT[family, target])):
        convert(written, tmp_path / "ours", target)
    assert not (tmp_path / "ours").exists()


def test_the_table_in_the_docs_is_of_these_tests():
    text = TABLE.read_text(encoding="utf-8")
    assert rows_of(text, strip=True) == [*FAMILIES]
    assert "failed" not in text
    for family, target in CANNOT:
        row = next(line for line in text.splitlines() if line.startswith(f"| {family} |"))
        assert target not in row


@pytest.mark.parametrize("config", ["plain", "odd"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba3", "hybrid"])
def test_every_architecture_as_official_and_back(kind, config, tmp_path):
    odd = config == "odd"
    configs = {
        "mamba": MambaConfig(d_model=16, n_layers=2, bias=odd, conv_bias=not odd, expand=3),
        "mamba2": Mamba2Config(
            d_model=16, n_layers=2, d_head=8, dt_limit=(0.01, 0.5) if odd else (0, float("inf")),
            d_ssm=16 if odd else None, D_has_hdim=odd, norm_before_gate=odd, rmsnorm=True,
        ),
        "mamba3": Mamba3Config(
            d_model=16, n_layers=2, d_head=8, d_state=8, mimo_rank=4 if odd else 1,
            outproj_norm=odd, d_intermediate=100 if odd else 0,
        ),
        "hybrid": HybridConfig(
            d_model=16, layers=("mamba2", "attention") if odd else ("attention+mlp",  "mamba+mlp"),
            d_intermediate=0 if odd else 128, attention={"n_heads": 2, "bias": odd},
            **({"mamba2": {"d_head": 8}} if odd else {"mamba": {"d_state": 4}}),
        ),
    }  # fmt: skip
    model = LM(configs[kind], VOCAB, tie_embeddings=odd).eval()
    model.save_pretrained(tmp_path, format="official")
    again = from_pretrained(tmp_path)
    tokens = torch.randint(VOCAB, (2, 9))
    assert_near(again(tokens), model(tokens), 1e-5)


def edit(folder, config=None, tensors=None):
    path = folder / "config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["hf mamba"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', where only 'silu' or 'swish' works here"),
        ({"n_experts": 4}, "not known here and may change the result: n_experts=4"),
        ({"model_type": "mamba9"}, "of no known format: it has neither"),
        ({"state_size": 6}, r"x_proj.weight is \(13, 32\) and should be \(15, 32\)"),
        ({"state_size": "many"}, "does not fit: d_state='many' must be an integer"),
        ({"num_hidden_layers": 3}, r"backbone.layers.2.mixer.A_log \(32, 5\) is missing"),
        ({"num_hidden_layers": 1}, r"backbone.layers.1.mixer.A_log \(32, 5\) is unexpected"),
        ({"hidden_size": None}, "does not fit"),
        ({"mambapy": 3}, "mambapy must be an object, got 3"),
        ({"mambapy": {"vocab": 3}}, "config.json, mambapy has keys that are not known here"),
    ],
)
def test_a_config_that_does_not_fit(family, config, message, written):  # traps 59, 60
    edit(written, config)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(written)


@pytest.mark.parametrize("family", ["official mamba2attn"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False, where only True works here"),
        ({"ssm_cfg": {"layer": "Mamba7"}}, r"layer='Mamba7' is not one of \['Mamba1', 'Mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba2", "twist": 1}}, "ssm_cfg has keys .* twist=1"),
        ({"attn_cfg": {"num_heads": 3, "causal": False}}, "causal=False, where only True"),
        ({"attn_cfg": {"num_heads": 3, "softmax_scale": 2}}, "softmax_scale=2"),
    ],
)
def test_an_official_config_that_does_not_fit(family, change, message, written):
    edit(written, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(written)


@pytest.mark.parametrize("family", ["hf mamba"])
def test_tensors_that_do_not_fit_are_named(family, written):
    good = (written / "model.safetensors").read_bytes()
    for change, message in {
        lambda w: w.update(more=torch.zeros(2)): r"more \(2,\) is unexpected",
        lambda w: w.pop("backbone.norm_f.weight"): r"backbone.norm_f.weight \(16,\) is missing",
        lambda w: w.update({"backbone.norm_f.weight": torch.zeros(9)}): (
            r"backbone.norm_f.weight is \(9,\) and should be \(16,\)"
        ),
        lambda w: w.update({"lm_head.weight": torch.zeros(VOCAB, 16)}): (
            "ties the head to the embedding, but lm_head.weight and backbone.embeddings.weight"
        ),
    }.items():
        edit(written, tensors=change)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(written)
        (written / "model.safetensors").write_bytes(good)
    # The same tensor again is no mistake, and the older spelling of the embedding is one of theirs.
    expected = from_pretrained(written)

    def older(w):
        w["backbone.embedding.weight"] = w.pop("backbone.embeddings.weight")
        w["lm_head.weight"] = w["backbone.embedding.weight"].clone()

    edit(written, tensors=older)
    found = from_pretrained(written)
    assert torch.equal(found.lm_head.weight, expected.embedding.weight)
    assert found.lm_head.weight is found.embedding.weight


def test_infinity_as_transformers_writes_it(tmp_path):
    FAMILIES["hf mamba2"].write(tmp_path)
    for limit in ([0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None):
        edit(tmp_path, {"time_step_limit": limit})
        assert from_pretrained(tmp_path).config.dt_limit == (0.0, float("inf"))


@pytest.mark.parametrize("target", TARGETS)
def test_shards(target, tmp_path):
    model = LM(MambaConfig(d_model=16, n_layers=2), VOCAB)
    weights = model.own_weights()
    save(tmp_path, model.architecture(), weights, target, shard_bytes=8000)
    names = {path.name for path in tmp_path.iterdir()}
    if target == "official":
        # The papers' code reads one file only.
        assert names == {"config.json", "pytorch_model.bin"}
    else:
        assert {"config.json", "model.safetensors.index.json"} < names
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(T.nbytes for T in weights.values())
        shards = sorted(set(index["weight_map"].values()))
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        sizes = [(tmp_path / shard).stat().st_size for shard in shards]
        assert max(sizes) < 8000 + 2000
    again = from_pretrained(tmp_path)
    for name, T in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], T)
    # Another save leaves no file of the one before.
    save(tmp_path, model.architecture(), weights, target)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, model.embedding.weight)


def test_sharded_bin_and_what_is_wrong_with_an_index(tmp_path):
    model = LM(MambaConfig(d_model=16, n_layers=2), VOCAB)
    model.save_pretrained(tmp_path, format="official")
    found = torch.load(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    table = {}
    for i, name in enumerate(found):
        table[name] = f"pytorch_model-0000{1 + i % 2}-of-00002.bin"
    for file in set(table.values()):
        torch.save({n: found[n].clone() for n in found if table[n] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, model.embedding.weight)
    index.write_text(
        json.dumps({"weight_map": table | {"lost": "pytorch_model-00001-of-00002.bin"}})
    )
    with pytest.raises(CheckpointError, match="lacks lost, which its index names"):
        from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": table | {"x": "pytorch_model-00009-of-00002.bin"}}))
    with pytest.raises(CheckpointError, match=r"names pytorch_model-00009-of-00002\.bin, which is"):
        from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        from_pretrained(tmp_path)


class Harmful:
    """What a pickle could do."""

    def __reduce__(self):
        return print, ("harm",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.save_pretrained(tmp_path, format="official")
    torch.save({"weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is damaged or no file of tensors"):
        from_pretrained(tmp_path)
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match=r"damaged|missing"):
        from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


def test_an_older_torch_file(tmp_path):
    """Before 1.6 torch wrote no zip; such a file cannot be mapped."""
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.save_pretrained(tmp_path, format="official")
    found = torch.load(tmp_path / "pytorch_model.bin")
    torch.save(found, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, model.embedding.weight)


def test_two_formats_do_not_share_a_folder(tmp_path):
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a checkpoint in the format 'mambapy'; save"):
        model.save_pretrained(tmp_path, format="hf")
    with pytest.raises(CheckpointError, match="format='gguf' must be one of mambapy, official, hf"):
        model.save_pretrained(tmp_path, format="gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_no_longer_the_model_is_not_saved(tmp_path):  # trap 63
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(CheckpointError, match="its head is tied to the embedding by its config"):
        model.save_pretrained(tmp_path)
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(CheckpointError, match=r"other layers .*lm_head.0.weight.*merge or unload"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        model.quantize("int8")
    assert not list(tmp_path.iterdir())


def test_quantized_weights_stay_here(tmp_path):
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB).quantize("int8")
    for target in ("official", "hf"):
        with pytest.raises(CheckpointError, match="cannot express weights in int8"):
            model.save_pretrained(tmp_path, format=target)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is in int8; dtype must be None for it"):
        from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(VOCAB, (1, 5))
    assert_near(from_pretrained(tmp_path)(tokens), model.eval()(tokens), 1e-5)


def test_loading_straight_to_a_dtype(tmp_path):  # trap 10
    FAMILIES["hf mamba"].write(tmp_path)
    model = from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.rpartition("mixer.")[2]: P.dtype for name, P in model.named_parameters()}
    assert dtypes["in_proj.weight"] == dtypes["x_proj.weight"] == torch.bfloat16
    assert dtypes["A_log"] == dtypes["D"] == dtypes["dt_proj.bias"] == torch.float32
    whole = from_pretrained(tmp_path).to(torch.bfloat16)
    for (name, P), Q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(P, Q), name
    with pytest.raises(TypeError):
        from_pretrained(tmp_path, torch_dtype=torch.bfloat16)


def test_training_a_mapped_model_leaves_its_file_alone(tmp_path):
    model = LM(MambaConfig(d_model=16, n_layers=1), VOCAB)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = from_pretrained(tmp_path)
    with torch.no_grad():
        for P in loaded.parameters():
            P.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    # And it can be saved where it came from.
    loaded.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path).norm_f.weight, 1 + model.norm_f.weight)


def test_the_tokenizer_comes_along(tmp_path):
    FAMILIES["hf mamba"].write(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "model.py").write_text("harm")
    files = convert(tmp_path / "theirs", tmp_path / "new", "hf")
    assert {path.name for path in files} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 0)


def test_architecture_knows_its_rows():
    config = MambaConfig(d_model=16, n_layers=1)
    assert Architecture(config, 50277, pad_vocab_size_multiple=16).rows == 50288
    assert Architecture(config, 50277).rows == 50280


def test_what_other_readers_of_these_files_look_at(tmp_path):
    """llama.cpp's converter has its own idea of the padding, unless it is told."""
    for model in (LM(MambaConfig(d_model=16, n_layers=1), 21), LM(BAMBA, 21)):
        model.save_pretrained(tmp_path / model.model_type, format="hf")
        config = json.loads((tmp_path / model.model_type / "config.json").read_text())
        assert config["pad_vocab_size_multiple"] == 8
        assert config["vocab_size"] == 24
    assert config["attn_rotary_emb"] == 4
    edit(tmp_path / "hybrid", {"attn_rotary_emb": 8})
    with pytest.raises(CheckpointError, match="attn_rotary_emb=8, where only 4 works here"):
        from_pretrained(tmp_path / "hybrid")


BAMBA = HybridConfig(
    d_model=16, layers=("mamba2+mlp", "attention+mlp"), d_intermediate=8,
    attention={"n_heads": 2, "rotary_dim": 4}, mamba2={"d_head": 8},
)  # fmt: skip
