"""What a GPU of a mesh holds and sends: figures of DeepSeek-V3, draws, enumeration, and `info`."""

import dataclasses
import itertools

import numpy as np
import pytest

from dskjax.commands.mesh_tables import WAYS, Plan, cache_room, mesh_step
from dskjax.config import MtpConfig
from dskjax.presets import PRESETS, preset
from dskjax.roofline import GPUS, cache_bytes_per_token, memory_needed, roofline, weights_held
from dskjax.traffic import MeshSize, copy_bytes, distinct_ranks, fill, row_bytes, traffic

V3 = preset("deepseek-v3")
TINY = preset("tiny-v3")


def found(sent, name):
    return next(c for c in sent.collectives if c.name == name)


def test_bytes_of_a_token_with_copies():
    """A copy per expert: 8 x (7168 + 224) out and 8 x 14336 back, 10.1 MB over the MoE layers."""
    assert row_bytes(V3, "fp8") == 7392 and row_bytes(V3, "bf16") == 14_336
    assert copy_bytes(V3, "fp8") == (59_136, 114_688)
    assert V3.num_moe_layers * sum(copy_bytes(V3, "fp8")) == pytest.approx(10.1e6, rel=5e-3)
    sent = traffic(V3, MeshSize(ep=32), 4, exchange="copies")
    # Of uniform choices one in 32 is the own rank's.
    assert found(sent, "dispatch, trunk").sent == pytest.approx(4 * 59_136 * 31 / 32)
    assert found(sent, "combine, trunk").sent == pytest.approx(4 * 114_688 * 31 / 32)
    assert found(sent, "combine, trunk").calls == 58


@pytest.mark.parametrize(("choices", "ranks"), [(4, 3), (3, 5), (1, 4), (5, 2), (4, 1)])
def test_distinct_ranks_by_enumeration(choices, ranks):
    every = [len(set(draw)) for draw in itertools.product(range(ranks), repeat=choices)]
    assert distinct_ranks(choices, ranks) == pytest.approx(np.mean(every), rel=1e-12)


@pytest.mark.parametrize("ranks", [8, 16, 144])
def test_distinct_ranks_by_draws(ranks):
    draws = np.sort(np.random.default_rng(0).integers(ranks, size=(200_000, 8)), axis=1)
    counts = 1 + (np.diff(draws, axis=1) > 0).sum(axis=1)
    error = counts.std() / len(counts) ** 0.5
    assert abs(distinct_ranks(8, ranks) - counts.mean()) < 4 * error


@pytest.mark.parametrize("exchange", ["once", "copies"])
def test_exchange_by_draws(exchange):
    """Bytes that leave rank 0 for its node and for others, drawn token by token."""
    tokens, ranks, k = 100_000, 16, 8
    choices = np.random.default_rng(1).integers(ranks, size=(tokens, k))
    hits = np.stack([(choices == rank).sum(axis=1) for rank in range(ranks)])
    if exchange == "once":
        hits = np.minimum(hits, 1)
    row = 14_336 + (8 * k if exchange == "once" else 0)
    sent = traffic(V3, MeshSize(ep=ranks), tokens, payload="bf16", exchange=exchange)
    dispatch = found(sent, "dispatch, trunk")
    assert dispatch.near == pytest.approx(row * hits[1:8].sum(), rel=5e-3)
    assert dispatch.far == pytest.approx(row * hits[8:].sum(), rel=5e-3)


def test_padded_buffers():
    """Every other rank gets room for all 32 rows, each with 8 ids and 8 weights, and sends as many
    rows back."""
    sent = traffic(V3, MeshSize(ep=16), 32)
    out, back = found(sent, "dispatch, trunk"), found(sent, "combine, trunk")
    assert (out.near, out.far) == (7 * 32 * 7456, 8 * 32 * 7456)
    assert (back.near, back.far) == (7 * 32 * 14_336, 8 * 32 * 14_336)
    useful = traffic(V3, MeshSize(ep=16), 32, exchange="once")
    for name in ("dispatch, trunk", "combine, trunk"):
        assert found(sent, name).useful == pytest.approx(found(useful, name).sent)
        assert found(sent, name).useful < found(sent, name).sent
    total = 58 * (15 * 32 * (7456 + 14_336)) + 4 * 15
    assert sent.sent == total
    assert useful.sent == pytest.approx(useful.useful) and useful.useful == sent.useful


@pytest.mark.parametrize(
    ("mesh", "near", "far"),
    [
        (MeshSize(ep=4), 3, 0),
        (MeshSize(ep=8), 7, 0),
        (MeshSize(ep=8, dp=4), 7, 0),
        (MeshSize(ep=8, tp=2), 3, 4),
        (MeshSize(ep=4, tp=8), 0, 3),
        (MeshSize(ep=2, tp=16), 0, 1),
    ],
)
def test_ranks_of_the_node(mesh, near, far):
    combine = found(traffic(V3, mesh, 1), "combine, trunk")
    rows = mesh.tp * 14_336
    assert (combine.near, combine.far) == (near * rows, far * rows)


def test_links():
    """Half of 900 GB/s (H800: 400) both ways, and a NIC of 400 Gb/s; both work at once."""
    assert {name: gpu.nvlink for name, gpu in GPUS.items()} == {
        "h20": 450e9,
        "h800": 200e9,
        "h100": 450e9,
        "h200": 450e9,
    }
    assert {gpu.network for gpu in GPUS.values()} == {50e9}
    combine = found(traffic(V3, MeshSize(ep=16), 32), "combine, trunk")
    assert combine.seconds(GPUS["h100"]) == pytest.approx(58 * 8 * 32 * 14_336 / 50e9)
    inside = traffic(V3, MeshSize(ep=8), 32)
    want = (58 * 7 * 32 * (7456 + 14_336) + 7 * 4) / 200e9
    assert inside.seconds(GPUS["h800"]) == pytest.approx(want)


def test_tensor_parallel_collectives():
    """Two sums a layer and one after the embedding: a ring sends 2 (tp - 1) / tp of the rows."""
    sent = traffic(V3, MeshSize(tp=4), 8)
    assert {c.name: c.calls for c in sent.collectives} == {
        "all-reduce of layers, trunk": 122,
        "all-reduce of embedding, trunk": 1,
        "all-gather of logits, trunk": 1,
    }
    layers = found(sent, "all-reduce of layers, trunk")
    assert (layers.near, layers.far) == (2 * 0.75 * 32 * 14_336, 0)
    assert found(sent, "all-gather of logits, trunk").sent == 0.75 * 32 * 4 * 129_280
    wide = found(traffic(V3, MeshSize(tp=16), 1), "all-reduce of layers, trunk")
    assert wide.near == 0 and wide.far == 2 * 15 / 16 * 16 * 14_336


def test_a_gpu_alone_sends_nothing():
    assert traffic(V3, MeshSize(), 32, drafts=1).collectives == ()
    (only,) = traffic(V3, MeshSize(dp=16), 32).collectives
    assert only.name == "all-gather of sizes" and (only.near, only.far) == (4 * 7, 4 * 8)


@pytest.mark.parametrize(
    ("modules", "drafts", "calls"),
    [
        (1, 0, {"trunk": (58, 1)}),
        (1, 1, {"trunk": (58, 2), "MTP": (1, 2)}),
        # One module over the 4 rows of the step, then once more for each further draft.
        (1, 3, {"trunk": (58, 4), "MTP": (1, 4), "MTP again": (2, 1)}),
        # A chain computes its last rows again.
        (3, 3, {"trunk": (58, 4), "MTP": (3, 6)}),
        (3, 2, {"trunk": (58, 3), "MTP": (2, 4)}),
        (0, 2, {"trunk": (58, 3)}),
    ],
)
def test_layers_of_mtp_modules(modules, drafts, calls):
    cfg = dataclasses.replace(V3, mtp=MtpConfig(num_nextn_predict_layers=modules))
    sent = traffic(cfg, MeshSize(ep=8), 16, drafts=drafts)
    back = [c for c in sent.collectives if c.name.startswith("combine, ")]
    rows = {c.name.removeprefix("combine, "): (c.calls, c.sent / 7 / 16 / 14_336) for c in back}
    assert rows == calls


# Format and ep -> GB of the trunk on a GPU, and what 90% of an H20 has left for the cache.
MEMORY = [
    ("int4", 8, 61.1, 25),
    ("int4", 16, 40.1, 46),
    ("fp8", 8, 100.7, -14),
    ("fp8", 16, 59.9, 26.5),
]


@pytest.mark.parametrize(("experts", "ep", "held", "left"), MEMORY)
def test_memory_of_v3(experts, ep, held, left):
    weights = weights_held(V3, ep, experts=experts)
    assert weights.trunk / 1e9 == pytest.approx(held, abs=0.06)  # sums of rounded parts
    assert (0.9 * 96e9 - weights.trunk) / 1e9 == pytest.approx(left, abs=0.5)


@pytest.mark.parametrize(
    ("experts", "ep", "millions"), [("int4", 16, 1.30), ("fp8", 16, 0.74), ("int4", 8, 0.71)]
)
def test_tokens_that_fit_beside_v3(experts, ep, millions):
    """In fp8 at 576 bytes a layer, 62 layers, on an H20; then with the MTP module's weights."""
    per_token = cache_bytes_per_token(V3, "fp8_tensor")
    assert per_token == 62 * 576
    weights = weights_held(V3, ep, experts=experts)
    room = 0.9 * 96e9 - weights.trunk
    assert room / per_token / 1e6 == pytest.approx(millions, abs=0.006)
    left, tokens = cache_room(V3, Plan(mesh=MeshSize(ep=ep), experts=experts), "h20")
    assert left == pytest.approx(room - weights.mtp)
    assert 0 <= left - tokens * per_token < per_token


def test_memory_of_the_mtp_module():
    """Its experts in int4, its join in bf16, the rest in fp8: about 6.2 GB, split by ep."""
    expert = 3 * 7168 * 2048
    join, rest = 2 * 7168**2, 11_610_068_224 - 256 * expert - 2 * 7168**2
    for ep in (1, 16):
        routed = 256 * expert * (0.5 + 2 / 128) / ep
        assert weights_held(V3, ep).mtp == routed + 2 * join + rest
    assert weights_held(V3).mtp / 1e9 == pytest.approx(6.2, abs=0.1)
    assert weights_held(preset("kimi-k2"), 16).mtp == 0


def test_memory_under_tensor_parallelism():
    """Down projections to latents, gates and norms stay whole on every GPU."""
    whole = weights_held(V3, 8)
    half = weights_held(V3, 8, tp=2)
    assert half.routed == whole.routed / 2 and half.vocab == whole.vocab / 2
    attention, norms = 61 * (1536 + 576) * 7168, 61 * (2 * 7168 + 1536 + 512) + 7168
    kept = attention + norms + 58 * 256 * (7168 + 1)
    assert whole.rest - half.rest == (whole.rest - kept) / 2
    room, _ = cache_room(V3, Plan(mesh=MeshSize(ep=8, tp=2)), "h100")
    assert room == pytest.approx(0.9 * 80e9 - half.total)
    grown = [memory_needed(V3, 4, ctx, 8, tp=2) for ctx in (1, 1001)]
    assert grown[1] - grown[0] == 1000 * 8 * 61 * 576


def test_memory_of_redundant_experts():
    plain, more = (weights_held(V3, 32, redundant=n) for n in (0, 32))
    assert more.redundant == plain.routed / 8 and more.routed == plain.routed
    module = 256 * 3 * 7168 * 2048 * (0.5 + 2 / 128) / 32
    assert more.mtp - plain.mtp == module / 8


@pytest.mark.parametrize("redundant", [0, 4, 16, 20])
def test_experts_that_a_step_reads(redundant):
    """Slots that some token reaches, drawn: 16 experts, 4 of them chosen, copies taking turns."""
    tokens, draws = 6, 4000
    rng = np.random.default_rng(0)
    copies = np.ones(16, int)
    np.add.at(copies, np.arange(redundant) % 16, 1)
    hit = 0
    for _ in range(draws):
        chosen = np.argsort(rng.random((tokens, 16)), axis=1)[:, :4]
        turn = rng.integers(copies[chosen])
        hit += len(set(zip(chosen.flat, turn.flat, strict=True)))
    few, none = (
        roofline(TINY, "h100", 3, 1, 2, redundant=n).weights * GPUS["h100"].bandwidth
        for n in (redundant, 0)
    )
    held = weights_held(TINY, 2, redundant=redundant)
    read = few - held.rest - held.vocab / 2
    assert read / (held.routed + held.redundant) * (16 + redundant) == pytest.approx(
        hit / draws, rel=0.01
    )
    assert few >= none


def test_floor_under_tensor_parallelism():
    """Two GPUs do the work of two: twice the cache each, no product but the whole ones twice."""
    one, two = roofline(V3, "h20", 16, 4096, 16), roofline(V3, "h20", 16, 4096, 8, tp=2)
    assert two.cache == pytest.approx(2 * one.cache) and two.core == pytest.approx(one.core)
    whole = 61 * (1536 + 576) * 7168 + 58 * 256 * 7168
    assert two.linear - one.linear == pytest.approx(16 * 2 * whole / 296e12)
    held = weights_held(V3, 8, tp=2)
    # 16 GPUs have the same tokens either way.
    hit = 1 - (1 - 8 / 256) ** (16 * 16)
    want = (held.routed * hit + held.rest + held.vocab / 2) / 4e12
    assert two.weights == pytest.approx(want)


def test_steps_with_communication():
    plan = Plan(mesh=MeshSize(ep=16), context=4100)
    step = mesh_step(V3, plan, "h100", 128)
    assert step.floor == roofline(V3, "h100", 128, 4100, 16)
    assert step.exchange == traffic(V3, plan.mesh, 128).seconds(GPUS["h100"])
    assert step.apart == step.floor.step + step.exchange
    assert step.overlapped == step.exchange > step.floor.step
    for tp in (1, 2):  # two GPUs that work on twice the sequences each keep all of their cache
        tight = dataclasses.replace(plan, mesh=MeshSize(ep=8, tp=tp))
        _, tokens = cache_room(V3, tight, "h800")
        most = tokens // (4100 * tp)
        assert mesh_step(V3, tight, "h800", most).fits
        assert not mesh_step(V3, tight, "h800", most + 1).fits
    tight = dataclasses.replace(plan, mesh=MeshSize(ep=8))
    assert not mesh_step(V3, dataclasses.replace(tight, experts="fp8"), "h20", 1).fits


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_on_every_mesh(name):
    cfg = preset(name)
    for ep in WAYS:
        mesh = MeshSize(ep=ep, redundant=fill(cfg.moe.n_routed_experts, ep))
        step = mesh_step(cfg, Plan(mesh=mesh, context=100), "h200", 4)
        assert step.exchange > 0 and step.fits


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"ep": 144}, "256 experts.*ep=144.*32 redundant"),
        ({"ep": 48, "redundant": 30}, "286.*ep=48.*32 redundant"),
        ({"redundant": 1}, "twice.*at most 0"),
        ({"ep": 2, "redundant": 258}, "twice.*at most 256"),
        ({"tp": 3}, "num_attention_heads=128.*tp=3"),
        ({"tp": 0}, "tp=0 must be at least 1"),
        ({"redundant": -1}, "redundant=-1 must be at least 0"),
    ],
)
def test_meshes_that_do_not_fit(sizes, match):
    with pytest.raises(ValueError, match=match):
        traffic(V3, MeshSize(**sizes), 1)


@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size", "moe_intermediate_size"])
def test_widths_that_do_not_divide(field):
    part = TINY.moe if field.startswith("moe") else TINY
    changed = dataclasses.replace(part, **{field: 33})
    odd = dataclasses.replace(TINY, moe=changed) if part is TINY.moe else changed
    MeshSize(ep=4).check(odd)
    with pytest.raises(ValueError, match=f"{field}=33 does not divide by tp=2"):
        MeshSize(tp=2).check(odd)


def test_models_without_experts():
    dense = dataclasses.replace(
        TINY, moe=None, mtp=MtpConfig(), first_k_dense_replace=TINY.num_hidden_layers
    )
    assert len(traffic(dense, MeshSize(tp=2), 1).collectives) == 3
    with pytest.raises(ValueError, match="no routed experts; use ep=1"):
        traffic(dense, MeshSize(ep=2), 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch": 0}, "batch=0"),
        ({"drafts": -1}, "drafts=-1"),
        ({"drafts": 3}, "at most 2"),
    ],
)
def test_refused_steps(change, match):
    chain = dataclasses.replace(TINY, mtp=MtpConfig(num_nextn_predict_layers=2))
    with pytest.raises(ValueError, match=match):
        traffic(chain, MeshSize(ep=2), **{"batch": 1} | change)


@pytest.mark.parametrize("option", ["payload", "exchange"])
def test_refused_names(option):
    with pytest.raises((ValueError, TypeError), match="int8"):
        traffic(TINY, MeshSize(ep=2), 1, **{option: "int8"})


def test_info_of_a_mesh(dskjax):
    code, out, err = dskjax("info", "deepseek-v3", "--gpu", "h20", "--mesh", "ep=16")
    assert code == 0, err
    for text in ("40.85 GB", "1,275,590", "59.14 kB", "114.7 kB", "10.08 MB", "3.579 MB"):
        assert text in out, text
    floor = roofline(V3, "h20", 32, 4096, 16).step
    seconds = traffic(V3, MeshSize(ep=16), 32).seconds(GPUS["h20"])
    row = [f"{1e3 * t:.2f}" for t in (floor, seconds, floor + seconds, max(floor, seconds))]
    assert any(all(cell in line for cell in row) for line in out.splitlines())


def test_info_says_what_does_not_fit(dskjax):
    code, out, err = dskjax("info", "deepseek-v3", "--mesh", "ep=8", "--experts", "fp8")
    assert code == 0, err
    flat = " ".join(out.replace("│", " ").split())
    for gpu, usable in (("h20", "86.4 GB"), ("h800", "72 GB"), ("h100", "72 GB")):
        assert f"90% of {gpu} does not fit: the weights exceed {usable}" in flat
    assert flat.count("does not fit") == 3
    _, out, _ = dskjax("info", "deepseek-v3", "--mesh", "ep=32", "--redundant", 32)
    assert "redundant experts" in out and "does not fit" not in out


def test_info_compares_meshes(dskjax):
    code, out, err = dskjax("info", "deepseek-v3", "--compare", "--batch", 64)
    assert code == 0, err
    assert all(out.count(f"{gpu}, 64 sequences") == 1 for gpu in GPUS)
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    ways = [row[0] for row in rows if row and row[0] in ("8", "16", "32", "144+32", "320+64")]
    assert ways == ["8", "16", "32", "144+32", "320+64"] * len(GPUS)
    _, out, _ = dskjax("info", "deepseek-v3", "--compare", "--gpu", "h20", "--exchange", "once")
    assert "(once): h20" in out and "h100" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mesh", "ep=144"], ["256 experts", "ep=144", "32 redundant"]),
        (["--mesh", "ep=16,tp=5"], ["num_attention_heads=128", "tp=5"]),
        (["--mesh", "ep=16", "--redundant", "5"], ["261", "16 redundant"]),
        (["--redundant", "8"], ["ep=1", "twice"]),
        (["--mesh", "ep=16", "--payload", "int8"], ["payload='int8'", "bf16"]),
        (["--mesh", "ep=16", "--exchange", "all"], ["exchange='all'", "copies"]),
        (["--mesh", "ep=16", "--batch", "0"], ["batch=0"]),
        (["--compare", "--gpu", "a100"], ["'a100'", "h200"]),
    ],
)
def test_info_refuses(dskjax, arguments, words):
    code, _, err = dskjax("info", "deepseek-v3", *arguments)
    assert code != 0 and all(word in err for word in words), err
