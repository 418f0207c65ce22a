"""The offline loop: greedy text never changes with speculation, and everything around it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model
from dskjax.checkpoint import load_hf
from dskjax.decode import SamplingParams, generate
from dskjax.decode.generate import program
from dskjax.decode.step import DecodeConfig
from tests.decode.toy import PROMPTS, toy

full = pytest.mark.full
GOLDENS = Path(__file__).parents[1] / "goldens"
NEW = 18
SHAPES = {"max_tokens": NEW, "page_size": 5, "chunk": 8}  # shared: a shape compiles once


@functools.cache
def one_by_one(modules):
    """Greedy continuation by running the whole sequence again for every token: no cache, no MTP."""
    params, cfg = toy(modules)
    apply = jax.jit(lambda tokens: model.apply(params, tokens, cfg=cfg))
    texts = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            row = jnp.asarray([tokens + [0] * (40 - len(tokens))])
            tokens.append(int(apply(row)[0, len(tokens) - 1].argmax()))
        texts.append(tokens[len(prompt) :])
    return texts


@pytest.mark.parametrize(
    ("modules", "drafts", "rule"),
    [
        (1, 0, "strict"),
        (1, 1, "rejection"),
        (1, 3, "block"),
        (3, 2, "strict"),
        pytest.param(3, 3, "rejection", marks=full),
    ],
)
def test_greedy_text_is_that_of_the_plain_model(modules, drafts, rule):
    params, cfg = toy(modules)
    result = generate(params, cfg, PROMPTS, drafts=drafts, accept=rule, **SHAPES)
    assert result.ties == 0
    assert result.tokens == one_by_one(modules)
    assert result.stats.emitted == NEW * len(PROMPTS)
    if drafts:  # otherwise the acceptance path was not tested at all
        assert 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize(
    "name",
    [
        "v3_yarn",
        "v2lite",
        "v3_mtp",
        # Their logits are compared every time, see tests/model/test_hf_goldens.py.
        *(pytest.param(name, marks=full) for name in ("v3_plain", "v3_sharded_bf16")),
    ],
)
def test_greedy_tokens_equal_transformers(name):
    golden = np.load(GOLDENS / name / "golden.npz")
    params, cfg = load_hf(GOLDENS / name, dtype=jnp.float32)
    prompts = golden["ids"][:, : int(golden["prompt_len"])].tolist()
    count = golden["greedy"].shape[1]
    for drafts in (0, 3) if name == "v3_mtp" else (0,):
        result = generate(
            params, cfg, prompts, max_tokens=count, drafts=drafts, accept="strict", ignore_eos=True
        )
        assert result.ties == 0
        assert np.array_equal(result.tokens, golden["greedy"]), f"{drafts=}"


def test_strict_sampling_gives_the_same_text_for_every_number_of_drafts():
    params, cfg = toy(1)
    sampling = SamplingParams.make(
        3, temperature=[1.0, 0.7, 1.3], top_p=[1, 0.9, 1], seed=[1, 2, 3]
    )
    texts = [
        generate(
            params, cfg, PROMPTS, drafts=drafts, accept="strict", sampling=sampling, **SHAPES
        ).tokens
        for drafts in (0, 1, 3)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(text) for text in texts[0]}) == 3


def test_a_request_gives_the_same_text_in_any_batch():
    params, cfg = toy(1)
    options = {"drafts": 1, "accept": "rejection", **SHAPES}
    together = generate(
        params,
        cfg,
        PROMPTS,
        sampling=SamplingParams.make(3, temperature=1.0, seed=[4, 5, 6]),
        **options,
    )
    alone = generate(
        params,
        cfg,
        PROMPTS[2:],
        sampling=SamplingParams.make(1, temperature=1.0, seed=6),
        **options,
    )
    assert alone.tokens[0] == together.tokens[2]


def test_chunked_prefill_changes_nothing():
    params, cfg = toy(3)
    options = {"max_tokens": NEW, "drafts": 2, "accept": "strict", "page_size": 5}
    texts = [generate(params, cfg, PROMPTS, chunk=chunk, **options).tokens for chunk in (8, 512)]
    assert texts[0] == texts[1] == one_by_one(3)


def test_eos_inside_accepted_drafts_ends_the_text():
    params, cfg = toy(1)
    plain = one_by_one(1)
    for eos in range(cfg.vocab_size):
        with_eos = dataclasses.replace(cfg, eos_token_id=(eos,))
        result = generate(params, with_eos, PROMPTS, drafts=3, accept="strict", **SHAPES)
        for text, found, reason in zip(plain, result.tokens, result.finish_reasons, strict=True):
            stops = eos in text
            assert found == (text[: text.index(eos) + 1] if stops else text)
            assert reason == ("stop" if stops else "length")
        ignored = generate(
            params, with_eos, PROMPTS, drafts=3, accept="strict", ignore_eos=True, **SHAPES
        )
        assert ignored.tokens == plain
        if any(eos in text for text in plain):
            return
    raise AssertionError("no token of the toy's text could serve as eos")


def test_one_program_serves_every_step():
    params, cfg = toy(1)
    config = DecodeConfig.make(cfg, accept=("strict",), drafts=3)
    program.cache_clear()
    generate(params, cfg, PROMPTS, drafts=3, accept="strict", **SHAPES)
    assert program(cfg, config)._cache_size() == 2  # one for prefill chunks, one for decoding


def test_streams_tokens_in_order():
    params, cfg = toy(1)
    streamed = [[] for _ in PROMPTS]
    result = generate(
        params,
        cfg,
        PROMPTS,
        drafts=3,
        accept="strict",
        on_tokens=lambda index, new: streamed[index].extend(new),
        **SHAPES,
    )
    assert streamed == result.tokens


def test_experts_are_not_counted_unless_asked_for():
    params, cfg = toy(1)
    result = generate(params, cfg, PROMPTS, drafts=3, accept="strict", **SHAPES)
    assert result.expert_loads is result.mtp_expert_loads is None


def test_an_fp8_cache_decodes():
    params, cfg = toy(1)
    result = generate(params, cfg, PROMPTS, drafts=0, accept="strict", kv_dtype="fp8", **SHAPES)
    assert [len(text) for text in result.tokens] == [NEW] * len(PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 7]]}, "has id 7, outside 0..4"),
        ({"prompts": [[-1]]}, "has id -1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1000}, "max_position_embeddings=640"),
        ({"drafts": 4}, "num_nextn_predict_layers=3"),
        ({"drafts": -1}, "drafts=-1"),
        ({"accept": "typicl"}, "typicl"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8'"),
        ({"sampling": SamplingParams.make(2)}, "2 rows for 1 prompts"),
    ],
)
def test_bad_input_is_refused_with_its_value(change, message):
    params, cfg = toy(3)
    arguments = {"prompts": [[1, 2]], "max_tokens": 4, "drafts": 1, **change}
    with pytest.raises(ValueError, match=message):
        generate(params, cfg, arguments.pop("prompts"), **arguments)


def test_drafts_are_refused_without_modules():
    params, cfg = toy(0)
    with pytest.raises(ValueError, match="no MTP modules"):
        generate(params, cfg, [[1]], max_tokens=2, drafts=1)
