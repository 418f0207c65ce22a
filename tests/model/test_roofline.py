"""The roofline against hand-computed tables of DeepSeek-V3."""

import pytest

from dskjax.commands.info import parameter_counts
from dskjax.presets import PRESETS, preset
from dskjax.roofline import (
    EXPERT_BYTES,
    GPUS,
    cache_bytes_per_token,
    memory_needed,
    parts,
    roofline,
)

V3 = preset("deepseek-v3")

# GPU, ep, batch -> ms of weights, cache, linear, core, step; tokens/s per GPU. Int4 experts, fp8
# cache of 576 bytes a layer, 4,100 cached tokens, no drafts.
TABLE = [
    ("h100", 8, 32, 17.7, 1.4, 1.2, 2.3, 19.1, 1679),
    ("h100", 8, 64, 17.7, 2.8, 2.4, 4.5, 20.4, 3131),
    ("h100", 16, 32, 11.4, 1.4, 1.2, 2.3, 12.8, 2505),
    ("h800", 16, 128, 11.4, 5.5, 4.9, 9.0, 16.9, 7572),
    ("h200", 8, 64, 12.4, 1.9, 2.4, 4.5, 14.3, 4486),
    ("h200", 16, 128, 8.0, 3.8, 4.9, 9.0, 13.9, 9226),
    ("h20", 8, 16, 14.6, 0.6, 4.1, 7.5, 15.2, 1052),
    ("h20", 8, 64, 14.8, 2.3, 16.2, 30.1, 46.4, 1380),
    ("h20", 16, 16, 9.6, 0.6, 4.1, 7.5, 11.6, 1380),
    ("h20", 16, 32, 9.6, 1.2, 8.1, 15.1, 23.2, 1380),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r[0]} ep{r[1]} b{r[2]}")
def test_decode_steps_of_v3(row):
    name, ep, batch, *times, rate = row
    floor = roofline("deepseek-v3", name, batch, 4100, ep)
    found = [1e3 * t for t in (floor.weights, floor.cache, floor.linear, floor.core, floor.step)]
    assert found == pytest.approx(times, abs=0.06)
    assert floor.tokens_per_second == pytest.approx(rate, rel=5e-3)


def test_parts_of_v3():
    p = parts(V3)
    assert p.routed == 653_908_770_816
    assert p.other == pytest.approx(15.26e9, rel=1e-3)
    assert p.linear_flops == pytest.approx(71.4e9, rel=2e-3)
    assert p.core_flops == pytest.approx(17.0e6, rel=1e-3)


def test_what_bounds_the_step():
    few, many = (roofline(V3, "h20", batch, 4100, 16) for batch in (8, 32))
    assert (few.bound, many.bound) == ("memory", "compute")
    assert roofline(V3, GPUS["h20"], 32, 4100, 16, fp8_attention=True).step < many.step


def test_drafts_cost_compute_and_not_cache():
    one, three = (roofline(V3, "h100", 16, 4100, 8, m) for m in (1, 3))
    assert three.core == pytest.approx(3 * one.core) and three.cache == one.cache


@pytest.mark.parametrize(
    ("experts", "ep", "want"),
    [("int4", 8, 61.1e9), ("int4", 16, 40.1e9), ("fp8", 8, 100.7e9), ("fp8", 16, 59.9e9)],
)
def test_weights_of_one_gpu(experts, ep, want):
    assert memory_needed(V3, 1, 1, ep, experts=experts) == pytest.approx(want, rel=3e-3)


def test_cache_of_one_gpu():
    one, many = (memory_needed(V3, batch, ctx, 8) for batch, ctx in ((1, 1), (2, 1000)))
    assert many - one == pytest.approx(1999 * 35_136)


# Bytes a token in bf16; with latent and rope in fp8; with a scale per 128 latents and bf16 rope.
CACHE = {
    "deepseek-v3": (70_272, 35_136, 40_016),
    "deepseek-v2": (69_120, 34_560, 39_360),
    "deepseek-v2-lite": (31_104, 15_552, 17_712),
    "moonlight-16b-a3b": (31_104, 15_552, 17_712),
    "kimi-k2": (70_272, 35_136, 40_016),
}


@pytest.mark.parametrize("name", CACHE)
def test_cache_bytes_of_the_trunk(name):
    layouts = ("bf16", "fp8_tensor", "fp8_tile")
    found = tuple(cache_bytes_per_token(preset(name), layout, mtp=False) for layout in layouts)
    assert found == CACHE[name]


def test_cache_bytes_with_the_mtp_module():
    assert cache_bytes_per_token(V3) == 71_424


@pytest.mark.parametrize("name", [*PRESETS])
@pytest.mark.parametrize("gpu", GPUS)
def test_every_model_on_every_gpu(name, gpu):
    """Each part is there, grows as it must, and one GPU alone reads no more than all weights."""
    for experts in EXPERT_BYTES:
        few, many = (roofline(name, gpu, b, 4096, 2, 2, experts=experts) for b in (4, 64))
        assert 0 < few.weights <= many.weights
        for part in ("cache", "linear", "core"):
            assert getattr(many, part) == pytest.approx(16 * getattr(few, part))
        whole = 2 * parameter_counts(preset(name)).total / GPUS[gpu].bandwidth
        assert many.weights < 1.1 * whole
        assert many.tokens_per_second > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch": 0}, "batch=0"),
        ({"ctx": 0}, "ctx=0"),
        ({"ep": 0}, "ep=0"),
        ({"m": 0}, "m=0"),
        ({"model": "deepseek-v9"}, "'deepseek-v9'.*kimi-k2"),
        ({"hw": "a100"}, "'a100'.*h20, h800, h100, h200"),
    ],
)
def test_refusals(change, match):
    with pytest.raises(ValueError, match=match):
        roofline(**{"model": V3, "hw": "h100", "batch": 1, "ctx": 1} | change)


@pytest.mark.parametrize(("option", "value"), [("experts", "int3"), ("cache", "int8")])
def test_refused_formats(option, value):
    with pytest.raises((ValueError, TypeError), match=value):
        roofline(V3, "h100", 1, 1, **{option: value})
