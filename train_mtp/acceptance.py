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
    documents: Sequence[Document], tokenizer: Tokenizer, *, count: int, length: int
) -> list[list[int]]:
    """Token ids of the first `length` tokens (bos included) of the first `count` documents that are
    longer than that.

    Raises:
        ValueError: no document is long enough.
    """
    encoded = (
        tokenizer.encode(d.text, bos=not d.rendered, parse_special=d.rendered) for d in documents
    )
    found = list(itertools.islice((ids[:length] for ids in encoded if len(ids) > length), count))
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
    kinds: dict[str, list[AcceptanceStats]] = {}
    for kind, rows in prompts.items():
        sampling = SamplingParams.make(
            len(rows), temperature=temperature, seed=[seed + i for i in range(len(rows))]
        )
        result = generate(
            params,
            cfg,
            rows,
            max_tokens=max_tokens,
            sampling=sampling,
            accept=rule,
            drafts=drafts,
            impl=impl,
        )
        kinds[kind] = result.per_prompt
    everything = list(itertools.chain.from_iterable(kinds.values()))
    return {**record(everything), "kinds": {kind: record(stats) for kind, stats in kinds.items()}}


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
