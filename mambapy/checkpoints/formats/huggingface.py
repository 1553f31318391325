"""The formats of transformers: mamba, falcon_mamba, mamba2 and bamba, as its config.json has them.

A key that is missing has transformers' own default. What its configurations have no key for
(the true size of a padded vocabulary) stands under "mambapy", which transformers carries along.

Source: transformers 5, `models/{mamba,falcon_mamba,mamba2,bamba}/configuration_*.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part, refuse, unlike
from mambapy.config import HybridConfig, Mamba2Config, MambaConfig

# What any model's config.json may have and what changes no logits.
_HARMLESS = """
    _name_or_path architectures model_type transformers_version dtype torch_dtype use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    output_attentions output_hidden_states return_dict is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size problem_type finetuning_task
    task_specific_params id2label label2id chunk_size_feed_forward prefix tokenizer_class
    torchscript pruned_heads
    use_bfloat16 tf_legacy_loss min_length max_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens fused_add_norm use_mambapy use_falcon_mambapy use_associative_scan
    chunk_size time_step_min time_step_max time_step_floor n_layer d_inner d_model ssm_cfg
    pad_vocab_size_multiple mamba_chunk_size num_logits_to_keep z_loss_coefficient
    max_position_embeddings attention_dropout layer_types layers_block_type _attn_implementation
""".split()  # noqa: SIM905


class HuggingFace(Format):
    """What the formats of transformers share."""

    name = "hf"
    model_type: str
    architecture: str
    # Theirs, where it is not in config.json.
    defaults: Mapping[str, Any]

    def read_model(self, values: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of StackConfig and of Architecture that all of them have."""
        steps = values.given(
            dt_min="time_step_min", dt_max="time_step_max", dt_init_floor="time_step_floor"
        )
        values.ignore(*_HARMLESS)
        values.must("hidden_act", "silu", "swish")
        values.must("rms_norm", True)
        extra = values.section("mambapy")
        stack = {
            "d_model": values.take("hidden_size", self.defaults["hidden_size"]),
            "base_std": values.take("initializer_range", self.defaults["initializer_range"]),
            **steps,
            "residual_in_fp32": values.take("residual_in_fp32", self.defaults["in_fp32"]),
            "rescale_out_proj": values.take("rescale_prenorm_residual", False),
            **extra.given(residual_in_fp32="residual_in_fp32", rescale_out_proj="rescale_out_proj"),
        }
        rows = values.take("vocab_size", self.defaults["vocab_size"])
        model = {
            "vocab_size": rows,
            "tie_embeddings": values.take("tie_word_embeddings", self.defaults["tie"]),
            "pad_vocab_size_multiple": 1,
            **extra.given(
                vocab_size="vocab_size", pad_vocab_size_multiple="pad_vocab_size_multiple"
            ),
        }
        extra.finish()
        return stack, model

    def write_model(self, architecture: Architecture) -> dict[str, Any]:
        """The keys that all of them have."""
        if architecture.quantized:
            refuse("transformers' format", [f"weights in {architecture.quantized}"])
        config = architecture.config
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": architecture.rows,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "initializer_range": config.base_std,
            "tie_word_embeddings": architecture.tie_embeddings,
            "hidden_act": "silu",
            "mambapy": {
                "vocab_size": architecture.vocab_size,
                "pad_vocab_size_multiple": architecture.pad_vocab_size_multiple,
                # Under their own key, rescale_prenorm_residual, transformers (5.24) would divide
                # out_proj after loading it.
                "rescale_out_proj": config.rescale_out_proj,
            },
        }

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """Ours below "backbone.", and an s more in the embedding's name."""
        name = name.replace("embedding.", "embeddings.", 1)
        below = name.startswith(("backbone.", "lm_head."))
        return [Part(name if below else f"backbone.{name}")]

    def canonical(self, name: str) -> str:
        """The newer of their two spellings."""
        return name.replace("backbone.embedding.", "backbone.embeddings.")


class HFMamba(HuggingFace):
    """MambaForCausalLM."""

    model_type, architecture = "mamba", "MambaForCausalLM"
    inner_norm: Literal["none", "plain"] = "none"
    defaults = {  # noqa: RUF012
        "hidden_size": 768,
        "initializer_range": 0.1,
        "vocab_size": 50280,
        "num_hidden_layers": 32,
        "tie": True,
        "in_fp32": True,
    }

    def read(self, values: Keys) -> Architecture:
        """Translate config.json; intermediate_size decides where it is not expand * hidden."""
        stack, model = self.read_model(values)
        inner = values.take("intermediate_size", None)
        expand = values.take("expand", 2)
        options = values.given(dt_scale="time_step_scale", dt_init="time_step_init_scheme")
        norms = values.given(inner_norm_eps="mixer_rms_eps")
        config = MambaConfig(
            **stack,
            **options,
            **(norms if self.inner_norm != "none" else {}),
            n_layers=values.take("num_hidden_layers", self.defaults["num_hidden_layers"]),
            expand=inner / stack["d_model"] if inner else expand,
            d_state=values.take("state_size", 16),
            d_conv=values.take("conv_kernel", 4),
            dt_rank=values.take("time_step_rank", "auto"),
            bias=values.take("use_bias", False),
            conv_bias=values.take("use_conv_bias", True),
            rms_norm_eps=values.take("layer_norm_epsilon", 1e-5),
            inner_norm=self.inner_norm,
        )
        values.finish()
        return Architecture(config, **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to config.json."""
        config: MambaConfig = architecture.config_of("mamba")
        reasons = unlike(architecture, inner_norm=self.inner_norm, d_intermediate=0)
        refuse(f"transformers' {self.model_type}", reasons)
        norms = {} if self.inner_norm == "none" else {"mixer_rms_eps": config.inner_norm_eps}
        return self.write_model(architecture) | {
            "state_size": config.d_state,
            "conv_kernel": config.d_conv,
            "expand": max(1, round(config.expand)),
            "intermediate_size": config.d_inner,
            "use_bias": config.bias,
            "use_conv_bias": config.conv_bias,
            "layer_norm_epsilon": config.rms_norm_eps,
            "residual_in_fp32": config.residual_in_fp32,
            "time_step_rank": config.rank,
            "time_step_scale": config.dt_scale,
            "time_step_init_scheme": config.dt_init,
            "time_step_min": config.dt_min,
            "time_step_max": config.dt_max,
            "time_step_floor": config.dt_init_floor,
            **norms,
        }


class HFFalconMamba(HFMamba):
    """FalconMambaForCausalLM: Mamba-1 with norms without a scale on dt, B and C."""

    model_type, architecture = "falcon_mamba", "FalconMambaForCausalLM"
    inner_norm = "plain"


class HFMamba2(HuggingFace):
    """Mamba2ForCausalLM. Its norm is always behind the gate, whatever `norm_before_gate` says."""

    model_type, architecture = "mamba2", "Mamba2ForCausalLM"
    defaults = {  # noqa: RUF012
        "hidden_size": 4096,
        "initializer_range": 0.1,
        "vocab_size": 32768,
        "num_hidden_layers": 64,
        "tie": False,
        "in_fp32": True,
    }

    def read(self, values: Keys) -> Architecture:
        """Translate config.json."""
        stack, model = self.read_model(values)
        expand, heads = values.take("expand", 2), values.take("num_heads", 128)
        head_dim = values.take("head_dim", 64)
        values.must("intermediate_size", heads * head_dim)
        values.ignore("time_step_rank", "norm_before_gate")
        config = Mamba2Config(
            **stack,
            n_layers=values.take("num_hidden_layers", self.defaults["num_hidden_layers"]),
            expand=expand,
            d_head=head_dim,
            d_state=values.take("state_size", 128),
            d_conv=values.take("conv_kernel", 4),
            n_groups=values.take("n_groups", 8),
            dt_limit=_limit(values.take("time_step_limit", (0.0, math.inf))),
            bias=values.take("use_bias", False),
            conv_bias=values.take("use_conv_bias", True),
            rms_norm_eps=values.take("layer_norm_epsilon", 1e-5),
        )
        values.finish()
        if config.n_heads != heads:
            refuse(
                values.source,
                [f"num_heads={heads} of {head_dim} in {config.d_inner} = expand * hidden_size"],
            )
        return Architecture(config, **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to config.json."""
        config: Mamba2Config = architecture.config_of("mamba2")
        _refuse_mamba2(f"transformers' {self.model_type}", config)
        refuse(f"transformers' {self.model_type}", unlike(architecture, d_intermediate=0))
        return self.write_model(architecture) | {
            "state_size": config.d_state,
            "conv_kernel": config.d_conv,
            "expand": round(config.expand),
            "num_heads": config.n_heads,
            "head_dim": config.d_head,
            "n_groups": config.n_groups,
            "time_step_limit": [*config.dt_limit],
            "use_bias": config.bias,
            "use_conv_bias": config.conv_bias,
            "layer_norm_epsilon": config.rms_norm_eps,
            "residual_in_fp32": config.residual_in_fp32,
            "time_step_min": config.dt_min,
            "time_step_max": config.dt_max,
            "time_step_floor": config.dt_init_floor,
        }


class HFBamba(HuggingFace):
    """BambaForCausalLM: Mamba-2 and attention, a gated MLP after each."""

    model_type, architecture = "bamba", "BambaForCausalLM"
    defaults = {  # noqa: RUF012
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
        mamba2 = {
            "d_head": expand * stack["d_model"] // n_heads if d_head == "auto" else d_head,
            "d_state": values.take("mamba_d_state", 256),
            "d_conv": values.take("mamba_d_conv", 4),
            "n_groups": values.take("mamba_n_groups", 1),
            "dt_limit": _limit(values.take("time_step_limit", (0.0, math.inf))),
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
        if not all(config.mlp_layers):
            refuse(where, ["blocks without an MLP"])
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
                "rope_parameters": {"rope_type": "default", "rope_theta": attn.rotary_base},
            }
        mixer: dict[str, Any] = {}
        if "mamba2" in config.mixers:
            mamba = config.mixer_config("mamba2")
            _refuse_mamba2(where, mamba)
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
        """One of ours is several of theirs: queries, keys and values; the two halves of the MLP."""
        top = {
            "embedding.weight": "model.embed_tokens.weight",
            "norm_f.weight": "model.final_layernorm.weight",
            "lm_head.weight": "lm_head.weight",
        }
        if name in top:
            return [Part(top[name])]
        _, _, index, *path = name.split(".")
        layer, leaf = f"model.layers.{index}", ".".join(path)
        config: HybridConfig = architecture.config_of("hybrid")
        renamed = {
            "norm.weight": "input_layernorm.weight",
            "norm2.weight": "pre_ff_layernorm.weight",
            "mlp.fc2.weight": "feed_forward.down_proj.weight",
        }
        if leaf in renamed:
            return [Part(f"{layer}.{renamed[leaf]}")]
        if leaf == "mlp.fc1.weight":
            names = ("up_proj", "gate_proj")
            return [Part(f"{layer}.feed_forward.{n}.weight", config.d_mlp) for n in names]
        if config.mixers[int(index)] != "attention":
            return [Part(f"{layer}.mamba.{leaf.removeprefix('mixer.')}")]
        _, projection, kind = leaf.split(".")
        if projection == "out_proj":
            return [Part(f"{layer}.self_attn.o_proj.{kind}")]
        attn = config.mixer_config("attention")
        heads = {"q_proj": attn.n_heads, "k_proj": attn.kv_heads, "v_proj": attn.kv_heads}
        return [
            Part(f"{layer}.self_attn.{name}.{kind}", h * attn.head_channels)
            for name, h in heads.items()
        ]


def _limit(value: Any) -> tuple[float, float]:
    """A step size's limits; transformers 5 writes infinity as {"__float__": "Infinity"}."""
    low, high = (
        float(part["__float__"]) if isinstance(part, Mapping) else float(part)
        for part in (value or (0.0, math.inf))
    )
    return low, high


def _refuse_mamba2(where: str, config: Mamba2Config) -> None:
    """Raise where a Mamba-2 mixer has what transformers' has not."""
    wanted = {
        "rmsnorm": True,
        "norm_before_gate": False,
        "D_has_hdim": False,
        "learnable_init_states": False,
    }
    reasons = [f"{n}={getattr(config, n)!r}" for n, v in wanted.items() if getattr(config, n) != v]
    if config.d_ssm_channels != config.d_inner:
        reasons.append(f"d_ssm={config.d_ssm}")
    if config.expand != round(config.expand):
        reasons.append(f"expand={config.expand}")
    refuse(where, reasons)


TRANSFORMERS: dict[str, HuggingFace] = {
    each.model_type: each for each in (HFMamba(), HFFalconMamba(), HFMamba2(), HFBamba())
}
