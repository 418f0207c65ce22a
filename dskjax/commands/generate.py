"""`dskjax generate`: continue a text, a chat or rows of ids, and say how speculation went."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dskjax.config import ModelConfig
from dskjax.decode import Generation, SamplingParams, generate
from dskjax.decode.phase import ThinkIds
from dskjax.params import Params
from dskjax.tokenizer import IncrementalDecoder, Tokenizer


def continue_text(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    ids: list[int],
    write: Callable[[str], object],
    *,
    sampling: SamplingParams,
    **options,
) -> Generation:
    """Generates from one prompt and hands text to `write` as it comes; options are those of
    `dskjax.decode.generate`. The end tokens of the model and of the tokenizer end it.
    """
    decoder = IncrementalDecoder(tokenizer)
    ends = tuple(dict.fromkeys([*cfg.eos_token_id, *tokenizer.eos_ids]))

    def stream(_: int, new: list[int]) -> None:
        write(decoder.push(*(token for token in new if token not in ends)))

    result = generate(
        params,
        dataclasses.replace(cfg, eos_token_id=ends),
        [ids],
        sampling=sampling,
        thinking=[tokenizer.is_thinking(ids)],
        think=ThinkIds(tokenizer.think_id, tokenizer.end_think_id),
        on_tokens=stream,
        **options,
    )
    write(decoder.finish())
    return result


def continue_rows(
    params: Params,
    cfg: ModelConfig,
    ids: np.ndarray,
    *,
    max_tokens: int,
    sampling: SamplingParams,
    **options,
) -> tuple[np.ndarray, Generation]:
    """Generates from ids [B, P]; returns int32 [B, max_tokens], rows padded with eos after they
    stop, and the result.

    Raises:
        ValueError: rows may stop early and the model has no eos to pad with.
    """
    result = generate(
        params, cfg, ids.tolist(), max_tokens=max_tokens, sampling=sampling, **options
    )
    if not cfg.eos_token_id and any(len(row) < max_tokens for row in result.tokens):
        raise ValueError("config.json has no eos_token_id to pad short rows with; use --ignore-eos")
    out = np.full((len(ids), max_tokens), cfg.eos_token_id[0] if cfg.eos_token_id else 0, np.int32)
    for row, tokens in zip(out, result.tokens, strict=True):
        row[: len(tokens)] = tokens
    return out, result


def summary(result: Generation, drafts: int) -> str:
    """One line on speed, and one on acceptance when there was speculation."""
    tokens = sum(map(len, result.tokens))
    lines = [
        f"{tokens} tokens in {result.decode_seconds:.2f} s after {result.prefill_seconds:.2f} s "
        "of prefill "
        f"(compilation included), {tokens / max(result.decode_seconds, 1e-9):.1f} tokens/s"
    ]
    if drafts:
        stats = result.stats
        per_position = ", ".join(f"{rate:.2f}" for rate in stats.per_position)
        lines.append(
            f"{stats.steps} steps: accepted/drafted {stats.accepted_per_drafted:.3f}, "
            f"mean accepted length {stats.mean_accepted_length:.2f}, per position {per_position}"
        )
    if result.ties:
        lines.append(
            f"{result.ties} greedy choices were near ties: "
            "another correct program may choose differently there"
        )
    return "\n".join(lines)
