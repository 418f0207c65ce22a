"""A published model, or some of its layers, mid-decode on a mesh: random weights, full slots, and
the steps of all ranks compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.random_weights import Precision, param_shapes, random_like
from dskjax.cache import init_cache
from dskjax.config import ModelConfig
from dskjax.decode.ranks import Ranks
from dskjax.decode.rows import DecodeRows, PrefillRows
from dskjax.decode.rules import RuleOptions, SyntheticAcceptance
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import RowOptions, Slots, init_slots
from dskjax.decode.step import DecodeConfig
from dskjax.params import Params
from dskjax.presets import preset

PAGE = 64


def config_of(name: str, layers: int | None, redundant: int = 0) -> ModelConfig:
    """A preset with fewer layers, one of them dense; all of them with None."""
    cfg = preset(name)
    if layers is not None and layers < cfg.num_hidden_layers:
        dense = min(cfg.first_k_dense_replace, 1)
        cfg = dataclasses.replace(cfg, num_hidden_layers=layers, first_k_dense_replace=dense)
    if redundant:
        assert cfg.moe is not None
        moe = dataclasses.replace(cfg.moe, num_redundant_experts=redundant)
        cfg = dataclasses.replace(cfg, moe=moe)
    return cfg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A model on a mesh.

    Attributes:
        cfg: the model.
        ranks: the mesh; each rank has sequences of its own.
        precision: of the weights.
        kv_dtype: of the cache.
        impl: implementation of every op.
        dtype: computed in.
    """

    cfg: ModelConfig
    ranks: Ranks
    precision: Precision = "w4afp8"
    kv_dtype: str = "fp8"
    impl: str = "auto"
    dtype: Any = jnp.bfloat16

    @property
    def gpus(self) -> int:
        """Devices of the mesh."""
        return self.ranks.sharding.mesh.size

    @functools.cached_property
    def params_shapes(self) -> Any:
        """Of the weights, layer by layer."""
        return param_shapes(self.cfg, self.precision, unrolled=True, dtype=self.dtype)

    def where_params(self) -> Any:
        """NamedShardings of the weights."""
        return self.ranks.weights(self.params_shapes, self.cfg)

    def params(self) -> Params:
        """Random weights, on the devices."""
        return random_like(self.params_shapes, self.where_params())

    def config(self, drafts: int, acceptance: float | None) -> DecodeConfig:
        """Static choices of the step.

        Args:
            drafts: tokens drafted, and verified, a step.
            acceptance: simulated, of each draft whose predecessors were accepted; None compares
                tokens.
        """
        synthetic = None
        if acceptance is not None and drafts:
            rates = tuple(acceptance ** (i + 1) for i in range(drafts))
            synthetic = SyntheticAcceptance(rates=rates)
        config = DecodeConfig.make(
            self.cfg,
            accept=RuleOptions(name="strict"),
            drafts=drafts,
            synthetic=synthetic,
            impl=self.impl,
        )
        return dataclasses.replace(config, truncate=False, extras=False)

    def program(self, config: DecodeConfig) -> Any:
        """The jitted step of all ranks."""
        return self.ranks.program(self.cfg, config)

    # ------------------------------------------------------------------ slots and rows

    def width(self, context: int) -> int:
        """Pages of a sequence, with room for the steps of a measurement."""
        return -(-(context + 512) // PAGE)

    def slots(
        self,
        config: DecodeConfig,
        batch: int,
        context: int,
        *,
        counted: bool = False,
        temperature: float = 1.0,
    ) -> Callable[[], Slots]:
        """A function that makes empty slots of all ranks.

        Args:
            config: of the step.
            batch: sequences of a rank.
            context: cached tokens of each.
            counted: whether rows of experts are counted.
            temperature: of sampling. At 0 random weights soon give all sequences the same tokens,
                and these go to the same experts.
        """
        count = self.ranks.count
        rows = batch * count

        def make() -> Slots:
            cache = init_cache(
                self.cfg,
                num_pages=rows * self.width(context),
                page_size=PAGE,
                dtype=self.dtype,
                kv_dtype=self.kv_dtype,
            )
            options = RowOptions.make(
                SamplingParams.make(rows, temperature=temperature, seed=list(range(rows))),
                accept=RuleOptions(name="strict"),
                drafts=config.spec.drafts,
            )
            return init_slots(
                cache,
                options,
                cfg=self.cfg,
                spec=config.spec,
                dtype=self.dtype,
                counters=count if counted else 0,
            )

        return make

    def state(self, config: DecodeConfig, batch: int, context: int, **options: Any) -> Slots:
        """Slots of all ranks in the middle of their sequences; arguments as for `slots`."""
        make = self.slots(config, batch, context, **options)
        shapes = jax.eval_shape(make)
        where = self.ranks.state(shapes)
        empty = jax.jit(make, out_shardings=where)()
        tokens = functools.partial(
            jax.random.randint, minval=0, maxval=self.cfg.vocab_size, dtype=jnp.int32
        )
        keys = jax.random.split(jax.random.key(2))
        fill: dict[str, Any] = {
            "length": jnp.full_like(shapes.length, context),
            "last_token": tokens(keys[0], shapes.last_token.shape),
            "drafts": tokens(keys[1], shapes.drafts.shape),
            "remaining": jnp.full_like(shapes.remaining, 1 << 20),
            "done": jnp.zeros(shapes.done.shape, bool),
        }
        fill = {name: jax.device_put(x, getattr(where, name)) for name, x in fill.items()}
        cache = random_like(shapes.cache, where.cache, seed=3)
        return dataclasses.replace(empty, cache=cache, **fill)

    def decode_rows(self, config: DecodeConfig, batch: int, context: int) -> DecodeRows:
        """Every slot of every rank."""
        slots = np.arange(batch, dtype=np.int32)
        width = self.width(context)
        pages = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
        every = self.ranks.count
        rows = DecodeRows(
            slots=jnp.asarray(np.tile(slots, every)),
            page_table=jnp.asarray(np.tile(pages.reshape(batch, width), (every, 1))),
            draft_scale=jnp.ones(config.spec.drafts, jnp.float32),
        )
        return self.ranks.place(rows)

    def prefill_rows(self, config: DecodeConfig, rows: int, context: int) -> PrefillRows:
        """The last `rows` tokens of a prompt of `context` on every rank, in its last slot."""
        every, depths = self.ranks.count, config.spec.depths
        width, rng = self.width(context), np.random.default_rng(1)
        ids = rng.integers(0, self.cfg.vocab_size, (every, rows + depths), np.int32)
        following = [ids[:, 1 + k : 1 + k + rows] for k in range(depths)]
        made = PrefillRows(
            slots=jnp.zeros(every, jnp.int32),
            page_table=jnp.tile(jnp.arange(width, dtype=jnp.int32), (every, 1)),
            token_ids=jnp.asarray(ids[:, :rows]),
            following=jnp.asarray(
                np.stack(following, axis=-1) if depths else np.zeros((every, rows, 0), np.int32)
            ),
            cached_lens=jnp.full(every, context, jnp.int32),
            query_lens=jnp.full(every, rows, jnp.int32),
        )
        return self.ranks.place(made)

    def abstract(self, config: DecodeConfig, batch: int, context: int) -> tuple[Any, Any, Any]:
        """(weights, slots, rows) as shapes with their shardings, for compiling without devices."""
        mesh = self.ranks.sharding.mesh
        state = jax.eval_shape(self.slots(config, batch, context))
        rows, shape = batch * self.ranks.count, jax.ShapeDtypeStruct
        mine = NamedSharding(mesh, PartitionSpec(self.ranks.axes))
        decode = DecodeRows(
            slots=shape((rows,), jnp.int32, sharding=mine),
            page_table=shape((rows, self.width(context)), jnp.int32, sharding=mine),
            draft_scale=shape(
                (config.spec.drafts,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
            ),
        )
        return (
            _placed(self.params_shapes, self.where_params()),
            _placed(state, self.ranks.state(state)),
            decode,
        )


def _placed(shapes: Any, where: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        for x, at in zip(leaves, tree.flatten_up_to(where), strict=True)
    ]
    return jax.tree.unflatten(tree, placed)
