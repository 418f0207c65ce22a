"""The device side of an engine: launches planned steps and reads their results one step later.

A launch hands small int32 arrays to a compiled program and returns at once. What the step needs of
the step before (last token, length, drafts) is in the donated state, so steps queue up on the
device in order and no result is waited for before the next launch.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

from dskjax.config import ModelConfig
from dskjax.decode.logits import Logprobs
from dskjax.decode.ranks import Ranks
from dskjax.decode.rules import RuleOptions
from dskjax.decode.slots import Slots
from dskjax.decode.step import DecodeConfig
from dskjax.decode.tuner import DraftTemperature
from dskjax.params import Params
from serve.buckets import Buckets, Variant
from serve.layerwise import LayerwisePrefill
from serve.plan import Chunk, StepLogprobs, StepPlan, StepResult
from serve.programs import Packed, Programs, Progress, launches
from serve.request import Request
from serve.rows import (
    ADMIT_ROWS,
    admission,
    decode_rows,
    needs,
    option_row,
    prefill_rows,
    token_counts,
)

Sender = Callable[[Slots, Chunk, tuple[int, int]], None]
"""Takes the pages that a layer group of a chunk wrote: (state, chunk, layers)."""


@dataclasses.dataclass(slots=True)
class Pending:
    """A launched step.

    Attributes:
        rows: where the decoding rows are in the output.
        drafts: drafts it verifies.
        output: packed output, None without decoding rows.
        receipts: ready when the prompt rows are.
        logprobs: whether a row wants log-probabilities.
        hybrid: bool [rows], the row's drafts were drawn at the learned temperature.
        scale: f32 [K], factors that the drafts of this step were drawn with.
        scored: chunks of scored requests, each with its launch's output and its row there.
    """

    rows: slice | np.ndarray
    drafts: int
    output: Packed | None
    receipts: list[jax.Array | Logprobs]
    logprobs: bool
    hybrid: np.ndarray
    scale: np.ndarray
    scored: list[tuple[Chunk, Logprobs, int]]


class Runner:
    """Implements `serve.plan.Runner` on JAX devices; used by one thread.

    Args:
        cfg: the model.
        config: static choices of the step, with the most drafts.
        buckets: shapes to compile.
        params: weights on the engine's devices.
        state: empty slots on the engine's devices; taken over.
        accept: rule of requests that name none.
        eos_ids: ids that end a request unless it ignores them.
        ranks: see `serve.programs.Programs`.

    Attributes:
        layerwise: runs chunks layer group by layer group, or None.
        senders: requests, by id, whose chunks run so.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        config: DecodeConfig,
        buckets: Buckets,
        params: Params,
        state: Slots,
        *,
        accept: RuleOptions,
        eos_ids: tuple[int, ...],
        ranks: Ranks | None = None,
    ):
        self.cfg, self.config, self.buckets = cfg, config, buckets
        self.params, self.state = params, state
        self.accept, self.eos_ids = accept, eos_ids
        self.programs = Programs(cfg, config, buckets, params, state, accept.name, ranks)
        self.layerwise: LayerwisePrefill | None = None
        self.senders: dict[str, Sender] = {}
        self.tuner = DraftTemperature(config.spec.drafts) if config.spec.sampled else None
        self._slots = state.count
        self._scale = np.ones(config.spec.drafts, np.float32)  # of the next drafts
        self._drawn = self._scale  # of the drafts that the next step verifies
        self._wants_logprobs = np.zeros(self._slots, bool)
        self._hybrid = np.zeros(self._slots, bool)
        self._variant = np.zeros(self._slots, np.int8)

    def warm_up(self, progress: Progress | None = None) -> float:
        """Compiles every program and runs each once on padding; returns the seconds it took."""
        seconds = self.programs.compile(progress)
        for bucket in self.buckets.all():
            self.state, _ = self.programs[bucket](
                self.params, self.state, *self.programs.example(bucket)
            )
        jax.block_until_ready(self.state)
        return seconds

    def check(self, request: Request) -> None:
        """Refuses a request that the compiled programs cannot serve.

        Raises:
            ValueError: an acceptance rule or an option that was not compiled in, too many stop ids,
                or a token id outside the vocabulary.
        """
        rule = request.accept
        if isinstance(rule, RuleOptions) and rule.name not in self.config.rules:
            raise ValueError(
                f"accept={rule.name!r} is not among this server's rules: "
                f"{', '.join(self.config.rules)} (see --rules)"
            )
        if needs(request, rule in (None, self.accept)) > self.buckets.variants[-1]:
            raise ValueError(
                "this server was started with --no-extras: requests cannot choose a rule, "
                "penalties, logit_bias, min_tokens or logprobs"
            )
        if request.scored and not self.buckets.scored:
            raise ValueError(
                "this server was started without --prompt-logprobs: requests cannot ask for "
                "log-probabilities of their prompt (echo with logprobs)"
            )
        option_row(request, accept=self.accept, drafts=0, eos_ids=self.eos_ids)
        biased = [token for token, _ in request.sampling.logit_bias]
        for name, ids in (("prompt", request.tokens), ("logit_bias", biased)):
            if ids and not 0 <= min(ids) <= max(ids) < self.cfg.vocab_size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(
                    f"{name} has id {wrong}, outside 0..{self.cfg.vocab_size - 1} (vocab_size)"
                )

    def launch(self, plan: StepPlan, page_table: np.ndarray) -> Pending:
        """See `serve.plan.Runner.launch`."""
        self._admit(plan.admit, [request.slot for request in plan.admit])
        output, receipts, scored, drawn = None, [], [], self._drawn
        whole = [chunk for chunk in plan.chunks if chunk.request.id not in self.senders]
        for chunk in plan.chunks:
            if chunk.request.id in self.senders:
                receipts.append(self._launch_groups(chunk, page_table))
        needed = Variant(int(self._variant[plan.slots].max(initial=0)))
        for bucket, decodes, chunks in launches(plan, whole, needed, self.buckets):
            decode = prefill = None
            if decodes:
                decode = decode_rows(
                    plan.slots, page_table, bucket.batch, bucket.columns, self._scale
                )
            if bucket.chunks:
                prefill = prefill_rows(
                    [whole[i] for i in chunks],
                    page_table,
                    (bucket.chunks, bucket.length),
                    bucket.columns,
                    self.config.spec.depths,
                    bucket.scored,
                )
            self.state, out = self.programs[bucket](self.params, self.state, decode, prefill)
            if decodes:
                output, self._drawn = out, self._scale
                out.rows.copy_to_host_async()
            else:
                receipts.append(out)
            if bucket.scored:
                found = out.prompt_logprobs if decodes else out
                scored += start_scores(found, enumerate(whole[i] for i in chunks))
        return self._pending(plan, slice(len(plan.requests)), output, receipts, drawn, scored)

    def _pending(
        self,
        plan: StepPlan,
        rows: slice | np.ndarray,
        output: Packed | None,
        receipts: list[jax.Array | Logprobs],
        drawn: np.ndarray,
        scored: list[tuple[Chunk, Logprobs, int]],
    ) -> Pending:
        return Pending(
            rows=rows,
            drafts=plan.drafts,
            output=output,
            receipts=receipts,
            logprobs=bool(self._wants_logprobs[plan.slots].any()),
            hybrid=self._hybrid[plan.slots],
            scale=drawn,
            scored=scored,
        )

    def fetch(self, pending: Pending) -> StepResult:
        """See `serve.plan.Runner.fetch`."""
        at, m = pending.rows, pending.drafts
        if pending.output is None:
            jax.block_until_ready(pending.receipts)
            none, nobody = np.zeros(0, np.int32), np.zeros((0, m + 1), np.int32)
            ends = none.astype(bool)
            return StepResult(nobody, none, none, none, ends, None, _scores(pending))
        rows = np.asarray(pending.output.rows)[at]
        count, accepted, offered, finished = rows[:, m + 1 :].T
        logprobs = None
        if pending.logprobs and pending.output.logprobs is not None:
            logprobs = StepLogprobs(*(np.asarray(x)[at] for x in pending.output.logprobs))
        if pending.hybrid.any() and m and self.tuner is not None:
            self._tune(pending, np.asarray(pending.output.overlap)[at], accepted, offered)
        tokens, ends = rows[:, : m + 1], finished != 0
        return StepResult(tokens, count, accepted, offered, ends, logprobs, _scores(pending))

    def _launch_groups(self, chunk: Chunk, page_table: np.ndarray) -> jax.Array:
        """A chunk layer group by layer group; its sender takes the pages of each."""
        assert self.layerwise is not None
        send = self.senders[chunk.request.id]
        rows = prefill_rows(
            [chunk],
            page_table,
            self.layerwise.shape,
            self.layerwise.columns,
            self.config.spec.depths,
        )
        self.state, receipt = self.layerwise.run(
            self.params, self.state, rows, lambda state, layers: send(state, chunk, layers)
        )
        return receipt

    def _admit(self, requests: list[Request], places: list[int]) -> None:
        """Writes the slots of requests; `places` are theirs among the slots of all ranks."""
        for first in range(0, len(requests), ADMIT_ROWS):
            some = slice(first, first + ADMIT_ROWS)
            self._admit_some(requests[some], places[some])

    def _admit_some(self, requests: list[Request], places: list[int]) -> None:
        options = [
            option_row(
                request, accept=self.accept, drafts=self.config.spec.drafts, eos_ids=self.eos_ids
            )
            for request in requests
        ]
        new = admission(
            requests,
            options,
            places,
            total_slots=self._slots,
            tail=self.config.spec.tail,
            think=self.config.think,
        )
        self.state = self.programs.admit(self.state, new)
        for request, slot in zip(requests, places, strict=True):
            rule = request.accept if isinstance(request.accept, RuleOptions) else self.accept
            self._hybrid[slot] = rule.name == "hybrid"
            self._variant[slot] = needs(request, rule == self.accept)
            self._wants_logprobs[slot] = request.sampling.logprobs is not None
            if request.sampling.penalised:
                counts = token_counts(request, self.cfg.vocab_size)
                self.state = self.programs.set_said(self.state, np.int32(slot), *counts)

    def _tune(
        self, pending: Pending, overlap: np.ndarray, accepted: np.ndarray, offered: np.ndarray
    ) -> None:
        """Feeds the draft temperature with the overlaps of drafts whose forerunners were kept."""
        assert self.tuner is not None
        m = overlap.shape[1]
        tested = (np.arange(m) <= accepted[:, None]) & (np.arange(m) < offered[:, None])
        tested &= pending.hybrid[:, None]
        if not tested[:, 0].any():
            return
        means = np.full(len(pending.scale), np.nan)
        seen = tested.sum(axis=0)
        means[:m] = np.where(seen > 0, (overlap * tested).sum(axis=0) / np.maximum(seen, 1), np.nan)
        self.tuner.update(means, pending.scale)
        self._scale = self.tuner.scale


def start_scores(
    found: Logprobs, chunks: Iterable[tuple[int, Chunk]]
) -> list[tuple[Chunk, Logprobs, int]]:
    """The scored ones of a launch's chunks, each with its row there; they start for the host."""
    for part in found:
        part.copy_to_host_async()
    return [(chunk, found, row) for row, chunk in chunks if chunk.request.scored]


def _scores(pending: Pending) -> list[tuple[Chunk, StepLogprobs]]:
    """What the device said about the prompts of scored requests."""
    return [
        (chunk, StepLogprobs(*(np.asarray(part)[row, : chunk.length] for part in found)))
        for chunk, found, row in pending.scored
    ]
