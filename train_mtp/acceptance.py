"""Acceptance of a model's drafts on held-out text, by real speculative decoding.

Prompts are the first tokens of held-out documents; the model continues each of them with MTP
speculation, and every verified draft is counted. Documents, prompts and seeds are fixed by the
arguments, so two checkpoints are compared on the same prompts.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dskjax.config import ModelConfig
from dskjax.decode import AcceptanceStats, RuleOptions, SamplingParams, generate
from dskjax.documents import Document
from dskjax.evaluation.intervals import bootstrap
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer


def prompts_of(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    count: int,
    length: int,
    stride: int | None = None,
) -> list[list[int]]:
    """Prompts of `length` tokens from held-out documents.

    Args:
        documents: those longer than a prompt are used, in order.
        tokenizer: of the model.
        count: most prompts.
        length: tokens of each, bos included.
        stride: also take prompts from within documents, one every `stride` tokens: the first of
            every document, then the second of every document, and so on. None takes the first only.

    Raises:
        ValueError: no document is long enough.
    """
    encoded = (
        tokenizer.encode(d.text, bos=not d.rendered, parse_special=d.rendered) for d in documents
    )
    long = (ids for ids in encoded if len(ids) > length)
    if stride is None:
        found = [ids[:length] for ids in itertools.islice(long, count)]
    else:
        cut = [
            [ids[at : at + length] for at in range(0, len(ids) - length, stride)] for ids in long
        ]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*cut))
        found = list(itertools.islice((ids for ids in turns if ids is not None), count))
    if not found:
        raise ValueError(
            f"none of {len(documents)} documents has more than {length} tokens; use shorter prompts"
        )
    return found


def measure(
    params: Params,
    cfg: ModelConfig,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    drafts: int,
    temperature: float,
    rule: RuleOptions | str,
    max_tokens: int,
    seed: int = 0,
    impl: str = "auto",
) -> dict[str, Any]:
    """Decodes every prompt with speculation and counts.

    Args:
        params: weights.
        cfg: the model.
        prompts: token ids by kind of text.
        drafts: tokens drafted a step.
        temperature: of target and drafts.
        rule: acceptance rule.
        max_tokens: new tokens per prompt.
        seed: of the sampling.
        impl: implementation of every op.

    Returns:
        `kinds`, one record per kind, and the record of all kinds together beside it. A record has
        `accepted_per_drafted`, its `ci95` (bootstrap over prompts), `mean_accepted_length` (1 +
        accepted drafts per step), `per_position` (P(at least i drafts accepted)), `conditional`,
        `prompts`, `steps` and `tokens`.
    """
    kinds = decode(
        params,
        cfg,
        prompts,
        drafts=drafts,
        temperature=temperature,
        rule=rule,
        max_tokens=max_tokens,
        seed=seed,
        impl=impl,
    )
    everything = list(itertools.chain.from_iterable(kinds.values()))
    return {**record(everything), "kinds": {kind: record(stats) for kind, stats in kinds.items()}}


def decode(
    params: Params,
    cfg: ModelConfig,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    drafts: int,
    temperature: float,
    rule: RuleOptions | str,
    max_tokens: int,
    seed: int = 0,
    impl: str = "auto",
) -> dict[str, list[AcceptanceStats]]:
    """Counts of each prompt by kind; all prompts are decoded as one batch. See `measure`."""
    rows = list(itertools.chain.from_iterable(prompts.values()))
    seeds = [seed + i for of_kind in prompts.values() for i in range(len(of_kind))]
    result = generate(
        params,
        cfg,
        rows,
        max_tokens=max_tokens,
        sampling=SamplingParams.make(len(rows), temperature=temperature, seed=seeds),
        accept=rule,
        drafts=drafts,
        impl=impl,
    )
    stats = iter(result.per_prompt)
    return {kind: list(itertools.islice(stats, len(rows))) for kind, rows in prompts.items()}


def record(stats: Sequence[AcceptanceStats]) -> dict[str, Any]:
    """The figures of several prompts as plain JSON values."""
    total = AcceptanceStats()
    for one in stats:
        total.merge(one)
    accepted, drafted = (
        np.array([getattr(one, name) for one in stats]) for name in ("accepted", "drafted")
    )
    return {
        "accepted_per_drafted": total.accepted_per_drafted,
        "ci95": bootstrap(accepted, drafted),
        "mean_accepted_length": total.mean_accepted_length,
        "per_position": total.per_position,
        "conditional": total.conditional,
        "prompts": len(stats),
        "steps": total.steps,
        "tokens": total.emitted,
    }
