"""One small checkpoint of every format, as their authors write them, and a judge of its logits.

A family writes a folder; `judge` gives the logits of tokens (b, l) in float64 from the same folder
without any code of ours: transformers' own model, or the formulas in naive.py.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests import naive

VOCAB = 21


class InFloat64(TorchDispatchMode):
    """Whatever runs below and asks for float32 gets float64: transformers casts by itself."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Theirs:
    """A model of transformers."""

    model: str
    options: dict[str, Any]

    def write(self, folder):
        import transformers

        config = getattr(transformers, f"{self.model}Config")(vocab_size=VOCAB, **self.options)
        model = getattr(transformers, f"{self.model}ForCausalLM")(config)
        perturb(model)
        model.save_pretrained(folder)

    def judge(self, folder, tokens):
        import transformers

        kind = getattr(transformers, f"{self.model}ForCausalLM")
        # Their faster product of experts has no float64.
        options = {"experts_implementation": "eager"} if self.model == "Jamba" else {}
        with InFloat64(), torch.no_grad():
            model = kind.from_pretrained(folder, dtype=torch.float64, **options).eval()
            return model(tokens, use_cache=False).logits

    def raw(self, folder):
        """The file's tensors by our names."""
        found = {}
        for name, T in load_file(folder / "model.safetensors").items():
            name = name.replace("backbone.embeddings", "embedding")
            found[name.replace("backbone.norm_f", "norm_f")] = T
        return other_names(found) if self.model in ("Bamba", "Jamba") else found


def other_names(found):
    """Bamba's or Jamba's tensors by our names, their several in one of ours put together."""
    ours = {
        "embedding.weight": found.pop("model.embed_tokens.weight"),
        "norm_f.weight": found.pop("model.final_layernorm.weight"),
        "lm_head.weight": found.pop("lm_head.weight"),
    }
    layers = {name.split(".")[2] for name in found}
    for i in layers:
        part = naive.below(found, f"model.layers.{i}.")
        here = f"backbone.layers.{i}."
        ours[f"{here}norm.weight"] = part.pop("input_layernorm.weight")
        ours[f"{here}norm2.weight"] = part.pop("pre_ff_layernorm.weight")
        feed = naive.below(part, "feed_forward.")
        part = {name: T for name, T in part.items() if not name.startswith("feed_forward.")}
        if "router.weight" in feed:
            ours[f"{here}mlp.router.weight"] = feed["router.weight"]
            several = range(len(feed["router.weight"]))
            names = [[f"experts.{e}.{n}_proj.weight" for n in ("gate", "up")] for e in several]
            ours[f"{here}mlp.fc1"] = torch.stack(
                [torch.cat([feed[name] for name in pair]) for pair in names]
            )
            ours[f"{here}mlp.fc2"] = torch.stack(
                [feed[f"experts.{e}.down_proj.weight"] for e in several]
            )
        else:
            pair = (feed["up_proj.weight"], feed["gate_proj.weight"])
            ours[f"{here}mlp.fc1.weight"] = torch.cat(pair)
            ours[f"{here}mlp.fc2.weight"] = feed["down_proj.weight"]
        if "self_attn.q_proj.weight" in part:
            q, k, v, o = (part.pop(f"self_attn.{n}_proj.weight") for n in "qkvo")
            ours[f"{here}mixer.in_proj.weight"] = torch.cat((q, k, v))
            ours[f"{here}mixer.out_proj.weight"] = o
        for name in list(part):
            ours[f"{here}mixer.{name.removeprefix('mamba.')}"] = part.pop(name)
    return ours


@dataclass(frozen=True)
class Papers:
    """A checkpoint of the papers' code: its config.json, and the shape of each layer's tensors."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    attention: dict[str, tuple[int, ...]] | None = None
    prefix: str = ""
    file: str = "pytorch_model.bin"
    config_file: str = "config.json"
    dtype: torch.dtype = torch.float32

    @property
    def official(self):
        """The values as the papers' code names them."""
        names = {"dim": "d_model", "n_layers": "n_layer"}
        values = {names.get(name, name): value for name, value in self.config.items()}
        if "n_groups" in values:
            values["ssm_cfg"] = {"layer": "Mamba2", "ngroups": values.pop("n_groups")}
        return values

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        values = self.official
        d, multiple = values["d_model"], values.get("pad_vocab_size_multiple", 8)
        rows = -(-values["vocab_size"] // multiple) * multiple
        tensors = {
            "backbone.embedding.weight": torch.randn(rows, d),
            "backbone.norm_f.weight": 1 + 0.2 * torch.randn(d),
        }
        tied = values.get("tie_embeddings", True)
        embedding = tensors["backbone.embedding.weight"]
        tensors["lm_head.weight"] = embedding if tied else torch.randn(rows, d)
        width = values.get("d_intermediate", 0)
        for i in range(values["n_layer"]):
            shapes = dict(self.shapes)
            if i in values.get("attn_layer_idx", []):
                shapes = dict(self.attention)
            layer = {f"mixer.{name}": shape for name, shape in shapes.items()}
            layer["norm.weight"] = (d,)
            if width:
                padded = -(-width // 128) * 128
                layer |= {"norm2.weight": (d,), "mlp.fc1.weight": (2 * padded, d)}
                layer["mlp.fc2.weight"] = (d, padded)
            for name, shape in layer.items():
                scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.5
                T = scale * torch.randn(shape)
                tensors[f"backbone.layers.{i}.{name}"] = 1 + T if "norm" in name else T
        tensors = {f"{self.prefix}{n}": T.to(self.dtype) for n, T in tensors.items()}
        if self.file.endswith(".bin"):
            torch.save(tensors, folder / self.file)
        else:
            save_file({n: T.clone() for n, T in tensors.items()}, folder / self.file)
        (folder / self.config_file).write_text(json.dumps(self.config))

    def raw(self, folder):
        """The file's tensors by our names."""
        tops = {f"backbone.{n}.weight": f"{n}.weight" for n in ("embedding", "norm_f")}
        return {tops.get(name, name): T for name, T in self._tensors(folder).items()}

    def judge(self, folder, tokens):
        weights = {name: T.double() for name, T in self._tensors(folder).items()}
        rows = naive.lm(weights, self.official, tokens)
        return rows[..., : self.config["vocab_size"]]

    def _tensors(self, folder):
        path = folder / self.file
        found = torch.load(path) if path.suffix == ".bin" else load_file(path)
        return {name.removeprefix(self.prefix): T for name, T in found.items()}


def perturb(model):
    """Away from initial values that are the same everywhere, and from what nobody would notice."""
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))


def _mamba1(d, n, R, k=4):
    e = 2 * d
    return {
        "in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, k), "conv1d.bias": (e,),
        "x_proj.weight": (R + 2 * n, e), "dt_proj.weight": (e, R), "dt_proj.bias": (e,),
        "A_log": (e, n), "D": (e,), "out_proj.weight": (d, e),
    }  # fmt: skip


def _mamba2(d, n, p, g, k=4):
    e = 2 * d
    h, channels = e // p, e + 2 * g * n
    return {
        "in_proj.weight": (2 * e + 2 * g * n + h, d), "conv1d.weight": (channels, 1, k),
        "conv1d.bias": (channels,), "dt_bias": (h,), "A_log": (h,), "D": (h,), "norm.weight": (e,),
        "out_proj.weight": (d, e),
    }  # fmt: skip


def _mamba3(d, n, p, r, fraction):
    e = 2 * d
    h, angles = e // p, int(n * fraction) // 2
    shapes = {
        "in_proj.weight": (2 * e + 2 * n * r + 3 * h + angles, d), "out_proj.weight": (d, e),
        "dt_bias": (h,), "B_bias": (h, r, n), "C_bias": (h, r, n), "B_norm.weight": (n,),
        "C_norm.weight": (n,), "D": (h,),
    }  # fmt: skip
    return shapes | ({f"mimo_{name}": (h, r, p) for name in "xzo"} if r > 1 else {})


_COMMON = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
# As published: state-spaces/mamba-*, mamba2-*, mamba3-siso-* and -mimo-*, mamba2attn-2.7b,
# Codestral's consolidated file, and transformers' four families.
FAMILIES = {
    "official mamba": Papers(
        {"d_model": 16, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": {}, **_COMMON}
        | {"pad_vocab_size_multiple": 8},
        _mamba1(16, 16, 1),
    ),
    "official mamba2": Papers(
        {"d_model": 64, "d_intermediate": 0, "n_layer": 2, "vocab_size": VOCAB}
        | {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, **_COMMON}
        | {"pad_vocab_size_multiple": 16, "tie_embeddings": True},
        _mamba2(64, 128, 64, 1),
    ),
    "official mamba3 siso": Papers(
        {"d_model": 16, "d_intermediate": 100, "n_layer": 2, "vocab_size": VOCAB}
        | {"ssm_cfg": {"layer": "Mamba3", "d_state": 8, "headdim": 8}, "tie_embeddings": True}
        | _COMMON,
        _mamba3(16, 8, 8, 1, 0.5),
        dtype=torch.bfloat16,
    ),
    "official mamba3 mimo": Papers(
        {"d_model": 16, "d_intermediate": 128, "n_layer": 2, "vocab_size": VOCAB}
        | {"ssm_cfg": {"layer": "Mamba3", "d_state": 8, "headdim": 8, "is_mimo": True}
           | {"mimo_rank": 2, "rope_fraction": 1.0, "chunk_size": 16}}
        | _COMMON,
        _mamba3(16, 8, 8, 2, 1.0),
        dtype=torch.bfloat16,
    ),
    "official mamba2attn": Papers(
        {"d_model": 16, "n_layer": 3, "vocab_size": VOCAB, "attn_layer_idx": [1], **_COMMON}
        | {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}}
        | {"attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 8, "num_heads": 3}
           | {"num_heads_kv": 1, "out_proj_bias": False, "qkv_proj_bias": False}
           | {"rotary_emb_dim": 4}}
        | {"pad_vocab_size_multiple": 16, "tie_embeddings": True},
        _mamba2(16, 8, 8, 1),
        attention={"in_proj.weight": (40, 16), "conv1d.weight": (40, 1, 4), "conv1d.bias": (40,)}
        | {"out_proj.weight": (16, 24)},
    ),
    "codestral": Papers(
        {"dim": 64, "n_layers": 2, "vocab_size": VOCAB, "n_groups": 2, **_COMMON}
        | {"pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"},
        _mamba2(64, 128, 64, 2),
        prefix="model.",
        file="consolidated.safetensors",
        config_file="params.json",
        dtype=torch.bfloat16,
    ),
    "hf mamba": Theirs(
        "Mamba",
        {"hidden_size": 16, "state_size": 5, "num_hidden_layers": 2, "conv_kernel": 3}
        | {"time_step_rank": 3, "use_bias": True},
    ),
    "hf mamba2": Theirs(
        "Mamba2",
        {"hidden_size": 16, "state_size": 5, "num_hidden_layers": 2, "num_heads": 8}
        | {"head_dim": 4, "n_groups": 2, "time_step_limit": (0.01, 0.9)},
    ),
    "hf falcon_mamba": Theirs(
        "FalconMamba",
        {"hidden_size": 16, "state_size": 5, "num_hidden_layers": 2, "expand": 16}
        | {"intermediate_size": 48, "tie_word_embeddings": False},
    ),
    "hf bamba": Theirs(
        "Bamba",
        {"hidden_size": 16, "intermediate_size": 128, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
        | {"mamba_n_heads": 8, "mamba_d_state": 5},
    ),
    "hf jamba": Theirs(
        "Jamba",
        {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 5}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
        | {"num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 5}
        | {"mamba_dt_rank": 3},
    ),
}  # fmt: skip
