"""The transport's threads and devices: arrays arrive whole, in other shardings too."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from serve.transfer.checks import checksum
from serve.transfer.device import corrupt_arrays, device_checksum
from serve.transfer.faults import Fault, Faults, Rule
from serve.transfer.local import LocalTransport
from serve.transfer.states import TransferState
from serve.transfer.transport import Endpoint, Mode, Part, Ticket
from tests.serve.transfer_bench import FORM

SHAPES = {"latent": (2, 3, 4, 8), "rope": (2, 3, 4, 2)}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32]


def pages(seed, dtype=jnp.float32, where=None):
    keys = jax.random.split(jax.random.key(seed), 2)
    arrays = {
        name: (jax.random.normal(key, shape) * 50).astype(dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return arrays if where is None else jax.device_put(arrays, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("count", [None, 0, 2, 3])
def test_device_checksum_is_the_checksum(dtype, count):
    arrays = pages(1, dtype)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]
    counted = None if count is None else jnp.int32(count)
    assert int(device_checksum(arrays, counted)) == checksum(leaves, count)


def test_device_checksum_sees_corruption_and_refuses_wide_elements():
    arrays = pages(1)
    assert int(device_checksum(corrupt_arrays(arrays))) != int(device_checksum(arrays))
    assert int(device_checksum(arrays)) == int(device_checksum(pages(1)))
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        device_checksum({"latent": jnp.zeros((1, 1, 1), jnp.float64)})


def mesh(first, count):
    return Mesh(np.array(jax.devices()[first : first + count]), ("tp",))


def ticket(i, mode=Mode.WHOLE, target="d0", source="p0"):
    return Ticket(
        request_id=f"r{i}",
        generation=0,
        source=source,
        target=target,
        tokens=12,
        skip_tokens=0,
        page_size=4,
        layers=2,
        page_bytes=320,
        mode=mode,
        deadline=1e9,
    )


class Receiver:
    def __init__(self):
        self.parts, self.threads = {}, set()

    def deliver(self, ticket, part):
        self.threads.add(threading.current_thread().name)
        self.parts.setdefault(ticket.transfer_id, []).append(part)


def wait(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.001)


@pytest.fixture
def wire():
    """p0 on devices 0-1, split over the last axis; p1 on 2; d0 whole on 4; d1 split over 5-6."""
    split = NamedSharding(mesh(0, 2), P(None, None, None, "tp"))
    where = {
        "p0": split,
        "p1": jax.devices()[2],
        "d0": jax.devices()[4],
        "d1": NamedSharding(mesh(5, 2), P(None, None, "tp")),
    }
    made = []

    def make(**options):
        place = {n: lambda parts, ranks, w=w: jax.device_put(parts, w) for n, w in where.items()}
        transport = LocalTransport(place, **options)
        receivers = {name: Receiver() for name in where}
        for name, receiver in receivers.items():
            transport.register(Endpoint(name, FORM), receiver.deliver)
        made.append(transport)
        return transport, receivers, where

    yield make
    for transport in made:
        transport.shutdown()


@pytest.mark.parametrize("source", ["p0", "p1"])
@pytest.mark.parametrize("target", ["d0", "d1"])
def test_arrays_arrive_whole_in_the_targets_sharding(wire, source, target):
    transport, receivers, where = wire()
    order = ticket(0, source=source, target=target)
    transport.open(order)
    arrays = pages(3, where=where[source])
    part = Part(
        index=0,
        is_last=True,
        layers=(0, 2),
        pages=(0, 3),
        arrays=arrays,
        checksum=device_checksum(arrays),
        nbytes=960,
        extra={"tokens": [7]},
    )
    assert transport.push(order, part)
    wait(lambda: transport.poll("r0#0").delivered)
    (got,) = receivers[target].parts["r0#0"]
    assert got.extra == {"tokens": [7]}
    for name, leaf in got.arrays.items():
        np.testing.assert_array_equal(leaf, arrays[name])
        wanted = where[target]
        assert leaf.devices() == ({wanted} if target == "d0" else set(wanted.mesh.devices.flat))
    assert int(device_checksum(got.arrays)) == int(part.checksum)
    assert receivers[target].threads == {f"kv-to-{target}"}
    transport.acknowledge("r0#0", 0, True)
    assert transport.poll("r0#0").state is TransferState.SUCCESS
    assert transport.stats.seconds > 0 and transport.stats.nbytes == 960


def test_whole_and_layerwise_bring_the_same_bytes(wire):
    transport, receivers, where = wire()
    arrays = pages(5, where=where["p0"])
    for i, mode in enumerate(Mode):
        order = ticket(i, mode)
        transport.open(order)
        cuts = [(0, 2)] if mode is Mode.WHOLE else [(0, 1), (1, 2)]
        for index, (first, end) in enumerate(cuts):
            piece = jax.tree.map(lambda leaf, a=first, b=end: leaf[a:b], arrays)
            transport.push(
                order,
                Part(
                    index=index,
                    is_last=index == len(cuts) - 1,
                    layers=(first, end),
                    pages=(0, 3),
                    arrays=piece,
                    checksum=device_checksum(piece),
                    nbytes=960 // len(cuts),
                ),
            )
    wait(lambda: transport.poll("r0#0").delivered + transport.poll("r1#0").delivered == 3)
    whole, layers = receivers["d0"].parts["r0#0"], receivers["d0"].parts["r1#0"]
    for name in SHAPES:
        joined = np.concatenate([part.arrays[name] for part in layers])
        np.testing.assert_array_equal(joined, whole[0].arrays[name])
    for index in range(2):
        transport.acknowledge("r1#0", index, True)
    assert transport.poll("r1#0").state is TransferState.SUCCESS
    assert transport.stats.overlap_count == 1


class Gate:
    """A leaf that is computed when the test says so."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        self.done.wait(20)
        return self


def test_source_that_computes_holds_up_nobody_else(wire):
    transport, receivers, _ = wire()
    transport._place["d0"] = lambda packet, ranks: packet
    slow, fast, gate = ticket(0, source="p0"), ticket(1, source="p1"), Gate()
    common = dict(index=0, is_last=True, layers=(0, 2), pages=(0, 3), checksum=0, nbytes=9)
    started = time.monotonic()
    for order, arrays in ((slow, gate), (fast, np.zeros(3))):
        transport.open(order)
        assert transport.push(order, Part(arrays=arrays, **common))
    assert time.monotonic() - started < 5, "a push must not wait"
    wait(lambda: "r1#0" in receivers["d0"].parts)
    assert "r0#0" not in receivers["d0"].parts
    gate.done.set()
    wait(lambda: "r0#0" in receivers["d0"].parts)


def test_threads_deliver_late_parts_and_end(wire):
    rules = [Rule(fault=Fault.DELAY, seconds=0.05), Rule(fault=Fault.REORDER, seconds=0.05)]
    transport, receivers, _ = wire(faults=Faults(rules))
    for i in range(3):
        order = ticket(i)
        transport.open(order)
        transport.push(
            order,
            Part(
                index=0,
                is_last=True,
                layers=(0, 2),
                pages=(0, 3),
                arrays=np.full(4, i),
                checksum=0,
                nbytes=9,
            ),
        )
    wait(lambda: len(receivers["d0"].parts) == 3)
    transport.register(Endpoint("d0", FORM), receivers["d0"].deliver)
    transport.shutdown()
    assert not any(thread.is_alive() for thread in transport._threads)


def test_many_threads_push_at_once(wire):
    transport, receivers, _ = wire(merge_bytes=4096)
    transport._place["d0"] = lambda packet, ranks: packet

    def push(source, first):
        for i in range(first, first + 100):
            order = ticket(i, source=source)
            transport.open(order)
            part = Part(
                index=0,
                is_last=True,
                layers=(0, 2),
                pages=(0, 3),
                arrays=np.full(4, i),
                checksum=0,
                nbytes=100,
            )
            assert transport.push(order, part)

    threads = [
        threading.Thread(target=push, args=(source, first))
        for source, first in [("p0", 0), ("p1", 100), ("p0", 200), ("p1", 300)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(lambda: len(receivers["d0"].parts) == 400)
    for i in range(400):
        (part,) = receivers["d0"].parts[f"r{i}#0"]
        assert (part.arrays == i).all()
        transport.acknowledge(f"r{i}#0", 0, True)
        assert transport.poll(f"r{i}#0").state is TransferState.SUCCESS
    assert transport.backlog("p0") == transport.backlog("p1") == 0
