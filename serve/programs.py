"""The compiled programs of an engine: one per bucket, all made before the first request.

Each is compiled ahead of time and called as an executable, so a shape that was not planned for is
an error here rather than a silent compilation in the middle of serving. `jax.monitoring` counts
what is compiled all the same (`CompileCounter`).
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.config import ModelConfig
from dskjax.decode.logits import Logprobs
from dskjax.decode.ranks import Ranks
from dskjax.decode.rows import DecodeRows, PrefillRows, StepOutput
from dskjax.decode.rules import RuleOptions
from dskjax.decode.slots import Slots, admit, set_said
from dskjax.decode.step import DecodeConfig, scored_step
from dskjax.params import Params
from serve.buckets import Bucket, Buckets, Variant
from serve.plan import Chunk, StepPlan
from serve.request import Request, StopOptions
from serve.rows import admission, all_ranks, decode_rows, option_row, prefill_rows

Progress = Callable[[int, int, str], object]
"""Called with (programs done, programs in all, what was done)."""


class Packed(NamedTuple):
    """A step's output, laid out for one copy to the host.

    Attributes:
        rows: i32 [B, m + 1 + 4]: tokens, then count, accepted, offered, finished.
        overlap: f32 [B, m].
        logprobs: read only if a row wants them.
        prompt_logprobs: of scored prompt rows.
    """

    rows: jax.Array
    overlap: jax.Array
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


def packed_step(
    params: Params,
    state: Slots,
    decode: DecodeRows | None,
    prefill: PrefillRows | None,
    *,
    cfg: ModelConfig,
    config: DecodeConfig,
) -> tuple[Slots, Packed | Logprobs | jax.Array]:
    """`dskjax.decode.scored_step` with its output packed; a step of prompt rows alone gives their
    log-probabilities or, if nobody wants any, something else that is small and ready when the step
    is.
    """
    state, output, scores = scored_step(params, state, decode, prefill, cfg=cfg, config=config)
    if output is not None:
        return state, _pack(output, scores)
    assert prefill is not None
    return state, jnp.sum(prefill.query_lens, keepdims=True) if scores is None else scores


def _pack(out: StepOutput, scores: Logprobs | None) -> Packed:
    columns = [out.count, out.accepted, out.offered, out.finished.astype(jnp.int32)]
    rows = jnp.concatenate([out.tokens, jnp.stack(columns, axis=1)], axis=1)
    return Packed(rows, out.overlap, out.logprobs, scores)


class Programs:
    """Executables by bucket, and those of admission.

    Args:
        cfg: the model.
        config: static choices, with the most drafts.
        buckets: what to compile.
        params: weights, on the engine's devices.
        state: slots on the engine's devices, or their shapes with shardings.
        default_rule: the rule of variants that have only one.
        ranks: whose slots and rows lie one after another; None where one set of slots is decoded,
            on one device or wherever the weights lie.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        config: DecodeConfig,
        buckets: Buckets,
        params: Params,
        state: Slots,
        default_rule: str,
        ranks: Ranks | None = None,
    ):
        self._ranks = ranks
        self.cfg, self.config, self.buckets = cfg, config, buckets
        self.default_rule = default_rule
        self._params = jax.tree.map(_abstract, params)
        self._state = jax.tree.map(_abstract, state)
        self._out = jax.tree.map(lambda x: x.sharding, self._state)
        self._steps: dict[Bucket, Any] = {}
        self.admit: Any = None
        self.set_said: Any = None

    def __getitem__(self, bucket: Bucket) -> Any:
        return self._steps[bucket]

    def compile(self, progress: Progress | None = None) -> float:
        """Compiles everything, largest first, several at a time; returns the seconds it took."""
        begun = time.perf_counter()
        todo: list[tuple[str, Callable[[], Any], Callable[[Any], None]]] = [
            (str(b), functools.partial(self.lower, b), functools.partial(self._keep, b))
            for b in self.buckets.all()
        ]
        todo.append(("admission", self._lower_admit, functools.partial(setattr, self, "admit")))
        todo.append(("penalties", self._lower_said, functools.partial(setattr, self, "set_said")))
        workers = max(1, min(16, os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            running = {pool.submit(lower().compile): (name, keep) for name, lower, keep in todo}
            for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
                name, keep = running[future]
                keep(future.result())
                if progress is not None:
                    progress(done, len(todo), name)
        return time.perf_counter() - begun

    def lower(self, bucket: Bucket) -> Any:
        """The lowered program of a bucket, to compile or to look at."""
        config = self.config.fewer(bucket.drafts)
        if bucket.variant is not Variant.FULL:
            truncate = bucket.variant is Variant.TRUNCATED
            config = dataclasses.replace(
                config, rules=(self.default_rule,), truncate=truncate, extras=False
            )
        if self._ranks is None:
            run = functools.partial(packed_step, cfg=self.cfg, config=config)
        else:
            run = self._ranks.over(packed_step, self.cfg, config)
        return jax.jit(run, donate_argnums=1, out_shardings=(self._out, None)).lower(
            self._params, self._state, *self.example(bucket)
        )

    def lower_group(
        self, run: Callable[..., Any], shape: tuple[int, int], columns: int, *, first: bool
    ) -> Any:
        """The lowered program of one layer group of a chunk; see `serve.layerwise`."""
        _, prefill = self.example(Bucket(0, *shape, 0, columns))
        assert prefill is not None
        run = functools.partial(run, cfg=self.cfg, config=self.config)
        sharding = self._state.length.sharding
        out = (self._out, sharding)
        if first:
            start = lambda params, state, prefill: run(params, state, None, prefill)  # noqa: E731
            jitted = jax.jit(start, donate_argnums=1, out_shardings=out)
            return jitted.lower(self._params, self._state, prefill)
        rows = (shape[0] * shape[1], self.cfg.hidden_size)
        x = jax.ShapeDtypeStruct(rows, self._state.hidden_tail.dtype, sharding=sharding)
        jitted = jax.jit(run, donate_argnums=(1, 2), out_shardings=out)
        return jitted.lower(self._params, self._state, x, prefill)

    def example(self, bucket: Bucket) -> tuple[DecodeRows | None, PrefillRows | None]:
        """Inputs of a bucket that touch nothing: padding alone."""
        ranks = 1 if self._ranks is None else self._ranks.count
        slots, columns = self._state.count // ranks, bucket.columns
        table = np.full((slots, columns), -1, np.int32)
        decode = prefill = None
        if bucket.batch:
            nobody = np.zeros(0, np.int32)
            scale = np.ones(self.config.spec.drafts, np.float32)
            decode = decode_rows(nobody, table, bucket.batch, columns, scale)
        if bucket.chunks:
            shape, depths = (bucket.chunks, bucket.length), self.config.spec.depths
            prefill = prefill_rows([], table, shape, columns, depths, bucket.scored)
        if self._ranks is None:
            return decode, prefill
        return all_ranks([decode] * ranks), all_ranks([prefill] * ranks)

    def _keep(self, bucket: Bucket, compiled: Any) -> None:
        self._steps[bucket] = compiled

    def _lower_admit(self) -> Any:
        request = Request("warm-up", [0], stop=StopOptions(max_tokens=1))
        rule = RuleOptions.parse(self.default_rule)
        options = option_row(request, accept=rule, drafts=0, eos_ids=())
        new = admission(
            [request],
            [options],
            [self._state.count],
            total_slots=self._state.count,
            tail=self.config.spec.tail,
            think=self.config.think,
        )
        return jax.jit(admit, donate_argnums=0, out_shardings=self._out).lower(self._state, new)

    def _lower_said(self) -> Any:
        vocab = self.cfg.vocab_size
        example = (np.int32(0), np.zeros(vocab, np.int32), np.zeros(vocab, bool))
        return jax.jit(set_said, donate_argnums=0, out_shardings=self._out).lower(
            self._state, *example
        )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class CompileCounter:
    """Counts programs that XLA compiles in this process, from the moment it is made.

    JAX can register a listener and not take it back, so one listener serves the process and
    counters remember where they started.
    """

    _compiled = 0
    _listening = False

    def __init__(self):
        cls = type(self)
        if not cls._listening:
            jax.monitoring.register_event_duration_secs_listener(cls._listen)
            cls._listening = True
        self._start = cls._compiled

    @classmethod
    def _listen(cls, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cls._compiled += 1

    def restart(self) -> None:
        """Counts from here on."""
        self._start = type(self)._compiled

    @property
    def count(self) -> int:
        """Programs compiled since."""
        return type(self)._compiled - self._start


def launches(
    plan: StepPlan, chunks: Sequence[Chunk], needed: Variant, buckets: Buckets
) -> Iterable[tuple[Bucket, bool, list[int]]]:
    """How a plan's decoding rows and some chunks are spread over programs: (bucket, whether it
    decodes, indices of its chunks).

    Decoding rows come first, together with the largest group of chunks if the buckets mix. A group
    is scored if one of its requests is.
    """
    columns, rows = buckets.fit_columns(plan.columns), len(plan.requests)
    groups = [
        (shape, members, any(chunks[i].request.scored for i in members))
        for shape, members in buckets.group([chunk.length for chunk in chunks])
    ]
    if rows:
        size, members, scored = (buckets.fit_batch(rows), 0, 0), [], False
        if buckets.mixed and groups:
            shape, members, scored = groups.pop(0)
            size = (buckets.batches[-1], *shape)
        variant = buckets.fit_variant(needed, scored=scored)
        yield Bucket(*size, plan.drafts, columns, variant, scored), True, members
    for shape, members, scored in groups:
        yield Bucket(0, *shape, 0, columns, scored=scored), False, members
