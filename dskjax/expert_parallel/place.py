"""From a model that has each expert once to one whose slots hold replicas by a plan, and back.

    placed, cfg = place(params, cfg, {"moe_layers": plan(loads, layout)}, redundant=32)
    params, cfg = unplace(placed, cfg)                  # what a checkpoint stores

Both work layer by layer on the devices (`dskjax.expert_parallel.fetch`): beside the two stacks
there is one layer's buffer, and nothing goes through host memory. Of params on the host one layer
at a time goes to the devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int

from dskjax.axes import Sharding
from dskjax.config import ModelConfig, MoeConfig
from dskjax.eplb import Placement
from dskjax.expert_parallel.fetch import Owners, fetch, store
from dskjax.expert_parallel.replicas import check_plan, default_plan, plan_of, tables
from dskjax.model import param_specs
from dskjax.params import Params

WEIGHTS = ("gate_up_proj", "down_proj")
"""What slots hold; the other leaves of `Experts` are maps."""

_PATHS = {"moe_layers": ("mlp", "experts"), "mtp_layers": ("block", "mlp", "experts")}


def place(
    params: Params,
    cfg: ModelConfig,
    plans: Mapping[str, Placement] | None = None,
    *,
    redundant: int,
    sharding: Sharding | None = None,
) -> tuple[Params, ModelConfig]:
    """Gives each layer `redundant` more slots and fills all of them by a plan.

    Args:
        params: stacked params of `cfg`, arrays or QTensors, on any devices or on the host.
        cfg: the model, without redundant experts.
        plans: for "moe_layers" and "mtp_layers", with a row for each layer. Without a plan slot p
            holds expert p modulo their number.
        redundant: slots beyond one an expert.
        sharding: mesh and rules that place the result; None leaves arrays on their device, and
            takes those on the host to the first one.

    Returns:
        The params, whose other leaves are not copied unless they move, and their config.

    Raises:
        ValueError: a plan for other layers, of another shape or that leaves out an expert; a number
            of slots that the mesh does not divide; params that are placed already or unstacked.
    """
    if cfg.moe is None or cfg.moe.num_redundant_experts:
        state = "no experts" if cfg.moe is None else "redundant experts already: `unplace` them"
        raise ValueError(f"the model has {state}")
    owners = Owners(sharding)
    _check_number(redundant, cfg.moe.n_routed_experts, owners.count)
    moe = dataclasses.replace(cfg.moe, num_redundant_experts=redundant)
    after = dataclasses.replace(cfg, moe=moe)
    layers = _layers(params, cfg)
    plans = dict(plans or {})
    if unknown := sorted(set(plans) - set(layers)):
        raise ValueError(f"a plan for {unknown[0]!r}; the params have {', '.join(layers)}")
    rows = {  # all of them are checked before anything is moved
        group: check_plan(plans[group].phy2log, count, moe, group)
        if group in plans
        else default_plan(count, moe)
        for group, count in layers.items()
    }
    out = params
    for group, row in rows.items():
        experts = _moved(experts_of(params, group), row, cfg, after, owners)
        out = with_experts(out, group, experts | jax.tree.map(jnp.asarray, tables(row, moe)))
    return _where(out, after, sharding), after


def unplace(
    params: Params, cfg: ModelConfig, *, sharding: Sharding | None = None
) -> tuple[Params, ModelConfig]:
    """The inverse of `place`, whatever moved since: each expert from the first slot that its map
    names.

    Args:
        params: stacked params of `cfg`.
        cfg: the model, with redundant experts.
        sharding: mesh and rules that `params` were placed by, and the result is.

    Raises:
        ValueError: no redundant experts, or maps that do not fit.
    """
    moe = placed_experts(cfg)
    after = dataclasses.replace(cfg, moe=dataclasses.replace(moe, num_redundant_experts=0))
    out = params
    for group in _layers(params, cfg):
        experts = experts_of(params, group)
        plan = Placement.of(plan_of(experts, moe, group), moe.n_routed_experts)
        first = plan.log2phy[:, :, 0]
        weights = {name: experts[name] for name in WEIGHTS}
        out = with_experts(out, group, _moved(weights, first, cfg, after, Owners(sharding)))
    return _where(out, after, sharding), after


def placed_experts(cfg: ModelConfig) -> MoeConfig:
    """The experts of a model that has redundant ones.

    Raises:
        ValueError: it has none.
    """
    if cfg.moe is None or not cfg.moe.num_redundant_experts:
        raise ValueError("the config has no redundant experts; `place` makes params that have")
    return cfg.moe


def experts_of(params: Params, group: str) -> Params:
    """The leaves of `Experts` in "moe_layers" or "mtp_layers", stacked over layers.

    Raises:
        ValueError: there is no such group, or its layers are separate.
    """
    node = params.get(group)
    if not isinstance(node, Mapping):
        state = "not there" if node is None else "unstacked: place experts first, then unstack"
        raise ValueError(f"params {group!r} are {state}")
    for name in _PATHS[group]:
        node = node[name]
    return dict(node)


def with_experts(params: Params, group: str, experts: Params) -> Params:
    """The same params with these leaves of `Experts`; no other leaf is copied."""

    def put(node: Any, path: tuple[str, ...]) -> Any:
        return {**node, path[0]: put(node[path[0]], path[1:])} if path else experts

    return put(params, (group, *_PATHS[group]))


def _layers(params: Params, cfg: ModelConfig) -> dict[str, int]:
    counts = {"moe_layers": cfg.num_moe_layers, "mtp_layers": cfg.mtp.num_nextn_predict_layers}
    return {group: count for group, count in counts.items() if count and group in params}


def _check_number(redundant: int, experts: int, ranks: int) -> None:
    if redundant < 1:
        raise ValueError(f"{redundant=} must be at least 1")
    if over := (experts + redundant) % ranks:
        legal = [number for number in (redundant - over, redundant - over + ranks) if number > 0]
        raise ValueError(
            f"{experts} experts and {redundant=} make {experts + redundant} slots, which do not "
            f"divide over {ranks} ranks; nearest: {' or '.join(map(str, legal))}"
        )


def _moved(
    experts: Params,
    source: Int[np.ndarray, "L slots"],
    before: ModelConfig,
    after: ModelConfig,
    owners: Owners,
) -> Params:
    """Stacks whose slots are filled from those of other stacks, layer by layer."""
    assert before.moe is not None
    on_host = any(isinstance(x, np.ndarray) for x in jax.tree.leaves(experts))
    stack = experts if on_host else _put(experts, before, owners)
    wide = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*source.shape, *x.shape[2:]), x.dtype), stack
    )
    if owners.sharding is not None:
        where = owners.shardings(wide, after)
    else:
        here = SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda x: here if on_host else x.sharding, stack)
    out = jax.tree.map(lambda x, to: jnp.zeros(x.shape, x.dtype, device=to), wide, where)
    for layer, row in enumerate(source):
        at = layer
        if on_host:  # only this layer crosses
            one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], experts)
            stack, at = _put(one, before, owners), 0
        routes = owners.routes(row, before.moe.num_slots)
        buffer = fetch(stack, at, routes, slots=len(row), owners=owners, cfg=before)
        out = store(out, layer, buffer, owners=owners, cfg=after)
    return out


def _put(experts: Params, cfg: ModelConfig, owners: Owners) -> Params:
    where = None if owners.sharding is None else owners.shardings(experts, cfg)
    return jax.device_put(experts, where)


def _where(params: Params, cfg: ModelConfig, sharding: Sharding | None) -> Params:
    if sharding is None:
        return jax.device_put(params)
    specs = {name: spec for name, spec in param_specs(cfg).items() if name in params}
    return jax.device_put(params, sharding.params(specs, params))
