"""Tiny models with random loud weights, their float64 oracle, and a driver for the paged cache.

Everything that compiles is cached here, so that the tests of one process share it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import model, paged, presets
from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.config import ModelConfig, MtpConfig
from pallas_kernels import LatentCache
from pallas_kernels.testing import jit
from pallas_kernels.testing.generate import GARBAGE_PAGES
from tests.oracles import deepseek, weights

LENS = (14, 9, 17)  # three sequences; several pages of 4, none of them a whole number of pages


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model: its configuration, raw weights in float64, and params as dskjax holds them."""

    cfg: ModelConfig
    raw: dict
    params: dict
    tokens: np.ndarray  # int32 [3, 17]

    @property
    def hf(self):
        return self.cfg.to_hf()


@functools.cache
def tiny(name="tiny-v3") -> Tiny:
    cfg = presets.preset(name)
    if cfg.mtp.num_nextn_predict_layers:
        cfg = dataclasses.replace(cfg, mtp=MtpConfig(num_nextn_predict_layers=2))
    raw = weights.random_weights(cfg.to_hf())
    params = jax.tree.map(jnp.asarray, weights.stacked(raw, cfg.to_hf()))
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, cfg.vocab_size, (len(LENS), max(LENS)), np.int32)
    return Tiny(cfg, raw, params, tokens)


@functools.cache
def oracle(name="tiny-v3"):
    """Per sequence (hidden, layers, experts, [h^1, h^2]) of the float64 oracle."""
    t, out = tiny(name), []
    for row in t.tokens:
        hidden, layers, experts = deepseek.trunk(t.raw, row, t.hf)
        depths = t.cfg.mtp.num_nextn_predict_layers
        out.append(
            (hidden, layers, experts, deepseek.mtp(t.raw, row, hidden, t.hf, depths)),
        )
    return out


@functools.cache
def _compiled(function, donate, options):
    """One compiled function per set of options, whichever test asks."""
    bound = functools.partial(function, **dict(options))
    return jit(bound, donate_argnums=donate)


def run_trunk(t, tokens=None, segment_ids=None, positions=None, params=None):
    """`trunk` of whole rows with residual streams, those of `t` by default."""
    tokens = t.tokens if tokens is None else tokens
    if segment_ids is None:
        segment_ids = np.ones(tokens.shape, np.int32)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    run = _compiled(_trunk, (), (("cfg", t.cfg), ("capture", True)))
    arrays = (jnp.asarray(a) for a in (tokens, segment_ids, positions))
    return run(t.params if params is None else params, *arrays)


def _trunk(params, tokens, segment_ids, positions, *, cfg, capture):
    packing = {"segment_ids": segment_ids, "positions": positions}
    return model.trunk(params, tokens, cfg=cfg, capture=capture, **packing)


def run_head(t, hidden):
    """fp32 logits."""
    return _compiled(model.head, (), (("cfg", t.cfg),))(t.params, hidden)


def run_mtp_chain(cfg, depths=2):
    """Compiled `mtp_chain`: (params, tokens, hidden) -> MtpOutput."""
    return _compiled(model.mtp_chain, (), (("cfg", cfg), ("depths", depths)))


def run_forward(cfg, impl="auto"):
    """Compiled `forward`, cache donated: (params, cache, batch) -> (hidden, cache)."""
    return _compiled(paged.forward, (1,), (("cfg", cfg), ("impl", impl)))


def run_apply(cfg, sharding):
    """Compiled `apply` on a mesh: (params, tokens) -> logits."""
    return _compiled(model.apply, (), (("cfg", cfg), ("sharding", sharding)))


def run_forward_mtp(cfg):
    """Compiled `forward_mtp`, cache donated; takes the module last, returns (h, cache)."""
    return _compiled(_forward_mtp, (1,), (("cfg", cfg),))


def _forward_mtp(params, cache, batch, hidden, module, *, cfg):
    return paged.forward_mtp(params, cache, batch, hidden, cfg=cfg, module=module)


@dataclasses.dataclass
class Pages:
    """A pool full of NaN with randomly placed pages for three sequences, garbage ids elsewhere."""

    cache: LatentCache
    table: np.ndarray
    page: int = 4

    @classmethod
    def make(cls, cfg, seed=0, width=6, num_pages=15, lens=LENS, **options):
        rng = np.random.default_rng(seed)
        cache = init_cache(cfg, num_pages=num_pages, page_size=4, dtype=jnp.float32, **options)
        cache = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), cache)
        table = np.resize(np.int32(GARBAGE_PAGES), (len(lens), width))
        order, start = rng.permutation(num_pages), 0
        for row, length in enumerate(lens):
            count = min(-(-length // 4), width)
            table[row, :count] = order[start : start + count]
            start += count
        return cls(cache, table)

    def written(self, layer=0):
        """bool [pages, page]: slots of a layer that hold numbers."""
        return ~np.isnan(np.float32(self.cache.rope[layer])).any(-1)

    def expected(self, lens):
        """The same, as it should be after `lens` tokens of each sequence."""
        out = np.zeros(self.cache.rope.shape[1:3], bool)
        for row, length in enumerate(lens):
            at = np.arange(length)
            out[self.table[row, at // self.page], at % self.page] = True
        return out


def ragged(pages, tokens, done, new, size, form, poison_id=1_000_000):
    """A batch of new[b] tokens of each sequence after done[b], padded to `size` rows.

    Padding rows carry a token id outside the vocabulary, whose embedding is NaN.
    """
    ids = [tokens[b, done[b] : done[b] + n] for b, n in enumerate(new)]
    flat = np.concatenate([*ids, np.full(size - sum(new), poison_id)]).astype(np.int32)
    return RaggedBatch(
        token_ids=jnp.asarray(flat),
        page_table=jnp.asarray(pages.table),
        cached_lens=jnp.asarray([d + n if n else 0 for d, n in zip(done, new, strict=True)]),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32),
        form=form,
    )
