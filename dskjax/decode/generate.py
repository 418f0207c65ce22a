"""The offline loop: prompts in, tokens out, over the paged cache with or without speculation.

The host stays one step behind the device: it reads a step's tokens while the next one already runs,
so at most one step is wasted after the last sequence ends. Sampled tokens never leave the device on
their way to the next step.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.axes import Sharding
from dskjax.cache import init_cache
from dskjax.config import ModelConfig
from dskjax.decode.ranks import Ranks
from dskjax.decode.rows import DecodeRows, PrefillRows, StepOutput
from dskjax.decode.rules import RuleOptions, ThinkIds
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import RowOptions, Slots, init_slots
from dskjax.decode.stats import AcceptanceStats
from dskjax.decode.step import NO_THINKING, DecodeConfig, step
from dskjax.distributed import fetch
from dskjax.params import Params

FinishReason = Literal["stop", "length"]
_SUMS = ("steps", "drafted", "accepted", "emitted")
_PLACES = ("offered_at", "reached_at", "accepted_at")


@dataclasses.dataclass
class Generation:
    """Result of `generate`.

    Attributes:
        tokens: new ids of each prompt; an eos that ended it is the last of them.
        finish_reasons: "stop" (eos) or "length".
        per_prompt: acceptance, counted for each prompt.
        ties: greedy choices whose two best logits were closer than `dskjax.decode.rows.TIE_GAP`.
        prefill_seconds: wall time of prefill and first drafts, compilation included.
        decode_seconds: wall time of the decode loop, compilation included.
        expert_loads: int64 [L, E], how many rows chose each expert of each MoE layer of the trunk,
            prompts and verified drafts included; None unless asked for.
        mtp_expert_loads: int64 [M, E], the same of each MTP module, with the rows that it computes
            again; None also without drafts.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    per_prompt: list[AcceptanceStats]
    ties: int
    prefill_seconds: float
    decode_seconds: float
    expert_loads: np.ndarray | None = None
    mtp_expert_loads: np.ndarray | None = None

    @property
    def stats(self) -> AcceptanceStats:
        """Acceptance over all prompts."""
        total = AcceptanceStats()
        for one in self.per_prompt:
            total.merge(one)
        return total


@functools.cache
def program(cfg: ModelConfig, config: DecodeConfig) -> Callable:
    """The jitted step of one model and configuration, shared by all calls; the state is donated."""
    return jax.jit(functools.partial(step, cfg=cfg, config=config), donate_argnums=1)


def generate(
    params: Params,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    accept: RuleOptions | str = "rejection",
    rules: Sequence[str] | None = None,
    drafts: int = 0,
    thinking: Sequence[bool] | None = None,
    think: ThinkIds = NO_THINKING,
    ignore_eos: bool = False,
    page_size: int = 64,
    chunk: int = 512,
    kv_dtype: str = "auto",
    impl: str = "auto",
    sharding: Sharding | None = None,
    count_experts: bool = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Generation:
    """Continues every prompt by up to `max_tokens` tokens, all in one batch.

    Args:
        params: weights; their dtype is the compute dtype.
        cfg: the model.
        prompts: token ids of each prompt, any lengths.
        max_tokens: most new tokens per prompt.
        sampling: per-prompt parameters; greedy when None.
        accept: acceptance rule of every prompt, or its text form.
        rules: rules compiled into the step, `accept` among them: calls that differ in nothing else
            share one program. None: `accept` alone.
        drafts: tokens drafted a step by the MTP modules; 0 turns speculation off.
        thinking: which prompts end inside a thinking section; none when None.
        think: ids of the thinking tags, for rules that look at the phase.
        ignore_eos: never stop at an eos.
        page_size: tokens a cache page.
        chunk: most prompt tokens per sequence in one prefill call.
        kv_dtype: see `dskjax.cache.init_cache`.
        impl: implementation of every op.
        sharding: mesh and rules that split the batch (preset `decode`), with `params` placed by
            them: prompts are dealt out to the ranks. None: one device, or wherever `params` lie.
        count_experts: report `expert_loads` and `mtp_expert_loads`, which `dskjax eplb` plans with.
        on_tokens: called with (prompt index, new ids) as steps are read, for streaming.

    Raises:
        ValueError: no prompt, an empty prompt, an id outside the vocabulary, a length beyond
            max_position_embeddings, or a draft count the checkpoint cannot serve.
    """
    _check(cfg, prompts, max_tokens)
    if isinstance(accept, str):
        accept = RuleOptions.parse(accept)
    config = DecodeConfig.make(
        cfg, accept=tuple(rules or (accept.name,)), drafts=drafts, think=think, impl=impl
    )
    sampling = sampling or SamplingParams.make(len(prompts), temperature=0.0)
    if sampling.seed.shape[0] != len(prompts):
        raise ValueError(
            f"sampling has {sampling.seed.shape[0]} rows for {len(prompts)} prompts: "
            f"use SamplingParams.make({len(prompts)}, ...)"
        )
    stop_ids = () if ignore_eos else cfg.eos_token_id
    options = RowOptions.make(sampling, accept=accept, drafts=drafts, stop_ids=stop_ids)
    result = Generation(
        tokens=[],
        finish_reasons=[],
        per_prompt=[],
        ties=0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
    )
    begun = time.perf_counter()
    batch = prefill_prompts(
        params,
        cfg,
        prompts,
        config,
        options,
        thinking=thinking,
        max_tokens=max_tokens,
        page_size=page_size,
        chunk=chunk,
        kv_dtype=kv_dtype,
        ranks=None if sharding is None else Ranks(sharding),
        count_experts=count_experts,
    )
    jax.block_until_ready(batch.state.cache)
    result.prefill_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    state = batch.state
    pending: StepOutput | None = None
    tally = _Tally(len(prompts), drafts, stop_ids)
    while tally.running:
        state, output = batch.run(params, state, batch.rows, None)
        if pending is not None:
            tally.add(fetch(pending), on_tokens)
        pending = output
    result.decode_seconds = time.perf_counter() - begun
    result.tokens, result.finish_reasons = tally.tokens(), tally.finish_reasons()
    result.per_prompt, result.ties = tally.per_prompt(), tally.ties
    if state.loads is not None:
        result.expert_loads = np.asarray(fetch(state.loads)).sum(axis=0, dtype=np.int64)
    if state.mtp_loads is not None:
        result.mtp_expert_loads = np.asarray(fetch(state.mtp_loads)).sum(axis=0, dtype=np.int64)
    return result


class PrefilledBatch(NamedTuple):
    """Slots whose prompts are in the cache, the rows that decode all of them, and the step that
    does it.
    """

    state: Slots
    rows: DecodeRows
    run: Callable[..., tuple[Slots, StepOutput]]


def prefill_prompts(
    params: Params,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    options: RowOptions,
    *,
    max_tokens: int,
    page_size: int,
    chunk: int,
    thinking: Sequence[bool] | None = None,
    kv_dtype: str = "auto",
    ranks: Ranks | None = None,
    count_experts: bool = False,
) -> PrefilledBatch:
    """Allocates a cache that holds all prompts to their ends and prefills them together.

    With `ranks` each gets as many rows, the last ones idle where prompts run out.
    """
    spec, count = config.spec, 1 if ranks is None else ranks.count
    run = program(cfg, config) if ranks is None else ranks.program(cfg, config)
    idle = -len(prompts) % count
    prompts, batch = [*prompts, *([0] for _ in range(idle))], len(prompts) + idle
    options = jax.tree.map(  # a copy, because the state is donated
        lambda x: jnp.pad(jnp.copy(x), [(0, idle)] + [(0, 0)] * (x.ndim - 1)), options
    )
    lengths = np.array([len(p) - 1 for p in prompts], np.int32)
    longest = int(lengths.max())
    width = -(-(longest + 1 + max_tokens + 2 * spec.drafts) // page_size)
    slots = jnp.arange(batch, dtype=jnp.int32) % (batch // count)  # ids of a rank's own
    page_table = slots[:, None] * width + jnp.arange(width, dtype=jnp.int32)
    dtype = params["embed_tokens"]["weight"].dtype
    cache = init_cache(
        cfg, num_pages=batch * width, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype
    )
    tails = [list(p[-spec.tail :]) if spec.tail else [] for p in prompts]
    state = dataclasses.replace(
        init_slots(
            cache,
            options,
            cfg=cfg,
            spec=spec,
            dtype=dtype,
            counters=count if count_experts else 0,
        ),
        length=jnp.asarray(lengths),
        last_token=jnp.asarray([p[-1] for p in prompts], jnp.int32),
        token_tail=jnp.asarray([[0] * (spec.tail - len(t)) + t for t in tails], jnp.int32).reshape(
            batch, spec.tail
        ),
        remaining=jnp.full(batch, max_tokens, jnp.int32),
        done=jnp.arange(batch) >= batch - idle,
        thinking=jnp.zeros(batch, bool)
        .at[: batch - idle]
        .set(False if thinking is None else jnp.asarray(list(thinking))),
    )
    place = (lambda rows: rows) if ranks is None else ranks.place
    state = place(state)
    chunk = max(min(chunk, 1 << max(longest - 1, 0).bit_length()), 8)
    columns = -(-longest // chunk) * chunk
    ids = np.zeros((batch, columns + 1 + spec.depths), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    for first in range(0, columns, chunk):
        stop = first + chunk
        following = [ids[:, first + k + 1 : stop + k + 1] for k in range(spec.depths)]
        rows = PrefillRows(
            slots=slots,
            page_table=page_table,
            token_ids=jnp.asarray(ids[:, first:stop]),
            following=jnp.asarray(np.stack(following or [ids[:, :0]], axis=-1)).reshape(
                batch, chunk, spec.depths
            ),
            cached_lens=jnp.asarray(np.minimum(lengths, stop)),
            query_lens=jnp.asarray(np.clip(lengths - first, 0, chunk)),
        )
        state, _ = run(params, state, None, place(rows))
    scale = jnp.ones(spec.drafts, jnp.float32)
    rows = DecodeRows(slots=slots, page_table=page_table, draft_scale=scale)
    return PrefilledBatch(state, place(rows), run)


class _Tally:
    """What steps put out, by prompt. A step's prompts are taken all at once: a host that took them
    one by one would be slower than the device.

    Args:
        prompts: B, how many; further rows of the outputs are idle.
        drafts: m, most drafts of a step.
        stop_ids: ids that end a sequence.
    """

    def __init__(self, prompts: int, drafts: int, stop_ids: tuple[int, ...]):
        self.running, self.ties = prompts, 0
        self._stop_ids, self._stopped = stop_ids, np.zeros(prompts, bool)
        self._sums = {name: np.zeros(prompts, np.int64) for name in _SUMS}
        self._places = {name: np.zeros((prompts, drafts), np.int64) for name in _PLACES}
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, out: StepOutput, on_tokens: Callable[[int, list[int]], None] | None) -> None:
        """Takes a step's output, on the host."""
        rows = len(self._stopped)
        active, count, accepted, offered = (
            np.asarray(x[:rows]) for x in (out.active, out.count, out.accepted, out.offered)
        )
        tokens, finished = np.asarray(out.tokens[:rows]), np.asarray(out.finished[:rows])
        assert np.all((accepted >= 0) & (accepted <= offered) & (count <= accepted + 1))
        self.ties += int(out.ties.sum())
        self.running -= int(finished.sum())
        count = np.where(active, count, 0)
        self._steps.append((tokens, count))
        last = np.take_along_axis(tokens, np.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        self._stopped |= finished & (count > 0) & np.isin(last, self._stop_ids)
        for name, values in zip(_SUMS, (1, offered, accepted, count), strict=True):
            self._sums[name] += np.where(active, values, 0)
        place = np.arange(self._places["offered_at"].shape[1])
        here = active[:, None] & (offered[:, None] > place)
        self._places["offered_at"] += here
        self._places["reached_at"] += here & (accepted[:, None] >= place)
        self._places["accepted_at"] += here & (accepted[:, None] > place)
        if on_tokens is not None:
            for index in np.flatnonzero(active):
                on_tokens(int(index), tokens[index, : count[index]].tolist())

    def tokens(self) -> list[list[int]]:
        """New ids of each prompt."""
        if not self._steps:
            return [[] for _ in self._stopped]
        tokens = np.stack([tokens for tokens, _ in self._steps], axis=1)  # [B, steps, m + 1]
        counts = np.stack([count for _, count in self._steps], axis=1)
        new = np.arange(tokens.shape[-1]) < counts[..., None]
        return [ids[here].tolist() for ids, here in zip(tokens, new, strict=True)]

    def finish_reasons(self) -> list[FinishReason]:
        """Of each prompt."""
        return ["stop" if stopped else "length" for stopped in self._stopped]

    def per_prompt(self) -> list[AcceptanceStats]:
        """Acceptance of each prompt."""
        found = []
        for row in range(len(self._stopped)):
            depths = np.count_nonzero(self._places["offered_at"][row])
            places = {name: at[row, :depths].tolist() for name, at in self._places.items()}
            sums = {name: int(values[row]) for name, values in self._sums.items()}
            found.append(AcceptanceStats(**sums, **places))
        return found


def _check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if not prompts:
        raise ValueError("no prompts: give at least one")
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be at least 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"prompt {index} is empty: a model continues at least one token (begin with bos)"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= cfg.vocab_size:
            raise ValueError(
                f"prompt {index} has id {low if low < 0 else high}, outside "
                f"0..{cfg.vocab_size - 1} (vocab_size)"
            )
        if len(prompt) + max_tokens > cfg.max_position_embeddings:
            raise ValueError(
                f"prompt {index}: {len(prompt)} tokens and {max_tokens=} exceed "
                f"{cfg.max_position_embeddings=}; "
                "shorten the prompt or ask for fewer tokens"
            )
