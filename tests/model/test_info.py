"""`dskjax info`: counts to the last digit, bytes of weights by form, and what is printed."""

import dataclasses
import io

import pytest
from rich.console import Console

from dskjax.commands.info import (
    BATCHES,
    describe,
    parameter_counts,
    plot_roofline,
    roofline_rows,
    roofline_table,
    weight_bytes,
)
from dskjax.presets import PRESETS, preset
from dskjax.roofline import GPUS

# Trunk with embedding and head and the gates' biases: all, and what a token uses.
COUNTS = {
    "deepseek-v3": (671_026_419_200, 37_552_297_472),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "moonlight-16b-a3b": (15_960_110_208, 2_914_776_192),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    counts = parameter_counts(preset(name))
    assert (counts.total, counts.active) == COUNTS[name]
    assert counts.mtp == (11_610_068_224 if name == "deepseek-v3" else 0)


def test_bytes_of_v3_by_form():
    """654.1 GB routed, 15.3 other and 3.7 embedding and head in fp8; 337.2 or 347.4 in int4."""
    v3 = preset("deepseek-v3")
    found = {
        form: weight_bytes(v3, form) / 1e9 for form in ("float32", "bfloat16", "fp8", "w4afp8")
    }
    want = {"float32": 2684.1, "bfloat16": 1342.1, "fp8": 673.15, "w4afp8": 366.47}
    assert found == pytest.approx(want, rel=1e-4)
    small = weight_bytes(v3, "w4afp8", int4_scale_bytes=2)
    assert small == pytest.approx(356.25e9, rel=1e-4)
    # Per 128 weights the smaller scales save 2 bytes.
    assert weight_bytes(v3, "w4afp8") - small == 653_908_770_816 // 128 * 2


def test_bytes_of_v3_in_fp8_to_the_last():
    """2-D weights at a byte, each 128x128 block 4 more; the rest 2 bytes, biases 4."""
    routed, dense, shared = 653_908_770_816, 3 * 3 * 18432 * 7168, 58 * 3 * 2048 * 7168
    q_a, q_b, kv_a, kv_b, o = 1536 * 7168, 24576 * 1536, 576 * 7168, 32768 * 512, 7168 * 16384
    attention = 61 * (q_a + q_b + kv_a + kv_b + o)
    # kv_a has 4.5 blocks of rows and as many scales as 5
    scales = (routed + dense + shared + attention) // 128**2 + 61 * 56 // 2
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    rest = 2 * (2 * 129280 * 7168 + 58 * 256 * 7168 + norms) + 4 * 58 * 256
    assert weight_bytes(preset("deepseek-v3"), "fp8") == (
        routed + dense + shared + attention + 4 * scales + rest
    )


def test_bytes_of_mtp_modules():
    v3 = preset("deepseek-v3")
    assert weight_bytes(v3, "bfloat16", mtp=True) == 2 * 11_610_068_224 + 2 * 256
    fp8, int4 = (weight_bytes(v3, form, mtp=True) / 1e9 for form in ("fp8", "w4afp8"))
    assert fp8 == pytest.approx(11.72, rel=1e-3) and int4 == pytest.approx(6.43, rel=1e-2)
    assert weight_bytes(preset("kimi-k2"), "fp8", mtp=True) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described(name):
    rows = dict(describe(preset(name)))
    counts = parameter_counts(preset(name))
    assert rows["parameters"] == f"{counts.total:,}"
    assert rows["active per token"] == f"{counts.active:,}"
    assert len(rows) == len(describe(preset(name))), "a row is there twice"


def test_what_is_said_of_v3():
    rows = dict(describe(preset("deepseek-v3")))
    assert rows["weights in fp8 (blocks 128x128)"] == "673.2 GB + 11.72 GB in MTP modules"
    assert rows["weights in fp8, experts int4"].endswith("trunk with bf16 scales 356.3 GB")
    assert rows["cache per token in bfloat16"] == "71,424 bytes (70,272 without MTP modules)"


def test_odd_widths_are_described():
    tiny = preset("tiny-v3")
    odd = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, moe_intermediate_size=31))
    assert "odd" in dict(describe(odd))["weights in fp8, experts int4"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["deepseek-v2", "kimi-k2", "tiny-v2"])
def test_rooflines_are_drawn(name, gpu, tmp_path):
    options = {"ep": 16, "context": 4096, "drafts": 1, "experts": "int4", "cache": "fp8_tile"}
    rows = roofline_rows(preset(name), gpu, **options)
    assert [row.floor.batch for row in rows] == list(BATCHES)
    text = io.StringIO()
    Console(file=text, width=200).print(roofline_table(rows, name))
    assert all(f"{row.floor.tokens_per_second:,.0f}" in text.getvalue() for row in rows)
    assert plot_roofline(rows, tmp_path / "plots" / "roofline.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts": "int3"}, "experts='int3' must be one of int4, fp8, bf16"),
        ({"cache": "int8"}, "cache='int8' must be one of bf16, fp8_tensor, fp8_tile"),
        ({"drafts": -1}, "drafts=-1"),
        ({"context": 0}, "context=0"),
        ({"gpu": "a100"}, "'a100'.*h200"),
    ],
)
def test_rooflines_refuse(change, match):
    options = {"ep": 1, "context": 1, "drafts": 0, "experts": "int4", "cache": "bf16"}
    with pytest.raises(ValueError, match=match):
        roofline_rows(preset("tiny-v3"), **{"gpu": "h20"} | options | change)
