"""`dskjax bench acceptance`: how many drafts each rule keeps, and what the lossy rules cost.

Prompts are continued by real speculative decoding, under every rule, at several temperatures and
numbers of drafts. Acceptance is accepted / drafted and the mean accepted length (1 + accepted
drafts a step), as `dskjax.decode.stats` defines them. The price of a lossy rule is told twice:

    bits per byte  mean -log2 of the target's own probability of the generated text, at the
                   temperature of the request, over its UTF-8 bytes. A lossless rule differs from
                   strict sampling by chance only; a lossy one is lower where it is less varied
                   than the target, higher where it says what the target would not.
    exact answers  of prompts that end inside thinking: the text after `</think>` is the answer.

Relaxed acceptance has a greedy target, so it is compared with greedy strict decoding, whose text is
scored at temperature 1. Hybrid with a lenience below 1 differs from hybrid inside thinking only.
Everything is fixed by the arguments; the draft temperature's factors c stay at 1. Tables and plot
of the result are drawn by `dskjax.commands.acceptance_tables`.
"""

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.commands.acceptance_tables import TEXT, THINKING
from dskjax.config import ModelConfig
from dskjax.decode.generate import Generation, generate
from dskjax.decode.rules import RuleOptions, ThinkIds
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.stats import AcceptanceStats
from dskjax.evaluation.intervals import bootstrap
from dskjax.evaluation.logprobs import token_logprobs
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer

RULES = tuple(
    map(
        RuleOptions.parse,
        (
            "strict",
            "rejection",
            "block",
            "typical",
            "hybrid",
            "hybrid:lenience=0.7",
            "relaxed",
        ),
    )
)
"""Rules that are compared by default."""

PUBLISHED = {"strict": 0.51, "rejection": 0.56, "typical": 0.62, "hybrid": 0.70}
"""accepted / drafted of another system with another, far larger model, by rule."""

_SCORED = 16  # texts scored at once


class _Asked(NamedTuple):
    """One row of a run."""

    temperature: float
    kind: str
    prompt: Sequence[int]
    seed: int
    answer: str | None


def load_prompts(
    path: Path, tokenizer: Tokenizer, *, count: int, length: int
) -> tuple[dict[str, list[list[int]]], dict[str, list[str]]]:
    """Reads prompts: {"text": {KIND: [TEXT, ..]}, "thinking": {KIND: [{question, answer}, ..]}}.

    Args:
        path: JSON; either part may be absent.
        tokenizer: encodes texts (bos in front), and renders questions with thinking on.
        count: most prompts a kind.
        length: texts are cut after that many tokens, bos included; shorter ones are left out.

    Returns:
        Token ids by kind, and the exact answers of the kinds that think.

    Raises:
        ValueError: no prompt is left of a kind, or questions are asked of a tokenizer whose chat
            template knows no thinking.
    """
    given = json.loads(path.read_text())
    kinds: dict[str, list[list[int]]] = {}
    answers: dict[str, list[str]] = {}
    for kind, texts in given.get("text", {}).items():
        encoded = (tokenizer.encode(text, bos=True, parse_special=False) for text in texts)
        kinds[kind] = [ids[:length] for ids in encoded if len(ids) >= length][:count]
        if not kinds[kind]:
            raise ValueError(f"{path}: no {kind!r} text has {length} tokens; use a lower length")
    if given.get("thinking") and not tokenizer.supports_thinking:
        raise ValueError(f"{path}: has thinking prompts, and the chat template knows no thinking")
    for kind, rows in given.get("thinking", {}).items():
        asked = [[{"role": "user", "content": row["question"]}] for row in rows[:count]]
        texts = [tokenizer.apply_chat_template(messages, thinking=True) for messages in asked]
        kinds[kind] = [tokenizer.encode(text) for text in texts]
        answers[kind] = [row["answer"] for row in rows[:count]]
    return kinds, answers


def report(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    kinds: Mapping[str, Sequence[Sequence[int]]],
    *,
    answers: Mapping[str, Sequence[str]] | None = None,
    rules: Sequence[RuleOptions] = RULES,
    temperatures: Sequence[float] = (0.6, 1.0),
    drafts: Sequence[int] = (1, 2, 3, 4, 5),
    max_tokens: int = 48,
    thinking_tokens: int = 96,
    max_seconds: float | None = 3000.0,
    seed: int = 0,
    impl: str = "auto",
    on_run: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Measures every rule on every kind of text.

    Args:
        params: weights with MTP modules.
        cfg: the model.
        tokenizer: of the checkpoint.
        kinds: prompts by kind of text.
        answers: exact answers, of the kinds whose prompts end inside thinking.
        rules: what to compare; `strict` is what the lossy ones are compared with.
        temperatures: of the requests, > 0; relaxed runs at 0, and then strict does so too.
        drafts: numbers of drafts a step.
        max_tokens: new tokens a prompt.
        thinking_tokens: the same for kinds with answers.
        max_seconds: no run begins after that long; None is no limit. What was left out is listed.
        seed: of the first prompt's sampling; each prompt has its own.
        impl: implementation of every op.
        on_run: told what runs next.

    Returns:
        JSON values: `rows` (one a rule, temperature, number of drafts and kind, and of all kinds
        with and without thinking), `skipped`, `published`, `settings` and `device`.

    Raises:
        ValueError: no prompts, answers that do not fit, or a temperature of 0.
    """
    answers = answers or {}
    _check(kinds, answers, temperatures)
    think = ThinkIds(tokenizer.think_id, tokenizer.end_think_id)
    begun = time.monotonic()
    rows, skipped = [], []
    groups = [
        (TEXT, {k: v for k, v in kinds.items() if k not in answers}, max_tokens),
        (THINKING, {k: v for k, v in kinds.items() if k in answers}, thinking_tokens),
    ]
    for m, rule, (group, part, new) in itertools.product(drafts, rules, groups):
        heats = _temperatures(rule, rules, temperatures, inside=group == THINKING)
        if not part or not heats:
            continue
        what = f"{rule.label}, {m} drafts, {group}"
        if max_seconds is not None and time.monotonic() - begun > max_seconds:
            skipped.append(what)
            continue
        on_run(what)
        # All kinds and temperatures in one batch, all rules in one program.
        asked = [
            _Asked(t, kind, ids, seed + i, answers[kind][i] if kind in answers else None)
            for t in heats
            for kind in part
            for i, ids in enumerate(part[kind])
        ]
        result = generate(
            params,
            cfg,
            [one.prompt for one in asked],
            max_tokens=new,
            sampling=SamplingParams.make(
                len(asked),
                temperature=[one.temperature for one in asked],
                seed=[one.seed for one in asked],
            ),
            accept=rule,
            rules=tuple(dict.fromkeys(one.name for one in rules)),
            drafts=m,
            thinking=[group == THINKING] * len(asked),
            think=think,
            impl=impl,
        )
        bits = score(
            params,
            [one.prompt for one in asked],
            result.tokens,
            [one.temperature or 1.0 for one in asked],
            cfg=cfg,
        )
        for t in heats:
            for kind in [*part, group]:
                head = {"rule": rule.label, "lossless": rule.lossless, "temperature": t}
                mine = [
                    n
                    for n, one in enumerate(asked)
                    if one.temperature == t and kind in (one.kind, group)
                ]
                figures = _figures(asked, result, bits, mine, tokenizer)
                rows.append({**head, "drafts": m, "kind": kind, **figures})
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "settings": {
            "temperatures": list(temperatures),
            "drafts": list(drafts),
            "max_tokens": max_tokens,
            "thinking_tokens": thinking_tokens,
            "seed": seed,
            "rules": [rule.to_dict() for rule in rules],
            "prompts": {kind: len(prompts) for kind, prompts in kinds.items()},
        },
        "published": PUBLISHED,
        "rows": rows,
        "skipped": skipped,
    }


def joined(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reports of different numbers of drafts as one.

    Raises:
        ValueError: none given, or they differ in more than their drafts.
    """
    if not results:
        raise ValueError("no reports to join: give at least one")
    first = results[0]
    for other in results[1:]:
        ours, theirs = ({**r["settings"], "drafts": 0} for r in (first, other))
        if ours != theirs or first["device"] != other["device"]:
            raise ValueError("reports differ in device or settings, not just in drafts")
    drafts = sorted({m for r in results for m in r["settings"]["drafts"]})
    return {
        **first,
        "settings": {**first["settings"], "drafts": drafts},
        "rows": sorted((row for r in results for row in r["rows"]), key=lambda row: row["drafts"]),
        "skipped": [what for r in results for what in r["skipped"]],
    }


def score(
    params: Params,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    cfg: ModelConfig,
) -> list[float]:
    """-log2 of the probability of each text after its prompt, under softmax(logits / temperature).

    Args:
        params: the model's weights.
        prompts: token ids, at least one each.
        texts: new token ids; may be empty.
        temperatures: > 0, one a text.
        cfg: the model.
    """
    longest = max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True))
    longest = -(-longest // 64) * 64
    bits = []
    for chunk in itertools.batched(zip(prompts, texts, temperatures, strict=True), _SCORED):
        ids = np.zeros((_SCORED, longest), np.int32)
        heats = np.ones(_SCORED, np.float32)
        for row, (prompt, text, temperature) in enumerate(chunk):
            ids[row, : len(prompt) + len(text)] = [*prompt, *text]
            heats[row] = temperature
        logp = np.asarray(_logprobs(params, jnp.asarray(ids), jnp.asarray(heats), cfg=cfg))
        for row, (prompt, text, _) in enumerate(chunk):
            first = len(prompt) - 1
            bits.append(-float(logp[row, first : first + len(text)].sum()) / np.log(2))
    return bits


@functools.partial(jax.jit, static_argnames="cfg")
def _logprobs(
    params: Params, ids: jax.Array, temperature: jax.Array, *, cfg: ModelConfig
) -> jax.Array:
    return token_logprobs(params, ids, cfg=cfg, temperature=temperature)


def is_right(tokens: Sequence[int], answer: str, tokenizer: Tokenizer) -> bool:
    """Whether a text that began inside thinking ends it, and what follows is exactly `answer`."""
    ids = list(tokens)
    if tokenizer.end_think_id not in ids:
        return False
    said = ids[ids.index(tokenizer.end_think_id) + 1 :]
    return tokenizer.decode(said, skip_special=True).strip() == answer.strip()


def _check(
    kinds: Mapping[str, Sequence[Sequence[int]]],
    answers: Mapping[str, Sequence[str]],
    temperatures: Sequence[float],
) -> None:
    if not kinds or not all(kinds.values()):
        raise ValueError(f"no prompts of some kind in {sorted(kinds)}: give at least one of each")
    for kind, exact in answers.items():
        if len(exact) != len(kinds.get(kind, ())):
            raise ValueError(
                f"{len(exact)} answers of kind {kind!r} for {len(kinds.get(kind, ()))} prompts: "
                "give one a prompt"
            )
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"{temperatures=} must be above 0: greedy decoding is that of relaxed")


def _temperatures(
    rule: RuleOptions, rules: Sequence[RuleOptions], temperatures: Sequence[float], *, inside: bool
) -> list[float]:
    """At which temperatures a rule is run on prompts inside thinking, or on the others."""
    if rule.name == "relaxed":
        return [0.0] if inside else []
    if rule.lenience < 1 and not inside:
        return []
    greedy = rule.name == "strict" and inside and any(r.name == "relaxed" for r in rules)
    return [*temperatures, 0.0] if greedy else list(temperatures)


def _figures(
    asked: Sequence[_Asked],
    result: Generation,
    bits: Sequence[float],
    mine: Sequence[int],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The figures of the prompts `mine`, as JSON values."""
    total = AcceptanceStats()
    for n in mine:
        total.merge(result.per_prompt[n])
    accepted = np.array([result.per_prompt[n].accepted for n in mine])
    drafted = np.array([result.per_prompt[n].drafted for n in mine])
    length_of = tokenizer.token_lengths()
    sizes = np.array([length_of[result.tokens[n]].sum() for n in mine])
    spent = np.array([bits[n] for n in mine])
    rights = [
        is_right(result.tokens[n], answer, tokenizer)
        for n in mine
        if (answer := asked[n].answer) is not None
    ]
    figures = {
        "accepted_per_drafted": total.accepted_per_drafted,
        "ci95": bootstrap(accepted, drafted),
        "mean_accepted_length": total.mean_accepted_length,
        "per_position": _plain(total.per_position),
        "conditional": _plain(total.conditional),
        "bits_per_byte": float(spent.sum() / max(sizes.sum(), 1)),
        "bits_ci95": bootstrap(spent, sizes),
        "prompts": len(mine),
        "steps": total.steps,
        "tokens": total.emitted,
    }
    if rights:
        exact = np.array(rights, np.int64)
        figures["exact"] = float(exact.mean())
        figures["exact_ci95"] = bootstrap(exact, np.ones_like(exact))
    return figures


def _plain(rates: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN: the rate of an empty count is null."""
    return [None if math.isnan(rate) else rate for rate in rates]
