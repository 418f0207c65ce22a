"""A few slots and the jitted step, driven by hand: which slots decode, which get prompt rows."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.cache import init_cache
from dskjax.decode.generate import program
from dskjax.decode.logits import LogitRows
from dskjax.decode.rows import DecodeRows, PrefillRows, StepOutput
from dskjax.decode.rules import RuleOptions, RuleRows
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import (
    Admission,
    RowOptions,
    Slots,
    admit,
    init_slots,
    set_said,
    stack_rows,
)
from dskjax.decode.step import DecodeConfig
from tests.decode.plain import Ask
from tests.decode.toy import toy

SLOTS, ROWS, PAGE, COLUMNS, PREFILLS, CHUNK, K = 4, 3, 4, 16, 2, 8, 3
"""Slots; decoding rows a step; tokens a page and pages a slot; prompt rows a step; drafts."""
RULES = ("strict", "rejection")

_admit, _set_said = jax.jit(admit), jax.jit(set_said)


def logit_rows(asks: Sequence[Ask]) -> LogitRows:
    rows = [
        LogitRows.row(
            presence=ask.presence,
            frequency=ask.frequency,
            repetition=ask.repetition,
            logit_bias=ask.bias,
            places=4,
            min_length=len(ask.prompt) + ask.min_tokens,
            logprobs=ask.logprobs,
        )
        for ask in asks
    ]
    return stack_rows(rows, LogitRows, len(rows))


def option_rows(asks: Sequence[Ask], limits: Sequence[int], rules: Sequence[str]) -> RowOptions:
    sampling = [
        {
            "temperature": np.float32(ask.temperature),
            "top_p": np.float32(ask.top_p),
            "top_k": np.int32(ask.top_k),
            "min_p": np.float32(ask.min_p),
            "seed": np.uint32(ask.seed),
        }
        for ask in asks
    ]
    stops = [(*ask.stop_ids, *(-1,) * (2 - len(ask.stop_ids))) for ask in asks]
    size = len(asks)
    return RowOptions(
        sampling=stack_rows(sampling, SamplingParams, size),
        rules=stack_rows([RuleOptions.parse(rule).row() for rule in rules], RuleRows, size),
        logits=logit_rows(asks),
        stop_ids=np.array(stops, np.int32),
        draft_limit=np.array(limits, np.int32),
    )


@functools.cache
def _fresh(modules: int) -> tuple[Any, DecodeConfig, Slots]:
    params, cfg = toy(modules)
    config = DecodeConfig.make(cfg, accept=RULES, drafts=K)
    cache = init_cache(
        cfg, num_pages=SLOTS * COLUMNS, page_size=PAGE, dtype=jnp.float32, kv_dtype="auto"
    )
    options = option_rows([Ask(prompt=(0,))] * SLOTS, [K] * SLOTS, ["strict"] * SLOTS)
    state = init_slots(
        cache, jax.tree.map(jnp.asarray, options), cfg=cfg, spec=config.spec, dtype=jnp.float32
    )
    return program(cfg, config), config, state


class Bench:
    """Slots of the toy model. `state` is donated and replaced by every call.

    Attributes:
        asks: what each taken slot was asked.
        texts: new tokens of each.
        outputs: of the last step, NumPy.
    """

    def __init__(self, modules: int = 3):
        self.params, self.cfg = toy(modules)
        self.step_program, self.config, fresh = _fresh(modules)
        self.state = jax.tree.map(jnp.copy, fresh)
        self.asks: dict[int, Ask] = {}
        self.texts: dict[int, list[int]] = {}
        self.page_table = np.arange(SLOTS * COLUMNS, dtype=np.int32).reshape(SLOTS, COLUMNS)

    @property
    def snapshot(self) -> Slots:
        """A copy of the state as NumPy arrays."""
        return jax.tree.map(np.array, self.state)

    def admit(
        self, slot: int, ask: Ask, *, drafts: int = K, rule: str = "strict", prefill: bool = True
    ) -> None:
        """Puts a request into a slot, and all its prompt rows into the cache."""
        tail, tokens = self.config.spec.tail, list(ask.prompt)
        newest = tokens[-tail:] if tail else []
        fields: dict[str, Any] = {
            "slots": np.array([slot, SLOTS], np.int32),  # and a row of padding
            "length": np.array([len(tokens) - 1] * 2, np.int32),
            "last_token": np.array([tokens[-1]] * 2, np.int32),
            "token_tail": np.array([[0] * (tail - len(newest)) + newest] * 2, np.int32),
            "remaining": np.array([ask.max_tokens] * 2, np.int32),
            "thinking": np.zeros(2, bool),
        }
        options = option_rows([ask] * 2, [drafts] * 2, [rule] * 2)
        self.state = _admit(self.state, Admission(options=options, **fields))
        counts, in_prompt = np.zeros(self.cfg.vocab_size, np.int32), np.zeros(5, bool)
        in_prompt[tokens] = True
        self.state = _set_said(self.state, np.int32(slot), counts, in_prompt)
        self.asks[slot], self.texts[slot] = ask, []
        if prefill:
            for start in range(0, len(tokens) - 1, CHUNK):
                self.step([], {slot: (start, min(CHUNK, len(tokens) - 1 - start))})

    def decode_rows(self, slots: Sequence[int]) -> DecodeRows:
        table = np.full((ROWS, COLUMNS), -1, np.int32)
        table[: len(slots)] = self.page_table[list(slots)]
        return DecodeRows(
            slots=np.array([*slots, *[SLOTS] * (ROWS - len(slots))], np.int32),
            page_table=table,
            draft_scale=np.ones(K, np.float32),
        )

    def prefill_rows(
        self, chunks: Mapping[int, tuple[int, int]], *, garbage: int = 0
    ) -> PrefillRows:
        """Rows [start, start + length) of each slot's prompt; padding holds `garbage`."""
        depths = self.config.spec.depths
        ids = np.full((PREFILLS, CHUNK + depths), garbage, np.int32)
        table = np.full((PREFILLS, COLUMNS), -1, np.int32)
        slots, (cached, lens) = (
            np.full(PREFILLS, SLOTS, np.int32),
            np.zeros((2, PREFILLS), np.int32),
        )
        for row, (slot, (start, length)) in enumerate(chunks.items()):
            known = list(self.asks[slot].prompt[start : start + length + depths])
            ids[row, : len(known)] = known
            table[row], slots[row] = self.page_table[slot], slot
            cached[row], lens[row] = start + length, length
        following = [ids[:, k + 1 : CHUNK + k + 1] for k in range(depths)]
        return PrefillRows(
            slots=slots,
            page_table=table,
            token_ids=ids[:, :CHUNK],
            following=np.stack(following, axis=-1),
            cached_lens=cached,
            query_lens=lens,
        )

    def run(self, decode: DecodeRows | None, prefill: PrefillRows | None) -> StepOutput | None:
        """One call of the jitted step."""
        self.state, output = self.step_program(self.params, self.state, decode, prefill)
        return jax.tree.map(np.asarray, output)

    def step(
        self, slots: Sequence[int], chunks: Mapping[int, tuple[int, int]] | None = None
    ) -> StepOutput | None:
        """Decodes slots and puts prompt rows into the cache; collects the slots' texts."""
        output = self.run(
            self.decode_rows(slots) if slots else None,
            self.prefill_rows(chunks) if chunks else None,
        )
        for row, slot in enumerate(slots):
            self.texts[slot] += output.tokens[row, : output.count[row]].tolist()
        return output

    def finish(self, slots: Sequence[int]) -> list[StepOutput]:
        """Steps until all of the slots have ended."""
        outputs = []
        while not np.asarray(self.state.done)[list(slots)].all():
            outputs.append(self.step(slots))
            assert len(outputs) < 100
        return outputs
