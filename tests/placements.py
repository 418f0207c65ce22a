"""What the tests of expert placement share: loads, layouts, and what any placement must be."""

import numpy as np
from hypothesis import strategies as st

from dskjax.eplb import Layout, gpu_loads, imbalance


def zipf(layers, experts, exponent, seed=0):
    """Zipf loads in random order."""
    rng = np.random.default_rng(seed)
    ranked = np.arange(1, experts + 1) ** -exponent
    return np.stack([rng.permutation(ranked) for _ in range(layers)])


def ratio(loads, placement, num_gpus):
    return imbalance(gpu_loads(loads, placement.phy2log, num_gpus))


def doubles(slots, num_gpus):
    """Replicas that share a GPU with another one of their expert."""
    by_gpu = np.sort(slots.reshape(len(slots), num_gpus, -1), axis=2)
    return int((by_gpu[:, :, 1:] == by_gpu[:, :, :-1]).sum())


def check_valid(placement, num_experts, layout):
    """Every map by itself says the same, and every expert is somewhere."""
    layers, slots = placement.phy2log.shape
    assert slots == layout.num_replicas
    assert placement.log2phy.shape == (layers, num_experts, placement.logcnt.max())
    for layer in range(layers):
        where = [np.flatnonzero(placement.phy2log[layer] == e) for e in range(num_experts)]
        assert [len(found) for found in where] == placement.logcnt[layer].tolist()
        assert min(map(len, where)) >= 1
        for found, listed in zip(where, placement.log2phy[layer], strict=True):
            assert sorted(listed[: len(found)]) == found.tolist()
            assert (listed[len(found) :] == -1).all()


@st.composite
def problems(draw, max_layers=2):
    """Loads and a layout: few sizes, many ties, zeros, one hot expert."""
    nodes = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6]))
    gpus = nodes * draw(st.sampled_from([1, 2, 3]))
    experts = groups * draw(st.sampled_from([1, 2, 3, 4]))
    size = -(-experts // gpus) + draw(st.integers(0, 3))
    load = st.one_of(st.integers(0, 3), st.integers(0, 1000), st.just(0))
    row = st.lists(load, min_size=experts, max_size=experts)
    loads = draw(st.lists(row, min_size=1, max_size=max_layers))
    layout = Layout(num_replicas=gpus * size, num_groups=groups, num_nodes=nodes, num_gpus=gpus)
    return np.array(loads), layout
