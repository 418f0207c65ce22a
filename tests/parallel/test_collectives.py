"""What a compiled program sends between devices: the exchanges that were asked for and no more."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.axes import Sharding
from dskjax.cache import init_cache
from dskjax.decode.ranks import Ranks
from dskjax.decode.rows import DecodeRows
from dskjax.decode.rules import RuleOptions
from dskjax.decode.sampling import SamplingParams
from dskjax.decode.slots import RowOptions, init_slots
from dskjax.decode.step import DecodeConfig
from dskjax.expert_parallel import Exchange
from dskjax.mesh import make_mesh, preset
from dskjax.model import abstract_params, param_specs, trunk
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quant import FP8_BLOCK, quantise
from tests.model.common import tiny
from tests.parallel.common import needs_8

COLLECTIVES = "all-gather all-reduce all-to-all collective-permute reduce-scatter".split()


def sent(hlo: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """(name, shapes of the results) of each collective of a compiled program; those in a loop's
    body stand there once.
    """
    found = []
    for line in hlo.splitlines():
        made, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        match = re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", rest)
        if made.startswith("%") and match:
            dims = re.findall(r"\w\[([\d,]*)\]", rest[: match.start()])
            shapes = [tuple(int(n) for n in one.split(",") if n) for one in dims]
            found.append((match[1], shapes))
    return found


def collectives(hlo: str) -> Counter[str]:
    return Counter(name for name, _ in sent(hlo))


def gathered_experts(hlo: str, cfg) -> list[tuple[int, ...]]:
    """Results of all-gathers that hold every expert's weights."""
    moe = cfg.moe
    shapes = [shape for name, made in sent(hlo) if name == "all-gather" for shape in made]
    sizes = {moe.n_routed_experts, moe.moe_intermediate_size}
    return [shape for shape in shapes if len(shape) > 2 and sizes <= set(shape)]


def abstract(where: Sharding, cfg):
    """Shapes of the weights, placed."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_params(cfg, jnp.float32),
        where.params(param_specs(cfg)),
    )


def decode_step(where: Sharding, drafts: int = 2, impl: str = "auto") -> str:
    """The compiled decode step of 16 sequences."""
    cfg, ranks, rows = tiny().cfg, Ranks(where), 16
    accept = RuleOptions(name="strict")
    config = DecodeConfig.make(cfg, accept=accept, drafts=drafts, impl=impl)
    config = dataclasses.replace(config, truncate=False)
    sampling = SamplingParams.make(rows, temperature=0.0)
    options = RowOptions.make(sampling, accept=accept, drafts=drafts)
    cache = init_cache(cfg, num_pages=32, page_size=4, dtype=jnp.float32)
    state = init_slots(cache, options, cfg=cfg, spec=config.spec, dtype=jnp.float32)
    decode = DecodeRows(
        slots=jnp.arange(rows) % (rows // ranks.count),
        page_table=jnp.zeros((rows, 4), jnp.int32),
        draft_scale=jnp.ones(drafts),
    )
    run = ranks.program(cfg, config)
    return (
        run.lower(abstract(where, cfg), *map(ranks.place, (state, decode)), None)
        .compile()
        .as_text()
    )


def whole_sequences(where: Sharding) -> str:
    """The compiled trunk over 8 sequences."""
    cfg = tiny().cfg
    tokens = jax.ShapeDtypeStruct((8, 16), np.int32)
    run = jax.jit(lambda p, t: trunk(p, t, cfg=cfg, sharding=where).hidden)
    return run.lower(abstract(where, cfg), tokens).compile().as_text()


@needs_8
def test_a_decode_step_sends_rows_to_experts_and_back_and_nothing_else():
    """Once each in the loop over MoE layers, and once each in the loop over draft depths."""
    where = preset("decode", make_mesh(ep=8, devices=jax.devices()[:8]))
    assert collectives(decode_step(where)) == {"all-to-all": 2 + 2}


@needs_8
def test_ranks_with_all_experts_send_nothing():
    where = preset("decode", make_mesh(dp=8, devices=jax.devices()[:8]))
    assert collectives(decode_step(where)) == {}


@needs_8
@pytest.mark.parametrize("rules", ["train", "prefill", "decode"])
def test_experts_stay_where_they_are(rules):
    """The weights of a rank's experts are never gathered over the ranks."""
    where = preset(rules, make_mesh(ep=4, devices=jax.devices()[:4]))
    hlo = whole_sequences(where)
    assert not gathered_experts(hlo, tiny().cfg)
    found = collectives(hlo)
    assert bool(found["all-to-all"]) == (rules != "prefill")
    if rules == "prefill":
        assert found["all-reduce"]


@needs_8
def test_split_widths_stay_split():
    """Only rows and logits travel between devices that have a share of each matrix: no weights, and
    nothing a value at a time, as sums along a split vocabulary would.
    """
    hlo = decode_step(preset("decode", make_mesh(tp=2, devices=jax.devices()[:2])), impl="xla")
    found, vocab = sent(hlo), tiny().cfg.vocab_size
    assert {name for name, _ in found} == {"all-gather", "all-reduce"}
    gathered = [shape for name, made in found if name == "all-gather" for shape in made]
    assert gathered and all(shape[-1] == vocab for shape in gathered)
    assert not gathered_experts(hlo, tiny().cfg)
    loops = [int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', hlo)]
    assert loops and max(loops) < vocab // 4


@needs_8
@pytest.mark.parametrize("kind", ["forward", "gradient", "fp8"])
def test_a_grouped_product_leaves_split_weights_where_they_are(kind):
    """Gate and up, the second axis, are not merged with the third, which is split."""
    mesh, experts, width, rows = make_mesh(tp=2, devices=jax.devices()[:2]), 8, 256, 64
    weights = jnp.zeros((experts, 2, width, 384), jnp.bfloat16)
    weights = quantise(weights, FP8_BLOCK) if kind == "fp8" else weights
    where = NamedSharding(mesh, PartitionSpec(None, None, "tp"))
    weights = jax.device_put(weights, where)
    x, sizes = jnp.zeros((rows, 384), jnp.bfloat16), jnp.full(experts, rows // experts)

    def run(x, weights):
        return grouped_matmul(x, weights, sizes, impl="xla").astype(jnp.float32).sum()

    run = jax.grad(run, argnums=(0, 1)) if kind == "gradient" else run
    found = sent(jax.jit(run).lower(x, weights).compile().as_text())
    assert not [shape for _, made in found for shape in made if {width, 384} <= set(shape)]


def normed_rows(hlo: str) -> Counter[int]:
    """Rows that norms work on, and how many do."""
    return Counter(int(rows) for rows in re.findall(r"f32\[(\d+)\]\S* rsqrt\(", hlo))


@needs_8
@pytest.mark.parametrize(("ep", "tp"), [pytest.param(1, 4, marks=pytest.mark.full), (2, 2)])
def test_norms_work_on_a_share_of_the_rows(ep, tp):
    """Two in each of two loops and the last one; those of latents stay whole. Their rows, 8 x 16,
    are gathered after each norm in a loop. XLA makes reduce-scatters of what products end with when
    it compiles for GPUs; for CPUs it makes none, so here rows are all-reduced and cut.
    """
    mesh = make_mesh(ep=ep, tp=tp, devices=jax.devices()[:4])
    hlo = whole_sequences(preset("prefill_rows", mesh))
    before = whole_sequences(preset("prefill", mesh))
    assert normed_rows(before) == {128: 9}
    assert normed_rows(hlo) == {128 // 4: 5, 128: 4}
    gathered = lambda text: sent(text).count(("all-gather", [(128, 128)]))  # noqa: E731
    assert (gathered(before), gathered(hlo)) == (0, 4)
    assert not collectives(hlo)["reduce-scatter"]


@needs_8
def test_the_check_sees_gathered_experts(monkeypatch):
    """A mode that wants all experts on every rank, while the rules split them."""
    where = preset("decode", make_mesh(ep=4, devices=jax.devices()[:4]))
    local = Exchange(mode="local", axis="", rows=("ep",), mesh=where.mesh)
    monkeypatch.setattr(Exchange, "of", lambda sharding: local)
    assert gathered_experts(whole_sequences(where), tiny().cfg)
