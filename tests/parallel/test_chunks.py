"""A MoE layer in chunks of rows: the same rows, and no more memory than the formula says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.axes import Rules, Sharding
from dskjax.expert_parallel import Exchange, exchange
from dskjax.expert_parallel.chunks import MOE_CHUNK_TOKENS, in_chunks, workspace_bytes
from dskjax.mesh import make_mesh, preset
from dskjax.model import trunk
from pallas_kernels.testing import Tolerance, assert_close
from tests.model.common import tiny
from tests.parallel.common import choices, needs_8
from tests.parallel.test_layouts import placed
from tests.tolerances import MODEL

EXPERTS, TOP_K, D, F = 16, 4, 64, 32
SAME = Tolerance(
    abs=1e-6, rel=1e-6, cosine=1e-12, reason="the products of a row in blocks of other sizes"
)


@functools.cache
def layer(mode: str, chunk: int | None):
    """`Exchange.experts` on 8 devices, jitted; where rows go, where weights go."""
    mesh = make_mesh(ep=8, devices=jax.devices()[:8])
    rows = ("ep",) if mode == "throughput" else ()
    slack = 2.0 if mode == "throughput" else None
    made = Exchange(mode=mode, axis="ep", rows=rows, mesh=mesh, slack=slack, moe_chunk_tokens=chunk)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    return jax.jit(functools.partial(made.experts, impl="xla")), place(*rows), place("ep")


def temp_bytes(mode: str, chunk: int | None, rows: int) -> int:
    run, row, weight = layer(mode, chunk)
    of = lambda where, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # noqa: E731
    compiled = run.lower(
        of(row, jnp.float32, rows, D),
        of(row, jnp.float32, rows, TOP_K),
        of(row, jnp.int32, rows, TOP_K),
        of(weight, jnp.float32, EXPERTS, 2, F, D),
        of(weight, jnp.float32, EXPERTS, D, F),
    ).compile()
    found = compiled.memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def bound(mode: str, chunk: int) -> int:
    ranks = 8 if mode == "throughput" else 1
    sizes = {"hidden_size": D, "width": F, "top_k": TOP_K, "itemsize": 4}
    return workspace_bytes(rows=chunk, ranks=ranks, experts=EXPERTS // 8, **sizes)


@needs_8
@pytest.mark.parametrize(("mode", "chunk"), [("sum", 512), ("throughput", 128)])
def test_memory_stays_within_the_bound_however_long_the_prompt(mode, chunk):
    split = 8 if mode == "throughput" else 1
    for chunks in (1, 3.5, 16):
        found = temp_bytes(mode, chunk, int(chunks * chunk) * split)
        assert bound(mode, chunk) / 3 < found <= 1.2 * bound(mode, chunk), chunks
    whole = temp_bytes(mode, None, 16 * chunk * split)
    assert whole > 5 * bound(mode, chunk), "the bound says nothing: all rows at once keep it too"


@needs_8
@pytest.mark.parametrize(("mode", "chunk"), [("sum", 300), ("throughput", 48)])
@pytest.mark.parametrize("hot", [False, True])
def test_chunks_give_what_all_rows_at_once_give(mode, chunk, hot):
    """Also where the last chunk repeats rows, and where one rank gets them all."""
    rows, rng = 1000, np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (
        normal(rows, D),
        jnp.asarray(rng.random((rows, TOP_K)), jnp.float32),
        jnp.asarray(choices(rng, (rows, TOP_K), EXPERTS, hot=hot, idle=0.1)),
        normal(EXPERTS, 2, F, D) / D**0.5,
        normal(EXPERTS, D, F) / F**0.5,
    )
    run, whole = layer(mode, chunk)[0], layer(mode, None)[0]
    assert_close(run(*args), whole(*args), SAME)


def test_each_row_is_done_in_a_chunk_of_at_most_so_many():
    seen = []

    def run(x):
        seen.append(x.shape[0])
        return 2 * x

    x = jnp.arange(23.0)[:, None]
    for most, size in ((None, 23), (23, 23), (22, 12), (5, 5), (1, 1)):
        seen.clear()
        np.testing.assert_array_equal(in_chunks(run, (x,), most), 2 * x)
        assert set(seen) == {size}


@needs_8
@pytest.mark.parametrize(("ep", "tp"), [(4, 2), pytest.param(1, 4, marks=pytest.mark.full)])
def test_prefill_rules_run_long_prompts_in_chunks(ep, tp, monkeypatch):
    """Same experts and same hidden states as on one device, with every layer's rows in chunks."""
    monkeypatch.setattr(exchange, "MOE_CHUNK_TOKENS", 20)
    t = tiny()
    where = preset("prefill", make_mesh(ep=ep, tp=tp, devices=jax.devices()[: ep * tp]))
    tokens = np.resize(t.tokens, (3, 17))
    lowered = jax.jit(functools.partial(trunk, cfg=t.cfg, sharding=where)).lower(
        placed(t.params, t, where), tokens
    )
    assert "tensor<17x" in lowered.as_text(), "51 rows in three chunks"
    got = lowered.compile()(placed(t.params, t, where), tokens)
    want = jax.jit(functools.partial(trunk, cfg=t.cfg))(t.params, tokens)
    assert_close(got.hidden, want.hidden, MODEL)
    np.testing.assert_array_equal(np.sort(got.experts), np.sort(want.experts))


@needs_8
def test_rules_that_leave_all_rows_on_every_rank_ask_for_chunks():
    def chunk(rules, **sizes):
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(**sizes, devices=jax.devices()[:count])
        found = Exchange.of(Sharding(mesh, rules) if isinstance(rules, Rules) else rules(mesh))
        return found and found.moe_chunk_tokens

    prefill, decode = (functools.partial(preset, name) for name in ("prefill", "decode"))
    assert chunk(prefill, ep=2, tp=2) == chunk(prefill, tp=4) == MOE_CHUNK_TOKENS
    assert chunk(prefill, ep=1) is None
    assert chunk(decode, ep=4) is chunk(decode, tp=4) is None
    with pytest.raises(ValueError, match="moe_chunk_tokens=0 must be at least 1"):
        Exchange(mode="local", axis="", rows=(), moe_chunk_tokens=0)
