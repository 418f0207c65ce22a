"""`ModelConfig`: both spellings of Hugging Face, round trips, and refusals that name the field."""

import dataclasses
import json

import pytest

from dskjax import presets
from dskjax.config import MlaConfig, ModelConfig, MoeConfig, MtpConfig, RopeConfig, YarnConfig
from dskjax.config_hf import IGNORED_FIELDS
from tests.model.hub import HUB, HUB_KIMI, HUB_V2, HUB_V3


def transformers_5(hub):
    """The spelling transformers 5 saves: one `rope_parameters`, defaults written out."""
    out = {k: v for k, v in hub.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    rope = {k: v for k, v in hub.get("rope_scaling", {}).items() if k != "type"}
    rope["rope_type"] = "yarn" if rope else "default"
    out["rope_parameters"] = rope | {"rope_theta": hub["rope_theta"]}
    more = {"dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "rope_interleave": True}
    return out | more | {"pad_token_id": None, "output_attentions": False}


@pytest.mark.parametrize("name", HUB)
def test_both_spellings_give_the_preset(name):
    assert ModelConfig.from_hf(HUB[name]) == presets.preset(name)
    assert ModelConfig.from_hf(transformers_5(HUB[name])) == presets.preset(name)


@pytest.mark.parametrize("name", HUB)
def test_what_is_written_says_what_was_read(name):
    """Every field that is written has the published value; what is left out changes nothing."""
    written = presets.preset(name).to_hf()
    published = HUB[name] | {"num_nextn_predict_layers": HUB[name]["num_nextn_predict_layers"] or 0}
    own = {"mla_norm_eps", "rope_interleave"}
    assert {k: published.get(k) for k in written.keys() - own} == {
        k: v for k, v in written.items() if k not in own
    }


def test_reading_leaves_the_input_alone():
    before = json.dumps(HUB_V3)
    ModelConfig.from_hf(HUB_V3)
    assert json.dumps(HUB_V3) == before


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_round_trip_through_json(name):
    cfg = presets.preset(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


def test_unusual_values_round_trip():
    cfg = dataclasses.replace(
        presets.tiny_v3(),
        mtp=MtpConfig(num_nextn_predict_layers=3, mtp_scheme="chain"),
        mla=dataclasses.replace(presets.tiny_v3().mla, q_lora_rank=None, norm_eps=1e-5),
        rope=RopeConfig(rope_theta=50000.0, rope_interleave=False),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=(1, 7),
    )
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    dense = dataclasses.replace(
        cfg, moe=None, mtp=MtpConfig(), first_k_dense_replace=4, eos_token_id=()
    )
    assert ModelConfig.from_hf(dense.to_hf()) == dense


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'v4'.*deepseek-v3, .*tiny-v2lite"):
        presets.preset("v4")


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"sliding_window": 128}, ValueError, "sliding_window=128"),
        ({"model_type": "deepseek_v32"}, NotImplementedError, "V3.2.*indexer"),
        ({"model_type": "deepseek_v4"}, NotImplementedError, "V4"),
        ({"index_topk": 2048}, NotImplementedError, "index_topk.*2048.*V3.2.*indexer"),
        ({"compress_ratios": [4], "index_topk": 8}, NotImplementedError, "compress_ratios.*V4"),
        ({"model_type": "kimi_k25"}, NotImplementedError, "'kimi_k25'.*vision"),
        ({"model_type": "kimi_linear"}, NotImplementedError, "linear attention"),
        ({"model_type": "llama"}, NotImplementedError, "'llama'.*deepseek_v2.*v3, kimi_k2"),
        ({"model_type": ["deepseek_v3"]}, NotImplementedError, "not supported"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act.*gelu"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias"),
        ({"moe_layer_freq": 2}, NotImplementedError, "moe_layer_freq"),
        ({"pruned_heads": {"0": [1]}}, NotImplementedError, "pruned_heads"),
        ({"mtp_hidden_states_first": True}, NotImplementedError, "mtp_hidden_states_first"),
        ({"num_key_value_heads": 8}, NotImplementedError, "num_key_value_heads=8"),
        ({"topk_method": "hash"}, NotImplementedError, "'hash'.*group_limited_greedy"),
        ({"topk_method": ["greedy"]}, NotImplementedError, "topk_method"),
        ({"topk_method": "group_limited_greedy"}, ValueError, "scoring_func='sigmoid'.*noaux_tc"),
        ({"scoring_func": "softmax"}, ValueError, "scoring_func='softmax'"),
        ({"head_dim": 100}, ValueError, "head_dim.*100"),
        ({"qk_head_dim": 191}, ValueError, "qk_head_dim.*191"),
        ({"num_local_experts": 8}, ValueError, "num_local_experts"),
        ({"vocab_size": "big"}, ValueError, "vocab_size.*'big'"),
        ({"vocab_size": 0}, ValueError, "vocab_size=0"),
        ({"hidden_size": True}, ValueError, "hidden_size.*True"),
        ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps"),
        ({"norm_topk_prob": 1}, ValueError, "norm_topk_prob"),
        ({"n_group": 7}, ValueError, "n_group=7"),
        ({"topk_group": 9}, ValueError, "topk_group=9"),
        ({"num_experts_per_tok": 200}, ValueError, "200.*128 experts"),
        ({"n_group": 256, "topk_group": 256}, ValueError, "fewer than 2 experts"),
        ({"qk_rope_head_dim": 63}, ValueError, "qk_rope_head_dim=63"),
        ({"mtp_scheme": "eagle"}, (ValueError, TypeError), "'eagle'"),
        ({"num_nextn_predict_layers": 2, "mtp_scheme": "recycled"}, ValueError, "recycled"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, NotImplementedError, "linear"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ValueError, "disagree"),
        ({"rope_theta": -1}, ValueError, "rope_theta"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_refusals_name_the_field(changes, error, match):
    with pytest.raises(error, match=match):
        ModelConfig.from_hf(HUB_V3 | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=true.*'group_limited_greedy'"),
        ({"topk_group": 0}, "topk_group=0"),
        ({"num_experts_per_tok": 61}, "61 exceeds the 60 experts that 3 groups"),
        ({"n_group": None}, "'n_group'"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ],
)
def test_refusals_of_the_group_limited_gate(changes, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(HUB_V2 | changes)


@pytest.mark.parametrize("field", ["n_group", "topk_group", "routed_scaling_factor"])
def test_the_group_limited_gate_needs_its_fields(field):
    with pytest.raises(ValueError, match=f"'{field}'"):
        ModelConfig.from_hf({k: v for k, v in HUB_V2.items() if k != field})


@pytest.mark.parametrize(
    ("inner", "match"),
    [
        ("kimi_k2", "'kimi_k25'.*wraps a text model of type 'kimi_k2'.*vision"),
        ("deepseek_v32", "'deepseek_v32'.*vision.*V3.2.*indexer"),
    ],
)
def test_wrapped_models_are_named_with_what_they_wrap(inner, match):
    config = {"model_type": "kimi_k25", "text_config": HUB_KIMI | {"model_type": inner}}
    with pytest.raises(NotImplementedError, match=match):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("field", ["factor", "original_max_position_embeddings"])
def test_yarn_needs_its_fields(field):
    scaling = {k: v for k, v in HUB_V3["rope_scaling"].items() if k != field}
    with pytest.raises(ValueError, match=field):
        ModelConfig.from_hf(HUB_V3 | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("extra", "error"),
    [({"rope_speed": 2}, ValueError), ({"attention_factor": 1.2}, NotImplementedError)],
)
def test_unknown_rotary_settings_are_refused(extra, error):
    with pytest.raises(error, match=next(iter(extra))):
        ModelConfig.from_hf(HUB_V3 | {"rope_scaling": HUB_V3["rope_scaling"] | extra})


# Hugging Face's class defaults are not the checkpoint's values: absence is an error.
@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "vocab_size",
        "kv_lora_rank",
        "n_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "max_position_embeddings",
        "moe_intermediate_size",
    ],
)
def test_missing_fields_are_named(field):
    with pytest.raises(ValueError, match=f"'{field}'"):
        ModelConfig.from_hf({k: v for k, v in HUB_V3.items() if k != field})


def test_every_ignored_field_really_is():
    extra = dict.fromkeys(IGNORED_FIELDS, "anything")
    assert ModelConfig.from_hf(extra | HUB_V3 | {"_name": 1}) == presets.deepseek_v3()


def test_defaults_that_transformers_4_writes_out_are_ignored():
    """As in some Kimi-K2 files; heads that were pruned would matter."""
    extra = {"num_beams": 1, "prefix": None, "temperature": 1.0, "pruned_heads": {}}
    assert ModelConfig.from_hf(HUB_KIMI | extra) == presets.kimi_k2()


@pytest.mark.parametrize("first", [0, 3, 61, 99])
def test_first_k_dense_replace_may_exceed_the_layers(first):
    cfg = ModelConfig.from_hf(HUB_V3 | {"first_k_dense_replace": first})
    assert cfg.num_dense_layers == min(first, 61) and cfg.num_moe_layers == 61 - min(first, 61)


# ------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        (MlaConfig, {"kv_lora_rank": 0}, "kv_lora_rank=0"),
        (MlaConfig, {"q_lora_rank": -1}, "q_lora_rank=-1"),
        (MoeConfig, {"n_shared_experts": -1}, "n_shared_experts"),
        (MoeConfig, {"topk_method": "greedy", "scoring_func": "softmax"}, "norm_topk_prob"),
        (YarnConfig, {"factor": 0.5}, "factor"),
        (YarnConfig, {"original_max_position_embeddings": 0}, "original_max"),
        (RopeConfig, {"rope_theta": 0.0}, "rope_theta"),
        (MtpConfig, {"num_nextn_predict_layers": -1}, "num_nextn"),
    ],
)
def test_parts_are_validated_at_birth(part, changes, match):
    tiny = presets.tiny_v3()
    default = {MlaConfig: tiny.mla, MoeConfig: tiny.moe, YarnConfig: tiny.rope.yarn}.get(part)
    with pytest.raises(ValueError, match=match):
        part(**(dataclasses.asdict(default) if default else {}) | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"first_k_dense_replace": 5}, "first_k_dense_replace"),
        ({"moe": None}, "every layer is dense"),
        ({"moe": None, "first_k_dense_replace": 4}, "MTP"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_models_are_validated_at_birth(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(presets.tiny_v3(), **changes)


@pytest.mark.parametrize(
    ("modules", "given", "scheme", "drafts"),
    [
        (0, None, "chain", 0),
        (1, None, "recycled", None),
        (3, None, "chain", 3),
        (1, "chain", "chain", 1),
        (0, "recycled", "recycled", 0),
    ],
)
def test_drafting_scheme(modules, given, scheme, drafts):
    mtp = MtpConfig(num_nextn_predict_layers=modules, mtp_scheme=given)
    assert (mtp.scheme, mtp.max_drafts) == (scheme, drafts)


def test_cache_layers_follow_the_trunk():
    assert presets.deepseek_v3().num_cache_layers == 62
    assert presets.deepseek_v2_lite().num_cache_layers == 27
