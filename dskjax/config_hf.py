"""Reading and writing Hugging Face `config.json`.

A field that could change the numbers and is not understood is an error, never a warning; fields
known not to matter are listed.
"""

import dataclasses
import math
from typing import Any

from dskjax.config import (
    GATES,
    MlaConfig,
    ModelConfig,
    ModelType,
    MoeConfig,
    MtpConfig,
    RopeConfig,
    YarnConfig,
)

_GENERIC_FIELDS = """
bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id is_decoder
length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16
""".split()
"""Of every config in transformers 4, written out in some files: how to generate, how to train."""

IGNORED_FIELDS = frozenset(
    {
        *_GENERIC_FIELDS,
        "architectures",
        "auto_map",
        "aux_loss_alpha",  # training only
        "seq_aux",  # training only
        "router_aux_loss_coef",  # training only
        "output_router_logits",
        "initializer_range",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "unsloth_version",
        "quantization_config",  # how weights are stored: the loader judges the tensors
    }
)
"""Fields of public `config.json` files that do not change what the model computes."""

_INDEXER = (
    "DeepSeek-V3.2 needs the lightning indexer (sparse attention), which dskjax does not have"
)
_COMPRESSED = (
    "DeepSeek-V4 is not MLA (shared-KV attention with compressed layers), which dskjax does not "
    "have"
)
_VISION = "it is a vision-language model, and dskjax has no vision tower"

UNSUPPORTED_MODEL_TYPES = {
    "deepseek_v32": _INDEXER,
    "deepseek_v4": _COMPRESSED,
    "kimi_k25": _VISION,
    "kimi_vl": _VISION,
    "deepseek_vl_v2": _VISION,
    "kimi_linear": "Kimi-Linear has linear attention layers (KDA), which dskjax does not have",
    "deepseek": "the first DeepSeek-MoE has no latent attention",
}
"""Model types recognised by name, with what is missing."""

UNSUPPORTED_FIELDS = {"compress_ratios": _COMPRESSED, "index_topk": _INDEXER}
"""Fields that give such a model away under a supported model type, with what is missing; V4 has
both.
"""

_ARCHITECTURES: dict[ModelType, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",  # as published: Kimi-K2 has V3's architecture
}
_MISSING = object()


class _Fields:
    """Takes fields out of a config one by one, so that what is left over can be judged."""

    def __init__(self, config: dict[str, Any]):
        self.left = config

    def take(self, name: str, default: Any = _MISSING) -> Any:
        value = self.left.pop(name, default)
        if value is _MISSING:
            raise ValueError(f"config.json has no field {name!r}, which this model type needs")
        return value

    def integer(self, name: str, default: Any = _MISSING) -> Any:
        value = self.take(name, default)
        absent = value is None and default is None
        if not absent and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"config.json field {name!r} = {value!r} must be an integer")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        value = self.take(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"config.json field {name!r} = {value!r} must be a finite number")
        return float(value)

    def boolean(self, name: str, default: Any = _MISSING) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json field {name!r} = {value!r} must be true or false")
        return value

    def table(self, name: str) -> dict[str, Any] | None:
        value = self.take(name, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"config.json field {name!r} = {value!r} must be an object or null")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Drops a field whose only supported values are `allowed` (absence included)."""
        value = self.left.pop(name, allowed[0])
        if value not in allowed:
            raise NotImplementedError(
                f"config.json field {name!r} = {value!r} is not supported; supported: {allowed}"
            )


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """Reads a parsed Hugging Face `config.json`.

    Args:
        config: the JSON object. Both spellings of the rotary settings are read: the hub's
            `rope_scaling` + `rope_theta` and transformers 5's `rope_parameters`.

    Raises:
        NotImplementedError: the model type, or a value of a known field, is recognised but not
            supported.
        ValueError: a field is missing, malformed, or unknown and possibly meaningful; the message
            names it.
    """
    fields = _Fields(dict(config))
    model_type = fields.take("model_type")
    _refuse_unsupported(config)
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0, 0)
    fields.expect("moe_layer_freq", 1)
    fields.expect("ep_size", 1)
    fields.expect("pretraining_tp", 1)
    fields.expect("mtp_hidden_states_first", False)
    fields.expect("add_cross_attention", False)
    fields.expect("pruned_heads", {}, None)
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if kv_heads not in (heads, None):
        raise NotImplementedError(
            f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads}: MLA has no "
            "grouped heads"
        )
    layers = fields.integer("num_hidden_layers")
    moe = _moe_from_hf(fields, model_type)
    eos = fields.take("eos_token_id", None)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in eos_ids):
        raise ValueError(
            f"config.json field 'eos_token_id' = {eos!r} must be an id or a list of ids"
        )
    mla = MlaConfig(
        q_lora_rank=fields.integer("q_lora_rank", None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        norm_eps=fields.number("mla_norm_eps", 1e-6),
    )
    for name, implied in (("qk_head_dim", mla.qk_head_dim), ("head_dim", mla.qk_rope_head_dim)):
        value = fields.left.pop(name, None)
        if value not in (None, implied, mla.qk_head_dim):
            raise ValueError(
                f"config.json field {name!r} = {value!r} contradicts the head sizes, which imply "
                f"{implied}"
            )
    result = ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mla=mla,
        moe=moe,
        first_k_dense_replace=_dense_layers(fields, layers, moe),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rope=_rope_from_hf(fields),
        mtp=MtpConfig(
            num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", None) or 0,
            mtp_scheme=fields.take("mtp_scheme", None),
        ),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        bos_token_id=fields.integer("bos_token_id", None),
        eos_token_id=eos_ids,
    )
    unknown = sorted(
        name for name in fields.left if name not in IGNORED_FIELDS and not name.startswith("_")
    )
    if unknown:
        raise ValueError(
            "config.json has fields that dskjax does not know: "
            f"{', '.join(f'{n}={fields.left[n]!r}' for n in unknown)}. "
            "They may change the model, so they are not ignored; remove them if they do not"
        )
    return result


def _refuse_unsupported(config: dict[str, Any]) -> None:
    model_type, text = config["model_type"], config.get("text_config")
    if str(model_type) not in _ARCHITECTURES:  # str: a list has no hash
        reason = UNSUPPORTED_MODEL_TYPES.get(
            str(model_type), "it is none of DeepSeek's V2 or V3 architecture"
        )
        if isinstance(text, dict):
            inner = str(text.get("model_type"))
            reason = f"it wraps a text model of type {inner!r} (text_config); {_VISION}"
            if inner in UNSUPPORTED_MODEL_TYPES:
                reason += f"; and {UNSUPPORTED_MODEL_TYPES[inner]}"
        raise NotImplementedError(
            f"model_type {model_type!r} is not supported: {reason}. Supported: "
            f"{', '.join(sorted(_ARCHITECTURES))}"
        )
    for name, reason in UNSUPPORTED_FIELDS.items():
        if config.get(name) is not None:
            raise NotImplementedError(
                f"config.json field {name!r} = {config[name]!r} is not supported: {reason}"
            )


def _dense_layers(fields: _Fields, layers: int, moe: MoeConfig | None) -> int:
    first = fields.integer(
        "first_k_dense_replace", 0 if moe is None or moe.scoring_func == "softmax" else _MISSING
    )
    return layers if moe is None else min(first, layers)


def _moe_from_hf(fields: _Fields, model_type: ModelType) -> MoeConfig | None:
    v3 = model_type != "deepseek_v2"
    if v3 and "n_routed_experts" not in fields.left:  # null says that there are none
        raise ValueError("config.json has no field 'n_routed_experts', which this model type needs")
    experts = fields.integer("n_routed_experts", None)
    local = fields.left.pop("num_local_experts", None)
    if local not in (None, experts):
        raise ValueError(
            f"config.json field 'num_local_experts' = {local} contradicts n_routed_experts = "
            f"{experts}"
        )
    if experts is None:
        for name in (
            "n_shared_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        ):
            fields.left.pop(name, None)
        for name in ("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"):
            fields.left.pop(name, None)
        return None
    topk_method = fields.take("topk_method", "noaux_tc" if v3 else "greedy")
    if str(topk_method) not in GATES:
        raise NotImplementedError(
            f"config.json field 'topk_method' = {topk_method!r} is not supported; supported: "
            f"{', '.join(GATES)}"
        )
    # Hugging Face's class defaults are not the checkpoint's values: all but V2-Lite must say them.
    lite = topk_method == "greedy"
    optional = (None,) if lite else ()
    return MoeConfig(
        n_routed_experts=experts,
        n_shared_experts=fields.integer("n_shared_experts", None) or 0,
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_group=_one_if_null(fields.integer("n_group", *optional)),
        topk_group=_one_if_null(fields.integer("topk_group", *optional)),
        topk_method=topk_method,
        scoring_func=fields.take("scoring_func", GATES[topk_method]),
        norm_topk_prob=fields.boolean("norm_topk_prob", *((False,) if lite else ())),
        routed_scaling_factor=fields.number("routed_scaling_factor", *((1.0,) if lite else ())),
    )


def _one_if_null(groups: int | None) -> int:
    return 1 if groups is None else groups


def _rope_from_hf(fields: _Fields) -> RopeConfig:
    scaling, parameters = fields.table("rope_scaling"), fields.table("rope_parameters")
    theta = fields.take("rope_theta", None)
    source = dict(parameters if parameters is not None else scaling or {})
    if parameters is not None and scaling is not None and {**scaling, **source} != source:
        raise ValueError(
            f"config.json has both rope_scaling={scaling} and rope_parameters={parameters}, "
            "which disagree"
        )
    inner = _Fields(source)
    outer = 10000.0 if theta is None else theta
    theta = inner.number("rope_theta", outer)
    inner.expect("partial_rotary_factor", 1.0, 1, None)
    kind = inner.take("rope_type", None) or inner.left.get("type") or "default"
    legacy = inner.left.pop("type", kind)
    if legacy != kind or kind not in ("default", "yarn"):
        raise NotImplementedError(
            f"rope type {kind!r} (type {legacy!r}) is not supported; supported: default, yarn"
        )
    yarn = None
    if kind == "yarn":
        yarn = YarnConfig(
            factor=inner.number("factor"),
            original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
            beta_fast=inner.number("beta_fast", 32.0),
            beta_slow=inner.number("beta_slow", 1.0),
            mscale=inner.number("mscale", 0.0),
            mscale_all_dim=inner.number("mscale_all_dim", 0.0),
        )
        inner.expect("truncate", True)
        if inner.take("attention_factor", None) not in (None, yarn.attention_factor):
            raise NotImplementedError(
                "rope 'attention_factor' that differs from the one mscale implies is not supported"
            )
    if inner.left:
        raise ValueError(f"unknown rotary settings {inner.left} in config.json")
    return RopeConfig(
        rope_theta=theta, rope_interleave=fields.boolean("rope_interleave", True), yarn=yarn
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` object of a model, in the hub's spelling."""
    rope_scaling = None
    if cfg.rope.yarn is not None:
        rope_scaling = {"type": "yarn", **dataclasses.asdict(cfg.rope.yarn)}
    mla = dataclasses.asdict(cfg.mla)
    mla["mla_norm_eps"] = mla.pop("norm_eps")
    moe = {"n_routed_experts": None} if cfg.moe is None else dataclasses.asdict(cfg.moe)
    moe.pop("num_redundant_experts", None)  # of a run, not of the model
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[cfg.model_type]],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_attention_heads,
        **mla,
        **moe,
        "first_k_dense_replace": cfg.first_k_dense_replace,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": cfg.mtp.num_nextn_predict_layers,
        "rms_norm_eps": cfg.rms_norm_eps,
        "max_position_embeddings": cfg.max_position_embeddings,
        "rope_theta": cfg.rope.rope_theta,
        "rope_interleave": cfg.rope.rope_interleave,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(cfg.eos_token_id)
        if len(cfg.eos_token_id) != 1
        else cfg.eos_token_id[0],
    }
    if cfg.mtp.mtp_scheme is not None:
        out["mtp_scheme"] = cfg.mtp.mtp_scheme
    return out
