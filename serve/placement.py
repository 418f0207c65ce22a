"""Which devices an engine has, how it splits the work over them, and its weights there."""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.decode.ranks import Ranks
from dskjax.expert_parallel.place import place as place_experts
from dskjax.hopper import pack_where_read
from dskjax.mesh import make_mesh, preset
from dskjax.model import param_specs
from dskjax.params import Params, unstack
from serve.engine_api import Role
from serve.transfer.local import Place


class Placement(NamedTuple):
    """Where an engine lives, and in how many ways it splits its experts."""

    name: str
    role: Role
    devices: tuple[Any, ...]
    ep: int = 1
    dp: int | None = None

    @property
    def ranks(self) -> Ranks | None:
        """Ranks with sequences of their own; None where all devices work on the same ones."""
        if self.dp is None:
            return None
        tp = len(self.devices) // (self.dp * self.ep)
        mesh = make_mesh(dp=self.dp, ep=self.ep, tp=tp, devices=self.devices)
        return Ranks(preset("decode", mesh))

    @property
    def split(self) -> Sharding | None:
        """How the weights are split where all devices work on the same sequences. None on one
        device.
        """
        if len(self.devices) == 1 or self.dp is not None:
            return None
        tp = len(self.devices) // self.ep
        return preset("prefill", make_mesh(ep=self.ep, tp=tp, devices=self.devices))

    @property
    def sharding(self) -> Any:
        """Whole copies on every device."""
        split = self.split
        return jax.sharding.SingleDeviceSharding(self.devices[0]) if split is None else split.of(())

    @property
    def pools(self) -> tuple[Any, ...]:
        """Where the pages of each rank lie: whole on each device of the rank. One without ranks."""
        ranks = self.ranks
        if ranks is None:
            return (self.sharding,)
        one_each = NamedSharding(ranks.sharding.mesh, PartitionSpec(ranks.axes))
        devices: list[list[Any]] = [[] for _ in range(ranks.count)]
        for device, (index,) in one_each.devices_indices_map((ranks.count,)).items():
            devices[index.start or 0].append(device)
        return tuple(NamedSharding(Mesh(own, ("copies",)), PartitionSpec()) for own in devices)

    def mover(self) -> Place:
        """Takes parts of transfers, from wherever they are, to the ranks that they are for."""
        pools = self.pools
        return lambda parts, ranks: jax.device_put(parts, [pools[rank] for rank in ranks])


def place_params(
    params: Params, cfg: ModelConfig, placement: Placement, *, unroll: bool, redundant: int
) -> tuple[Params, ModelConfig]:
    """The weights on an engine's devices, split over them, in the layout that their kernels read,
    and the config that describes them.

    Args:
        params: stacked weights on the host or anywhere.
        cfg: their config.
        placement: where they go.
        unroll: give every layer arrays of its own.
        redundant: slots of each layer beyond one an expert.

    Raises:
        ValueError: redundant experts without ranks that share experts, or a number of slots that
            they cannot share equally.
    """
    split, ranks = placement.split, placement.ranks
    if redundant:
        if ranks is None or placement.ep == 1:
            raise ValueError(
                f"redundant_experts={redundant} are for ranks that share the experts: give a mesh "
                "with ep=2 or more"
            )
        params, cfg = place_experts(params, cfg, redundant=redundant, sharding=ranks.sharding)
    elif ranks is not None:
        params = jax.device_put(params, ranks.weights(params, cfg))
    elif split is not None:
        params = jax.device_put(params, split.params(param_specs(cfg), params))
    else:
        params = jax.device_put(params, placement.devices[0])
    if unroll:
        params = unstack(params)
        if ranks is not None:
            params = jax.device_put(params, ranks.weights(params, cfg))
    if ranks is not None and ranks.manual == set(ranks.sharding.mesh.axis_names):
        params = pack_where_read(params, functools.partial(ranks.weights, cfg=cfg))
    elif split is None and ranks is None:
        params = pack_where_read(params)
    return params, cfg
