"""The format of the papers' code (mamba_ssm): Mamba-1, Mamba-2, Mamba-3, and hybrids of them.

config.json has the fields of its `MambaConfig`; the mixer's options are in `ssm_cfg`, those of
attention in `attn_cfg`. Weights have the names of our models, with "backbone." before them.

Source: state-spaces/mamba, `models/config_mamba.py` and the modules' arguments.
"""

import math
from typing import Any

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part, refuse, unlike
from mambapy.config import HybridConfig, Mamba2Config, Mamba3Config, MambaConfig
from mambapy.errors import CheckpointError

# Ours -> theirs, for the options of each kind of mixer, and what both leave out by default.
_STEPS = {"dt_min": "dt_min", "dt_max": "dt_max", "dt_init_floor": "dt_init_floor"}
_MAMBA1 = {
    name: name for name in ("d_state", "d_conv", "expand", "dt_rank", "dt_init", "dt_scale", "bias")
} | {"conv_bias": "conv_bias", **_STEPS}
_MAMBA2 = {
    "d_head": "headdim",
    "n_groups": "ngroups",
    **{
        name: name
        for name in (
            *("d_state", "d_conv", "expand", "d_ssm", "A_init_range", "D_has_hdim", "rmsnorm"),
            *("norm_before_gate", "dt_limit", "bias", "conv_bias"),
        )
    },
    **_STEPS,
}
_MAMBA3 = {
    "d_head": "headdim",
    "n_groups": "ngroups",
    "outproj_norm": "is_outproj_norm",
    **{name: name for name in ("d_state", "expand", "rope_fraction", "A_floor")},
    **_STEPS,
}
_ATTENTION = {
    "n_heads": "num_heads",
    "n_kv_heads": "num_heads_kv",
    "d_head": "head_dim",
    "rotary_dim": "rotary_emb_dim",
    "rotary_base": "rotary_emb_base",
    "d_conv": "d_conv",
    "bias": "qkv_proj_bias",
    "out_bias": "out_proj_bias",
}
_LAYERS = {
    "Mamba1": ("mamba", MambaConfig, _MAMBA1),
    "Mamba2": ("mamba2", Mamba2Config, _MAMBA2),
    "Mamba3": ("mamba3", Mamba3Config, _MAMBA3),
}
# How fast they run, and how they start; neither is part of what they compute.
_HARMLESS = ("use_fast_path", "use_mem_eff_path", "chunk_size", "conv_init", "fused_add_norm")
_MLP_MULTIPLE = 128


class Official(Format):
    """The format of state-spaces/mamba."""

    name = "official"
    container = "bin"
    stems = ("pytorch_model.bin", "model.safetensors")
    writes_tied_head = True

    def read(self, values: Keys) -> Architecture:
        """Translate their MambaConfig."""
        stack, model = read_model(values)
        ssm, attention = values.section("ssm_cfg"), values.section("attn_cfg")
        indices = values.take("attn_layer_idx", None) or []
        if len(set(indices)) < len(indices):
            raise CheckpointError(f"{values.source}: attn_layer_idx={indices} names a layer twice")
        layer = ssm.take("layer", "Mamba1")
        if layer not in _LAYERS:
            raise CheckpointError(f"{ssm.source}: layer={layer!r} is not one of {[*_LAYERS]}")
        kind, config, table = _LAYERS[layer]
        options = _read_mixer(ssm, layer, table)
        values.finish()
        if not indices:
            # It may describe an attention that no layer has.
            return Architecture(config(**stack, **options), **model)
        shared = {name: options.pop(name) for name in ("expand", *_STEPS) if name in options}
        attention_options = _read_attention(attention)
        mlp = "+mlp" if stack["d_intermediate"] else ""
        n_layers = stack.pop("n_layers")
        layers = [f"{'attention' if i in indices else kind}{mlp}" for i in range(n_layers)]
        mixers: dict[str, Any] = {"attention": attention_options}
        mixers |= {kind: options} if len(indices) < n_layers else {}
        hybrid = HybridConfig(**stack, **shared, **mixers, layers=tuple(layers))
        return Architecture(hybrid, **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to their MambaConfig; layers that differ must be of one kind and attention."""
        config, where = architecture.config, "the official format"
        if architecture.model_type == "jamba":
            refuse(where, ["experts"])
        reasons = unlike(architecture, rms_norm_eps=1e-5)
        if architecture.quantized:
            reasons.append(f"weights in {architecture.quantized}")
        if config.d_mlp % _MLP_MULTIPLE:
            reasons.append(f"an MLP of {config.d_mlp} channels, no multiple of {_MLP_MULTIPLE}")
        mixers = {architecture.model_type: config}
        attention: list[int] = []
        if isinstance(config, HybridConfig):
            if len(set(config.feed_forwards)) > 1 or "moe" in config.feed_forwards:
                reasons.append("an MLP in some blocks only, or experts")
            mixers = {kind: config.mixer_config(kind) for kind in config.mixers}
            attention = [i for i, kind in enumerate(config.mixers) if kind == "attention"]
        attention_config = mixers.pop("attention", None)
        if len(mixers) != 1:
            reasons.append(f"{len(mixers)} kinds of recurrent mixers, {[*mixers]}")
        refuse(where, reasons)
        ((kind, mixer),) = mixers.items()
        layer = next(name for name, (known, _, _) in _LAYERS.items() if known == kind)
        return {
            "d_model": config.d_model,
            "d_intermediate": config.d_mlp,
            "n_layer": config.n_layers,
            "vocab_size": architecture.vocab_size,
            "ssm_cfg": _write_mixer(mixer, layer, where),
            "attn_layer_idx": attention,
            "attn_cfg": {} if attention_config is None else _write_attention(attention_config),
            "rms_norm": True,
            "residual_in_fp32": config.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": architecture.pad_vocab_size_multiple,
            "tie_embeddings": architecture.tie_embeddings,
        }

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """The same name, below "backbone."; the head is beside it."""
        below = name.startswith(("backbone.", "lm_head."))
        return [Part(name if below else f"backbone.{name}")]


def read_model(values: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of StackConfig and of Architecture that are not in a section of their own."""
    values.must("rms_norm", True)
    values.ignore(*_HARMLESS)
    stack = {
        "d_model": values.take("d_model"),
        "n_layers": values.take("n_layer"),
        "d_intermediate": values.take("d_intermediate", 0),
        "residual_in_fp32": values.take("residual_in_fp32", True),
    }
    model = {
        "vocab_size": values.take("vocab_size"),
        "tie_embeddings": values.take("tie_embeddings", True),
        "pad_vocab_size_multiple": values.take("pad_vocab_size_multiple", 8),
    }
    return stack, model


def _read_mixer(ssm: Keys, layer: str, table: dict[str, str]) -> dict[str, Any]:
    """The options of a recurrent mixer, by our names."""
    ssm.ignore(*_HARMLESS)
    options = ssm.given(**table)
    if layer == "Mamba3":
        ssm.must("dropout", 0, 0.0)
        # Without MIMO their rank is not looked at.
        rank = ssm.take("mimo_rank", 4)
        if ssm.take("is_mimo", False):
            options["mimo_rank"] = rank
    ssm.finish()
    return options


def _read_attention(attention: Keys) -> dict[str, Any]:
    """The options of attention, by our names; their defaults are not ours."""
    attention.must("causal", True)
    attention.must("mlp_dim", 0)
    attention.must("softmax_scale", None)
    attention.must("rotary_emb_interleaved", False)
    attention.ignore("layer_idx")
    options = {"bias": True, "out_bias": True, **attention.given(**_ATTENTION)}
    attention.finish()
    return options


def _write_mixer(config: Any, layer: str, where: str) -> dict[str, Any]:
    """`ssm_cfg` of a mixer."""
    table = _LAYERS[layer][2]
    if layer == "Mamba1":
        refuse(where, [] if config.inner_norm == "none" else [f"inner_norm={config.inner_norm!r}"])
    if layer == "Mamba2" and config.learnable_init_states:
        refuse(where, ["learnable_init_states=True"])
    options = {theirs: getattr(config, ours) for ours, theirs in table.items()}
    if layer == "Mamba2":
        # Their own default, infinity, is no value of JSON.
        if options["dt_limit"] == (0.0, math.inf):
            del options["dt_limit"]
        if options["d_ssm"] is None:
            del options["d_ssm"]
    if layer == "Mamba3":
        published = "pairs" if config.mimo_rank == 1 else "halves"
        reasons = [] if config.rotation == published else [f"rotate={config.rotate!r}"]
        if config.a_activation != "heavy_tail":
            reasons.append(f"a_activation={config.a_activation!r}")
        refuse(where, reasons)
        if config.mimo_rank > 1:
            # Their kernels want the chunk's rows, 64, divided by the rank.
            chunk = max(1, 64 // config.mimo_rank)
            options |= {"is_mimo": True, "mimo_rank": config.mimo_rank, "chunk_size": chunk}
    return {"layer": layer, **options}


def _write_attention(config: Any) -> dict[str, Any]:
    """`attn_cfg` of attention."""
    options = {theirs: getattr(config, ours) for ours, theirs in _ATTENTION.items()}
    options |= {"num_heads_kv": config.kv_heads, "head_dim": config.head_channels}
    if config.d_conv and not config.conv_bias:
        raise CheckpointError("the official format cannot express conv_bias=False in attention")
    return {"causal": True, **options}
