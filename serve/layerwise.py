"""A prompt chunk in layer groups, so that pages leave while later layers compute.

One program a group: the same forward pass as `dskjax.decode.step` cut between layers, the residual
stream handed from one to the next on the device. The host queues all groups at once and the copies
between them; nothing waits for anything but the device's own order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from dskjax.batch import RaggedBatch
from dskjax.config import ModelConfig
from dskjax.decode.rows import PrefillRows
from dskjax.decode.slots import Slots
from dskjax.decode.step import DecodeConfig, keep_prefilled
from dskjax.model import final_norm
from dskjax.paged import forward_layers
from dskjax.params import Params
from serve.programs import Programs

AfterGroup = Callable[[Slots, tuple[int, int]], None]
"""Called with the state and the half-open range of layers that have just been queued."""


def group_step(
    params: Params,
    state: Slots,
    x: jax.Array | None,
    prefill: PrefillRows,
    *,
    cfg: ModelConfig,
    config: DecodeConfig,
    layers: tuple[int, int],
) -> tuple[Slots, jax.Array]:
    """Runs a chunk through some layers; the last group also runs the MTP modules.

    Args:
        params: weights.
        state: donated.
        x: residual stream of the group before; None for the first.
        prefill: the chunk.
        cfg: the model.
        config: static choices of the step.
        layers: half-open range; static.

    Returns:
        The state and the residual stream.
    """
    part = RaggedBatch.uniform(
        prefill.token_ids,
        prefill.page_table,
        prefill.cached_lens,
        "expanded",
        prefill.query_lens,
    )
    x, cache = forward_layers(params, state.cache, part, x, cfg=cfg, layers=layers, **config.how)
    state = dataclasses.replace(state, cache=cache)
    if layers[1] == cfg.num_hidden_layers:
        hidden = final_norm(params, x, cfg=cfg)
        state = keep_prefilled(params, state, prefill, part, hidden, cfg, config)
    return state, x


def layer_groups(layers: int, group: int) -> list[tuple[int, int]]:
    """Half-open ranges of at most `group` layers that cover the trunk."""
    return [(first, min(first + group, layers)) for first in range(0, layers, group)]


class LayerwisePrefill:
    """Compiled groups of one engine for its largest chunk.

    Args:
        programs: of the engine; gives shapes and shardings.
        group: layers a group.
    """

    def __init__(self, programs: Programs, group: int):
        self._programs = programs
        self.groups = layer_groups(programs.cfg.num_hidden_layers, group)
        shapes = programs.buckets.chunk_shapes
        self.shape = max(shapes, key=lambda shape: (shape[1], -shape[0]))
        self.columns = programs.buckets.columns[-1]
        self._compiled: dict[tuple[int, int], Any] = {}

    def compile(self) -> None:
        """Compiles every group."""
        for layers in self.groups:
            lowered = self._programs.lower_group(
                functools.partial(group_step, layers=layers),
                self.shape,
                self.columns,
                first=layers[0] == 0,
            )
            self._compiled[layers] = lowered.compile()

    def run(
        self, params: Params, state: Slots, prefill: PrefillRows, after: AfterGroup
    ) -> tuple[Slots, jax.Array]:
        """Queues a chunk, group by group.

        Args:
            params: weights.
            state: donated.
            prefill: padded to `shape` and `columns`.
            after: told of every group that is queued.

        Returns:
            The state, and something small that is ready when the chunk is.
        """
        x = None
        for layers in self.groups:
            args = () if x is None else (x,)
            state, x = self._compiled[layers](params, state, *args, prefill)
            after(state, layers)
        assert x is not None
        return state, x
