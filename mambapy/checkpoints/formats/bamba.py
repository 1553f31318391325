"""The format of Bamba in transformers: its names are its own, and some of its tensors in pieces.

Source: transformers 5, `models/bamba/`, and its `convert_mamba_ssm_checkpoint.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Keys, Part, refuse
from mambapy.checkpoints.formats.huggingface import (
    HuggingFace,
    decoder_parts,
    limits,
    refuse_mamba2,
)
from mambapy.config import HybridConfig


class HFBamba(HuggingFace):
    """BambaForCausalLM: Mamba-2 and attention, a gated MLP after each."""

    model_type, architecture = "bamba", "BambaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "vocab_size": 128000,
        "num_hidden_layers": 32,
        "tie": False,
        "in_fp32": False,
    }

    def read(self, values: Keys) -> Architecture:
        """Translate config.json."""
        stack, model = self.read_model(values)
        heads = values.take("num_attention_heads", 32)
        channels = stack["d_model"] // heads
        n_heads, expand = values.take("mamba_n_heads", 128), values.take("mamba_expand", 2)
        d_head = values.take("mamba_d_head", "auto")
        rope = values.take("rope_parameters", None) or {}
        rope = {"rope_theta": 10000.0, **values.given(rope_theta="rope_theta"), **rope}
        values.must("rope_scaling", None)
        values.must("mlp_bias", False)
        values.ignore("partial_rotary_factor")
        keys = Keys(rope, f"{values.source}, rope_parameters")
        keys.must("rope_type", "default")
        # Whatever is written there, transformers turns half of a head.
        keys.ignore("partial_rotary_factor")
        base = keys.take("rope_theta")
        keys.finish()
        chosen = values.take("attn_layer_indices", None) or []
        n_layers = values.take("num_hidden_layers", self.defaults["num_hidden_layers"])
        bias = values.take("attention_bias", False)
        values.must("head_dim", channels)
        values.must("attn_rotary_emb", channels // 2)
        mamba2 = {
            "d_head": expand * stack["d_model"] // n_heads if d_head == "auto" else d_head,
            "d_state": values.take("mamba_d_state", 256),
            "d_conv": values.take("mamba_d_conv", 4),
            "n_groups": values.take("mamba_n_groups", 1),
            "dt_limit": limits(values.take("time_step_limit", (0.0, math.inf))),
            "bias": values.take("mamba_proj_bias", False),
            "conv_bias": values.take("mamba_conv_bias", True),
        }
        attention = {
            "n_heads": heads,
            "n_kv_heads": values.take("num_key_value_heads", 8) or heads,
            "rotary_dim": channels // 2,
            "rotary_base": base,
            "bias": bias,
            "out_bias": bias,
        }
        kinds = ["attention" if i in chosen else "mamba2" for i in range(n_layers)]
        mixers: dict[str, Any] = {"mamba2": mamba2} if "mamba2" in kinds else {}
        mixers |= {"attention": attention} if chosen else {}
        config = HybridConfig(
            **stack,
            **mixers,
            layers=tuple(f"{kind}+mlp" for kind in kinds),
            d_intermediate=values.take("intermediate_size", 14336),
            mlp_multiple_of=1,
            expand=expand,
            rms_norm_eps=values.take("rms_norm_eps", 1e-5),
        )
        values.finish()
        return Architecture(config, **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to config.json. The residual stream is in the weights' dtype over there."""
        where = "transformers' bamba"
        config: HybridConfig = architecture.config_of("hybrid")
        reasons = [kind for kind in set(config.mixers) if kind not in ("mamba2", "attention")]
        refuse(where, [f"{kind} layers" for kind in reasons])
        if set(config.feed_forwards) != {"mlp"}:
            refuse(where, ["blocks without an MLP, or with experts"])
        attention: dict[str, Any] = {}
        if "attention" in config.mixers:
            attn = config.mixer_config("attention")
            channels = config.d_model // attn.n_heads
            if attn.d_conv or attn.bias != attn.out_bias:
                reasons.append(f"d_conv={attn.d_conv}, bias={attn.bias}, out_bias={attn.out_bias}")
            if attn.head_channels * attn.n_heads != config.d_model:
                reasons.append(f"{attn.n_heads} heads of {attn.head_channels} channels")
            if attn.rotary_dim != channels // 2:
                reasons.append(f"rotary_dim={attn.rotary_dim}, not half of a head")
            refuse(where, reasons)
            attention = {
                "num_attention_heads": attn.n_heads,
                "num_key_value_heads": attn.kv_heads,
                "attention_bias": attn.bias,
                # As IBM's own files and other readers of them have it.
                "attn_rotary_emb": attn.rotary_dim,
                "rope_parameters": {"rope_type": "default", "rope_theta": attn.rotary_base},
            }
        mixer: dict[str, Any] = {}
        if "mamba2" in config.mixers:
            mamba = config.mixer_config("mamba2")
            refuse_mamba2(where, mamba)
            mixer = {
                "mamba_n_heads": mamba.n_heads,
                "mamba_d_head": mamba.d_head,
                "mamba_n_groups": mamba.n_groups,
                "mamba_d_state": mamba.d_state,
                "mamba_d_conv": mamba.d_conv,
                "mamba_conv_bias": mamba.conv_bias,
                "mamba_proj_bias": mamba.bias,
                "time_step_limit": [*mamba.dt_limit],
            }
        values = self.write_model(architecture)
        values["mambapy"] |= {"residual_in_fp32": config.residual_in_fp32}
        return {
            **values,
            "intermediate_size": config.d_mlp,
            "attn_layer_indices": [i for i, k in enumerate(config.mixers) if k == "attention"],
            "mamba_expand": round(config.expand),
            "rms_norm_eps": config.rms_norm_eps,
            "max_position_embeddings": 262144,
            **mixer,
            **attention,
        }

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """See `decoder_parts`."""
        return decoder_parts(name, architecture.config_of("hybrid"))
