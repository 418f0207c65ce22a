"""The roofline against hand-computed tables of DeepSeek-V3."""

import pytest

from dskjax.presets import preset
from dskjax.roofline import GPUS, decode_floor, memory_needed, parts

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
]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r[0]} ep{r[1]} b{r[2]}")
def test_decode_steps_of_v3(row):
    name, ep, batch, *times, rate = row
    floor = decode_floor(V3, GPUS[name], batch=batch, context=4100, ep=ep)
    found = [1e3 * t for t in (floor.weights, floor.cache, floor.linear, floor.core, floor.step)]
    assert found == pytest.approx(times, abs=0.06)
    assert floor.tokens_per_second == pytest.approx(rate, rel=5e-3)


def test_parts_of_v3():
    p = parts(V3)
    assert p.routed == 653_908_770_816
    assert p.other == pytest.approx(15.26e9, rel=1e-3)
    assert p.linear_flops == pytest.approx(71.4e9, rel=2e-3)
    assert p.core_flops == pytest.approx(17.0e6, rel=1e-3)
    assert p.cache_elements == 35_136


def test_what_bounds_the_step():
    few = decode_floor(V3, GPUS["h20"], batch=8, context=4100, ep=16)
    many = decode_floor(V3, GPUS["h20"], batch=32, context=4100, ep=16)
    assert (few.bound, many.bound) == ("memory", "compute")
    quick = decode_floor(V3, GPUS["h20"], batch=32, context=4100, ep=16, fp8_attention=True)
    assert quick.step < many.step


def test_drafts_cost_compute_and_not_cache():
    one = decode_floor(V3, GPUS["h100"], batch=16, context=4100, ep=8)
    three = decode_floor(V3, GPUS["h100"], batch=16, context=4100, ep=8, verify=3)
    assert three.core == pytest.approx(3 * one.core) and three.cache == one.cache


def test_memory_of_one_gpu():
    int4 = memory_needed(V3, batch=1, context=1, ep=8)
    assert int4 == pytest.approx(61.1e9, rel=3e-3)
    assert memory_needed(V3, batch=1, context=1, ep=8, experts="fp8") == pytest.approx(
        100.7e9, rel=3e-3
    )
    assert memory_needed(V3, batch=2, context=1000, ep=8) - memory_needed(
        V3, batch=1, context=1000, ep=8
    ) == pytest.approx(1000 * 35_136)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="batch=0"):
        decode_floor(V3, GPUS["h100"], batch=0, context=1)
