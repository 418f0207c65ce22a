"""Choosing an implementation by name or reasons; and masked softmax, which all of them share."""

import contextvars
import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MlaPrefillPlan, select
from pallas_kernels.mla_prefill import cudnn
from pallas_kernels.select import Implementation, choose
from pallas_kernels.softmax import masked_softmax

OPS = ["act_quant", "grouped_matmul", "matmul", "mla_decode", "mla_prefill", "router"]
KNOWN = (
    Implementation("tensor_cores", lambda x: "tensor_cores", supports=lambda x: "no GPU"),
    Implementation("fast", lambda x: "fast", auto=lambda x: None if x > 9 else "x is small"),
    Implementation("reference", lambda x: "reference"),
)


@pytest.mark.parametrize(
    ("impl", "x", "want"),
    [("auto", 10, "fast"), ("auto", 1, "reference"), ("fast", 1, "fast")],
)
def test_choice(impl, x, want):
    assert choose("op", impl, KNOWN, x)(x) == want


def test_a_named_implementation_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="op: impl='tensor_cores' cannot .*: no GPU"):
        choose("op", "tensor_cores", KNOWN, 1)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cuda' is unknown.*auto, tensor_cores, fast, reference"):
        choose("op", "cuda", KNOWN, 1)


def test_no_implementation_gives_every_reason():
    with pytest.raises(NotImplementedError, match="tensor_cores: no GPU; fast: x is small"):
        choose("op", "auto", KNOWN[:2], 1)


def test_auto_logs_its_choice_once(caplog):
    select._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(3):
            choose("op", "auto", KNOWN, 1)
    assert [r.message for r in caplog.records] == [
        "op: auto chose reference (tensor_cores: no GPU; fast: x is small)"
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_that_auto_takes_on_a_cpu(op):
    known = importlib.import_module(f"pallas_kernels.{op}.api").IMPLEMENTATIONS
    names = [implementation.name for implementation in known]
    assert len(set(names)) == len(names) and {"reference", "xla"} <= set(names)
    if jax.default_backend() == "cpu":
        cpu = [i for i in known if i.supports is select.anywhere]
        reference = next(i.run for i in known if i.name == "reference")
        assert choose(op, "auto", cpu) is reference


def test_masked_softmax_of_an_empty_row():
    scores = jnp.asarray([[jnp.nan, 5.0, 1e30], [0.0, 0.0, -jnp.inf]])
    mask = jnp.asarray([[False] * 3, [True] * 3])
    probs, lse = masked_softmax(scores, mask)
    np.testing.assert_array_equal(probs, [[0, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(lse, [-np.inf, np.log(2)], rtol=1e-6)


def test_masked_softmax_of_huge_scores():
    probs, lse = masked_softmax(jnp.asarray([[1e30, 1e30], [-1e30, 0]]), jnp.ones((2, 2), bool))
    np.testing.assert_array_equal(probs, [[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(lse, [1e30, 0])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU needs no pretence")
def test_choices_for_a_hopper_that_is_not_there():
    asked = (select.no_hopper, select.no_ada, select.on_gpu_only)
    assert all(ask() for ask in asked)
    with select.for_hopper():
        assert not any(ask() for ask in asked)
    assert all(ask() for ask in asked)


@pytest.mark.devices(2)
def test_arrays_are_whole_where_every_mesh_axis_is_manual():
    found = {}

    def ask(name):
        def body(x):
            found[name] = select.whole_arrays_only()
            return x

        return body

    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 1), ("a", "b"), axis_types=axes, devices=jax.devices()[:2])
    one = jax.make_mesh((1, 1), ("a", "b"), axis_types=axes, devices=jax.devices()[:1])
    split = jax.sharding.PartitionSpec("a")
    for name, where, names in (
        ("all", mesh, {"a", "b"}),
        ("one device", one, {"a", "b"}),
        ("some", mesh, {"a"}),
    ):
        run = jax.shard_map(
            ask(name), mesh=where, in_specs=split, out_specs=split, axis_names=names
        )
        jax.jit(run)(jnp.zeros(4))
    ask("outside")(None)
    assert found["all"] is None and found["one device"] is None
    assert found["some"] and found["outside"]


def test_cudnn_is_not_taken_where_order_is_kept(monkeypatch):
    """Its gradients are added as they come, so training would give other bits every time."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.zeros((64, 2, 96), jnp.bfloat16)
    ones = jnp.ones(64, jnp.int32)
    plan = MlaPrefillPlan(ones, ones, ones, ones, rows=2, same_rows=True)

    def refused():
        return cudnn.supports(x, x[..., :32], x, x[:, 0, :32], x, plan, with_lse=False)

    def kept():
        select.keep_order()
        return refused()

    assert refused() is None
    assert "no fixed order" in contextvars.copy_context().run(kept)
    assert refused() is None
