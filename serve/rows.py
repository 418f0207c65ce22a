"""From requests to the arrays that a step or an admission takes, padded to a bucket. NumPy only
until the arrays are handed over.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dskjax.decode.logits import LogitRows
from dskjax.decode.rows import DecodeRows, PrefillRows
from dskjax.decode.rules import RuleOptions, RuleRows, ThinkIds
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import Admission, RowOptions, stack_rows
from serve.buckets import Variant
from serve.plan import Chunk
from serve.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, Request

ADMIT_ROWS = 8
"""Sequences admitted by one launch; more take more launches."""


def decode_rows(
    slots: np.ndarray, page_table: np.ndarray, batch: int, columns: int, scale: Any
) -> DecodeRows:
    """Rows of the given slots, padded to `batch`; page_table is int32 [all slots, width]."""
    total = page_table.shape[0]
    padded = np.full(batch, total, np.int32)
    padded[: len(slots)] = slots
    table = np.full((batch, columns), -1, np.int32)
    table[: len(slots)] = page_table[slots, :columns]
    fields: dict[str, Any] = {"slots": padded, "page_table": table, "draft_scale": scale}
    return DecodeRows(**fields)


def prefill_rows(
    chunks: Sequence[Chunk],
    page_table: np.ndarray,
    shape: tuple[int, int],
    columns: int,
    depths: int,
    scored: bool = False,
) -> PrefillRows:
    """Prompt rows of the chunks, padded to `shape` = (sequences, tokens); scored with targets."""
    count, length = shape
    total = page_table.shape[0]
    slots = np.full(count, total, np.int32)
    table = np.full((count, columns), -1, np.int32)
    ids = np.zeros((count, length + max(depths, 1)), np.int32)
    cached, lens = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for row, (request, start, size) in enumerate(chunks):
        known = request.tokens[start : start + size + max(depths, 1)]
        ids[row, : len(known)] = known
        slots[row], cached[row], lens[row] = request.slot, start + size, size
        table[row] = page_table[request.slot, :columns]
    following = [ids[:, k + 1 : length + k + 1] for k in range(depths)] or [ids[:, :0]]
    fields: dict[str, Any] = {
        "slots": slots,
        "page_table": table,
        "token_ids": ids[:, :length],
        "following": np.stack(following, axis=-1).reshape(count, length, depths),
        "cached_lens": cached,
        "query_lens": lens,
        "targets": ids[:, 1 : length + 1] if scored else None,
    }
    return PrefillRows(**fields)


def all_ranks(parts: Sequence[Any]) -> Any:
    """Rows of all ranks, one after another.

    Args:
        parts: `DecodeRows` or `PrefillRows` of each rank, of one shape; None for all of them gives
            None.
    """
    first = parts[0]
    if first is None:
        return None
    fields = {field.name: getattr(first, field.name) for field in dataclasses.fields(first)}
    for name, value in fields.items():
        if name != "draft_scale" and value is not None:  # one draft_scale serves all ranks
            fields[name] = np.concatenate([getattr(part, name) for part in parts])
    return type(first)(**fields)


def option_row(
    request: Request, *, accept: RuleOptions, drafts: int, eos_ids: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """A request's options as NumPy values, by part of `RowOptions`.

    Args:
        request: the request.
        accept: rule of requests that name none.
        drafts: most drafts a step of requests that give none.
        eos_ids: the model's end tokens.

    Raises:
        ValueError: more stop ids than a slot holds.
    """
    s, stop = request.sampling, request.stop
    ends = () if stop.ignore_eos else eos_ids
    stops = list(dict.fromkeys((*ends, *stop.stop_token_ids)))
    if len(stops) > MAX_STOP_TOKENS:
        raise ValueError(
            f"{len(stops)} ids end the request (eos {list(ends)}, stop_token_ids "
            f"{list(stop.stop_token_ids)}): give at most {MAX_STOP_TOKENS} in all"
        )
    ids = np.full(MAX_STOP_TOKENS, -1, np.int32)
    ids[: len(stops)] = stops
    rule = request.accept if isinstance(request.accept, RuleOptions) else accept
    limit = drafts if request.drafts is None else min(request.drafts, drafts)
    return {
        "sampling": {
            "temperature": np.float32(s.temperature),
            "top_p": np.float32(s.top_p),
            "top_k": np.int32(s.top_k),
            "min_p": np.float32(s.min_p),
            "seed": np.uint32(s.seed),
        },
        "rules": rule.row(),
        "logits": LogitRows.row(
            presence=s.presence_penalty,
            frequency=s.frequency_penalty,
            repetition=s.repetition_penalty,
            logit_bias=dict(s.logit_bias),
            places=MAX_LOGIT_BIAS,
            min_length=request.prompt_len + stop.min_tokens,
            logprobs=s.logprobs is not None,
        ),
        "rest": {"stop_ids": ids, "draft_limit": np.int32(limit)},
    }


def row_options(rows: Sequence[dict[str, dict[str, Any]]], size: int) -> RowOptions:
    """`RowOptions` of `size` rows from `option_row`s; what is missing repeats the first."""

    def part(name: str, kind: type) -> Any:
        return stack_rows([row[name] for row in rows], kind, size)

    return stack_rows(
        [row["rest"] for row in rows],
        RowOptions,
        size,
        sampling=part("sampling", SamplingParams),
        rules=part("rules", RuleRows),
        logits=part("logits", LogitRows),
    )


def admission(
    requests: Sequence[Request],
    options: Sequence[dict[str, dict[str, Any]]],
    places: Sequence[int],
    *,
    total_slots: int,
    tail: int,
    think: ThinkIds,
) -> Admission:
    """The slots' state of up to `ADMIT_ROWS` requests that begin, or resume, to decode.

    Args:
        requests: the requests.
        options: an `option_row` of each.
        places: slot of each among those of all ranks; its own slot where there is one rank.
        total_slots: of all ranks.
        tail: last tokens that a slot keeps.
        think: ids of the thinking tags.
    """
    size = len(requests)
    assert 0 < size <= ADMIT_ROWS, size
    slots = np.full(ADMIT_ROWS, total_slots, np.int32)
    length, last, remaining = (np.zeros(ADMIT_ROWS, np.int32) for _ in range(3))
    tails = np.zeros((ADMIT_ROWS, tail), np.int32)
    phases = np.zeros(ADMIT_ROWS, bool)
    for row, request in enumerate(requests):
        tokens = request.tokens
        slots[row], length[row], last[row] = places[row], len(tokens) - 1, tokens[-1]
        remaining[row] = request.remaining
        newest = tokens[-tail:] if tail else []
        tails[row, tail - len(newest) :] = newest
        phases[row] = is_thinking(request, think)
    fields: dict[str, Any] = {
        "slots": slots,
        "length": length,
        "last_token": last,
        "token_tail": tails,
        "remaining": remaining,
        "thinking": phases,
    }
    return Admission(options=row_options(options, ADMIT_ROWS), **fields)


def needs(request: Request, has_default_rule: bool) -> Variant:
    """The smallest variant of the decode step that can serve a request."""
    s, stop = request.sampling, request.stop
    special = s.penalised or s.logit_bias or s.logprobs is not None or stop.min_tokens
    if special or not has_default_rule:
        return Variant.FULL
    return Variant.TRUNCATED if s.temperature and (s.top_k or s.top_p < 1) else Variant.PLAIN


def is_thinking(request: Request, think: ThinkIds) -> bool:
    """The phase after everything the request has said."""
    for token in reversed(request.tokens[request.prompt_len :]):
        if token == think.open:
            return True
        if token == think.close:
            return False
    return request.thinking


def token_counts(request: Request, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [X] times in the answer, bool [X] in the prompt), for penalties."""
    answer = request.tokens[request.prompt_len :]
    in_prompt = np.zeros(vocab, bool)
    in_prompt[request.tokens[: request.prompt_len]] = True
    return np.bincount(np.asarray(answer, np.int64), minlength=vocab).astype(np.int32), in_prompt
