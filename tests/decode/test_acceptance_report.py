"""The acceptance report: what runs, what is counted, and how a text is scored."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.commands import acceptance
from dskjax.commands.acceptance_tables import TEXT, THINKING, markdown, plot
from dskjax.decode.generate import Generation
from dskjax.decode.rules import RuleOptions
from dskjax.decode.stats import AcceptanceStats
from dskjax.model import apply
from dskjax.tokenizer import Tokenizer
from tests.decode.toy import PROMPTS, toy

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek"
RULES = [RuleOptions.parse(text) for text in ("strict", "hybrid:lenience=0.5", "relaxed")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EXAMPLE)


def measure(tokenizer, **options):
    params, cfg = toy(1)
    kinds = {"prose": [list(PROMPTS[0]), list(PROMPTS[2])], "sums": [list(PROMPTS[2])]}
    options = {"answers": {"sums": ["2"]}, "temperatures": (0.8,), "drafts": (2,)} | options
    return acceptance.report(
        params, cfg, tokenizer, kinds, rules=RULES, max_tokens=6, thinking_tokens=5, **options
    )


def fake_generate(params, cfg, prompts, *, max_tokens, sampling, accept, drafts, **options):
    """Every prompt says the ids 3, 4, 3, ..; in two of its steps the first of two drafts stays."""
    stats = [AcceptanceStats() for _ in prompts]
    for one in stats:
        one.update([1, 2, 2], drafted=[0, drafts, drafts])
        one.update([1] * (max_tokens - 5), drafted=0)
    return Generation(
        tokens=[[3 + n % 2 for n in range(max_tokens)] for _ in prompts],
        finish_reasons=["length"] * len(prompts),
        per_prompt=stats,
        ties=0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
    )


def test_report(tokenizer, tmp_path, monkeypatch):
    """Which rule runs where, and what becomes of the counts; decoding itself is made up."""
    monkeypatch.setattr(acceptance, "generate", fake_generate)
    said = []
    result = measure(tokenizer, on_run=said.append)
    ran = {(row["rule"], row["temperature"], row["kind"]) for row in result["rows"]}
    strict, hybrid, relaxed = (rule.label for rule in RULES)
    texts = {(strict, 0.8, kind) for kind in ("prose", TEXT)}
    inside = {
        (rule, t, kind)
        for rule, t in ((strict, 0.8), (strict, 0.0), (hybrid, 0.8), (relaxed, 0.0))
        for kind in ("sums", THINKING)
    }
    assert ran == texts | inside and not result["skipped"] and len(said) == 4
    for row in result["rows"]:
        thinks = row["kind"] in ("sums", THINKING)
        assert row["prompts"] == (1 if thinks else 2)
        assert row["tokens"] == row["prompts"] * (5 if thinks else 6)
        assert row["accepted_per_drafted"] == 0.5 and row["ci95"] == [0.5, 0.5]
        assert row["per_position"] == [1.0, 0.0] and row["conditional"] == [1.0, 0.0]
        assert row["mean_accepted_length"] == 2.0
        assert row["bits_per_byte"] > 0 and ("exact" in row) == thinks
    assert result == json.loads(json.dumps(result))

    text = markdown(result)
    assert "| relaxed | no | 0.500 (2.00) |  |" in text and "### all text, T = 0.8" in text
    assert f"| {strict} | yes | 0.500 (2.00) | 0.51 |" in text
    assert plot(result, tmp_path / "figures" / "acceptance.png").stat().st_size > 1000


def test_report_decodes(tokenizer):
    """Once with the real loop: greedy relaxed decoding inside thinking."""
    params, cfg = toy(1)
    prompts = {"sums": [list(PROMPTS[2])]}
    result = acceptance.report(
        params,
        cfg,
        tokenizer,
        prompts,
        answers={"sums": ["2"]},
        rules=RULES[2:],
        drafts=(2,),
        thinking_tokens=5,
    )
    row = result["rows"][0]
    assert row["kind"] == "sums" and row["tokens"] == 5 and row["exact"] == 0.0
    assert row["steps"] < 5 and row["accepted_per_drafted"] > 0


def test_a_spent_budget_is_told(tokenizer):
    result = measure(tokenizer, max_seconds=-1.0)
    assert not result["rows"] and len(result["skipped"]) == 4
    assert "strict, 2 drafts, all text" in markdown(result)


def test_score_is_the_targets_own_probability():
    params, cfg = toy(1)
    prompts, texts = [[1, 2, 3], [2]], [[4, 0, 1], []]
    got = acceptance.score(params, prompts, texts, [0.7, 1.0], cfg=cfg)
    logits = np.asarray(apply(params, jnp.asarray([prompts[0] + texts[0]]), cfg=cfg))[0] / 0.7
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -sum(logp[2 + i, token] for i, token in enumerate(texts[0])) / np.log(2)
    assert got == pytest.approx([want, 0.0], rel=1e-5)


def test_exact_answers(tokenizer):
    def right(text, answer="12"):
        return acceptance.is_right(tokenizer.encode(text), answer, tokenizer)

    end = tokenizer.decode([tokenizer.eos_ids[0]])
    assert right(f"3 * 4 = 12.</think>12{end}") and right("</think> 12\n")
    assert not right("3 * 4 = 12") and not right("</think>12.") and not right("12</think>13")


def test_prompts_file(tokenizer, tmp_path):
    path = tmp_path / "prompts.json"
    asked = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    given = {"text": {"code": ["import os\n" * 9, "x"]}, "thinking": {"sums": asked}}
    path.write_text(json.dumps(given))
    kinds, answers = acceptance.load_prompts(path, tokenizer, count=1, length=8)
    assert answers == {"sums": ["2"]} and len(kinds["sums"]) == 1
    assert kinds["sums"][0][-1] == tokenizer.think_id
    assert len(kinds["code"]) == 1 and len(kinds["code"][0]) == 8
    with pytest.raises(ValueError, match="no 'code' text has 500 tokens"):
        acceptance.load_prompts(path, tokenizer, count=1, length=500)


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="2 answers of kind 'sums' for 1 prompts"):
        measure(tokenizer, answers={"sums": ["1", "2"]})
    with pytest.raises(ValueError, match="above 0"):
        measure(tokenizer, temperatures=(0.0,))
