"""The formats of transformers: what they share, and mamba, falcon_mamba and mamba2.

A key that is missing has transformers' own default. What its configurations have no key for
(the true size of a padded vocabulary) stands under "mambapy", which transformers carries along.

Source: transformers 5, `models/{mamba,falcon_mamba,mamba2,bamba}/configuration_*.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part, refuse, unlike
from mambapy.config import HybridConfig, JambaConfig, Mamba2Config, MambaConfig

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
    defaults: ClassVar[Mapping[str, Any]]

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
            # transformers does not look at it; llama.cpp's converter does.
            "pad_vocab_size_multiple": architecture.pad_vocab_size_multiple,
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
    defaults: ClassVar[Mapping[str, Any]] = {
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
    defaults: ClassVar[Mapping[str, Any]] = {
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
            dt_limit=limits(values.take("time_step_limit", (0.0, math.inf))),
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
        refuse_mamba2(f"transformers' {self.model_type}", config)
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


def decoder_parts(name: str, config: HybridConfig | JambaConfig) -> list[Part]:
    """One of our tensors as Bamba and Jamba call it, which name all alike but the experts.

    One of ours is several of theirs: queries, keys and values; the two halves of an MLP.
    """
    top = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm_f.weight": "model.final_layernorm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    if name in top:
        return [Part(top[name])]
    _, _, index, *path = name.split(".")
    layer, leaf = f"model.layers.{index}", ".".join(path)
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
    _, projection, kind = path
    if projection == "out_proj":
        return [Part(f"{layer}.self_attn.o_proj.{kind}")]
    attn = config.mixer_config("attention")
    heads = {"q_proj": attn.n_heads, "k_proj": attn.kv_heads, "v_proj": attn.kv_heads}
    return [
        Part(f"{layer}.self_attn.{name}.{kind}", h * attn.head_channels)
        for name, h in heads.items()
    ]


def limits(value: Any) -> tuple[float, float]:
    """A step size's limits; transformers 5 writes infinity as {"__float__": "Infinity"}."""
    low, high = (
        float(part["__float__"]) if isinstance(part, Mapping) else float(part)
        for part in (value or (0.0, math.inf))
    )
    return low, high


def refuse_mamba2(where: str, config: Mamba2Config) -> None:
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
