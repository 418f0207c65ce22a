"""Deals the copies of busy experts out anew while an engine serves.

    count    the step counts, on the device, the rows that chose each expert (padding chooses none)
    plan     every N steps: from the counts since the last time, in a thread that ends with it
    move     one layer a step: its weights are copied beside the steps, and put in place between two

No step waits for any of it: counts are read when they have arrived, a plan is taken up when it is
there, and a layer that was fetched before one step is put in place before the next.
"""

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.decode.slots import Slots
from dskjax.eplb import Layout, Replan, gpu_loads, imbalance, replan
from dskjax.expert_parallel.fetch import Owners
from dskjax.expert_parallel.place import placed_experts
from dskjax.expert_parallel.rebalance import Pending, Rebalancer
from dskjax.params import Params

GROUP = "moe_layers"
"""The layers whose rows are counted; MTP modules, one layer each, keep their placement."""


class Balance(NamedTuple):
    """What a rebalance did.

    Attributes:
        before, after: load of the fullest over that of the mean rank, mean of the layers, by the
            rows that were counted; 1 is even.
        moves: slots that got another expert.
    """

    before: float
    after: float
    moves: int


class ExpertBalancer:
    """Moves experts of one engine's params; used by its thread.

    Args:
        params: stacked, as `dskjax.expert_parallel.place` makes them.
        cfg: their config.
        sharding: mesh and rules that they were placed by.
        every: steps from one rebalance to the next.
        told: called when all layers of a rebalance are in place.
    """

    def __init__(
        self,
        params: Params,
        cfg: ModelConfig,
        sharding: Sharding,
        *,
        every: int,
        told: Callable[[Balance], None],
    ):
        self._rebalancer = Rebalancer(params, cfg, sharding)
        slots = placed_experts(cfg).num_slots
        self._layout = Layout(num_replicas=slots, num_gpus=Owners(sharding).count)
        self._every, self._told = every, told
        self._steps = 0
        self._sum = jax.jit(lambda loads: loads.sum(axis=0), out_shardings=sharding.of(()))
        self._seen: np.ndarray | None = None  # counts as of the last rebalance
        self._counts: Any = None  # on their way to the host
        self._plan: Future[tuple[Replan, Balance]] | None = None
        self._layers: collections.deque[int] = collections.deque()  # still to be moved
        self._rows: np.ndarray | None = None  # the expert to come in each slot, by layer
        self._balance: Balance | None = None
        self._fetched: Pending | None = None

    def warm_up(self, params: Params, state: Slots) -> Params:
        """Compiles what a rebalance runs: swaps two experts, and swaps them back."""
        self._seen = self._count(state)
        now = self._rebalancer.placement(GROUP).phy2log[0]
        swapped = now.copy()
        swapped[[0, -1]] = now[[-1, 0]]
        for row in (swapped, now):
            pending = self._rebalancer.fetch(params, GROUP, 0, row)
            if pending is not None:  # else both slots hold copies of one expert
                params = self._rebalancer.commit(params, pending)
        return params

    def turn(self, params: Params, state: Slots) -> Params:
        """Before a launch: does what is ready to be done.

        Args:
            params: of the engine; the expert weights are donated if a layer is put in place.
            state: whose loads are counted.

        Returns:
            The params to launch with.
        """
        if self._fetched is not None:
            params = self._rebalancer.commit(params, self._fetched)
            self._fetched = None
            self._finish()
        if self._layers:
            layer = self._layers.popleft()
            assert self._rows is not None
            self._fetched = self._rebalancer.fetch(params, GROUP, layer, self._rows[layer])
        elif self._plan is not None and self._plan.done():
            self._take_up(*self._plan.result())
        elif self._counts is not None and self._counts.is_ready():
            self._start_plan()
        self._steps += 1
        if self._steps >= self._every and self._idle:
            self._steps, counts = 0, self._sum(state.loads)
            counts.copy_to_host_async()
            self._counts = counts
        return params

    @property
    def _idle(self) -> bool:
        """Nothing of the last rebalance is under way."""
        return self._counts is None and self._plan is None and self._balance is None

    def _count(self, state: Slots) -> np.ndarray:
        return np.asarray(self._sum(state.loads))

    def _start_plan(self) -> None:
        counts = np.asarray(self._counts)
        assert self._seen is not None
        # The device's counters go round; the difference of unsigned numbers does not care.
        new = (counts.view(np.uint32) - self._seen.view(np.uint32)).astype(np.float64)
        self._counts, self._seen = None, counts
        current = self._rebalancer.placement(GROUP)
        layout, ranks = self._layout, self._layout.num_gpus

        def load(slots: np.ndarray) -> float:
            return float(imbalance(gpu_loads(new, slots, ranks)).mean())

        def work() -> tuple[Replan, Balance]:
            found = replan(current, new, layout)
            after = load(found.placement.phy2log)
            return found, Balance(load(current.phy2log), after, len(found.moves))

        planner = ThreadPoolExecutor(1, thread_name_prefix="expert-planner")
        self._plan = planner.submit(work)
        planner.shutdown(wait=False)  # the thread ends with its plan, so nobody has to end it

    def _take_up(self, found: Replan, balance: Balance) -> None:
        self._plan, self._balance = None, balance
        self._rows = found.placement.phy2log
        self._layers.extend(np.unique(found.moves[:, 0]).tolist())
        self._finish()

    def _finish(self) -> None:
        if not self._layers and self._fetched is None and self._balance is not None:
            self._told(self._balance)
            self._balance = None
