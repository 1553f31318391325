"""The format of Jamba: transformers', and that of the remote code before it (Mini-Jamba).

Experts are one tensor each in the files, "experts.3.up_proj", or packed, as transformers 5 has them
in memory. The older code called every feed-forward "moe", a dense one its only expert.

Source: transformers 5, `models/jamba/` and `conversion_mapping.py`; the config.json and the names
of the published checkpoints.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part, refuse
from mambapy.checkpoints.formats.huggingface import HuggingFace, decoder_parts
from mambapy.config import JambaConfig

# Ours -> theirs.
_FIELDS = {
    "attn_layer_period": "attn_layer_period",
    "attn_layer_offset": "attn_layer_offset",
    "expert_layer_period": "expert_layer_period",
    "expert_layer_offset": "expert_layer_offset",
    "rms_norm_eps": "rms_norm_eps",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "dt_rank": "mamba_dt_rank",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
}
_HARMLESS = (
    *("use_mamba_kernels", "calc_logits_for_entire_prompt", "output_router_logits"),
    *("router_aux_loss_coef", "n_ctx", "num_local_experts", "auto_map", "attn_implementation"),
    *("_attn_implementation_autoset", "layers_num_experts"),
)


class HFJamba(HuggingFace):
    """JambaForCausalLM.

    Args:
        packed: whether the file has all experts of a layer in one tensor.
    """

    model_type, architecture = "jamba", "JambaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "vocab_size": 65536,
        "num_hidden_layers": 32,
        "tie": False,
        "in_fp32": False,
    }

    def __init__(self, packed: bool = False) -> None:
        self.packed = packed

    def fit(self, names: Iterable[str]) -> Format:
        """The format for a file with packed experts, where that is what it has."""
        return HFJamba(any(name.endswith("experts.gate_up_proj") for name in names))

    def read(self, values: Keys) -> Architecture:
        """Translate config.json."""
        values.ignore(*_HARMLESS)
        values.must("sliding_window", None)
        stack, model = self.read_model(values)
        options = values.given(**_FIELDS)
        if values.take("mamba_inner_layernorms", True) is False:
            options["inner_norm"] = "none"
        values.must("head_dim", stack["d_model"] // options.get("n_heads", 32))
        config = JambaConfig(
            **stack,
            **options,
            n_layers=values.take("num_hidden_layers", self.defaults["num_hidden_layers"]),
            d_intermediate=values.take("intermediate_size", 14336),
        )
        values.finish()
        return Architecture(config, **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to config.json."""
        config: JambaConfig = architecture.config_of("jamba")
        wanted = {"mixer": "mamba", "inner_norm": "learned", "attn_layers": None}
        wanted |= {"expert_layers": None}
        reasons = [f"{n}={getattr(config, n)!r}" for n in wanted if getattr(config, n) != wanted[n]]
        if config.expand != round(config.expand):
            reasons.append(f"expand={config.expand}")
        refuse("transformers' jamba", reasons)
        mamba = config.mixer_config("mamba")
        values = self.write_model(architecture)
        values["mambapy"] |= {"residual_in_fp32": config.residual_in_fp32}
        return {
            **values,
            **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
            "num_key_value_heads": config.n_kv_heads or config.n_heads,
            "mamba_d_state": mamba.d_state,
            "mamba_dt_rank": mamba.rank,
            "mamba_expand": round(config.expand),
            "intermediate_size": config.d_mlp,
            "max_position_embeddings": 262144,
        }

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """See `decoder_parts`; and experts, one tensor each or packed as ours are."""
        config: JambaConfig = architecture.config_of("jamba")
        block, _, leaf = name.partition(".mlp.")
        layer = block.replace("backbone.", "model.", 1) + ".feed_forward"
        if leaf == "router.weight":
            return [Part(f"{layer}.router.weight")]
        projections = {"fc1": ("gate_proj", "up_proj"), "fc2": ("down_proj",)}
        if leaf not in projections:
            return decoder_parts(name, config)
        if self.packed:
            return [Part(f"{layer}.experts.{'gate_up' if leaf == 'fc1' else 'down'}_proj")]
        rows = config.d_mlp if leaf == "fc1" else config.d_model
        return [
            Part(f"{layer}.experts.{e}.{projection}.weight", rows)
            for e in range(config.n_experts)
            for projection in projections[leaf]
        ]

    def canonical(self, name: str) -> str:
        """The newer of their names; `settle` does the rest, which needs the architecture."""
        name = name.replace(".pre_moe_layernorm.", ".pre_ff_layernorm.")
        return name.replace(".moe.", ".feed_forward.")

    def settle(self, names: Iterable[str], architecture: Architecture) -> dict[str, str]:
        """A dense layer's only expert, as the older code has it, is the layer's MLP."""
        config: JambaConfig = architecture.config_of("jamba")
        found = {}
        for name in names:
            expert = re.fullmatch(r"(model\.layers\.(\d+)\.feed_forward)\.experts\.0\.(.+)", name)
            i = int(expert[2]) if expert else config.n_layers
            dense = i < config.n_layers and config.feed_forwards[i] == "mlp"
            found[f"{expert[1]}.{expert[3]}" if expert and dense else name] = name
        return found
