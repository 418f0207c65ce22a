"""Operations per token against the arithmetic of DeepSeek-V3's published shapes."""

import dataclasses
from types import SimpleNamespace

import pytest

from dskjax.presets import deepseek_v3
from train_mtp import flops
from train_mtp.flops import Speed

V3 = deepseek_v3()


def test_forward_pass_of_deepseek_v3():
    # 71.4 GFLOP in linear layers, 1.85 in the head, 5.0 per 1,000 tokens of average context
    assert flops.trunk_flops(V3, 2) == pytest.approx(71.4e9 + 1.85e9, rel=2e-3)
    more = flops.trunk_flops(V3, 2002) - flops.trunk_flops(V3, 2)
    assert more == pytest.approx(5.0e9, rel=2e-3)


def test_module_is_a_layer_and_its_projection():
    # attention 187.1M, 9 experts of 44.04M, gate 256 x 7168, eh_proj 7168 x 14336
    weights = 187.1e6 + 9 * 44.04e6 + 256 * 7168 + 2 * 7168**2
    assert flops.module_flops(V3, 2) == pytest.approx(2 * weights, rel=2e-3)


def test_kinds_of_kernels_share_out_the_forward_pass():
    kinds = flops.trunk_kinds(V3, 4096)
    # 58 layers of 8 chosen experts, each three matrices of 7168 x 2048
    assert kinds["expert products"] == 2 * 58 * 8 * 3 * 7168 * 2048
    assert kinds["attention"] == 61 * 2 * 128 * (192 + 128) * 2048
    assert sum(kinds.values()) == flops.trunk_flops(V3, 4096)
    dense = dataclasses.replace(V3, moe=None, first_k_dense_replace=61, mtp=type(V3.mtp)())
    assert flops.trunk_kinds(dense, 4096)["expert products"] == 0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H20", 148e12)],
)
def test_peaks_are_those_of_the_device(monkeypatch, kind, peak):
    monkeypatch.setattr(flops.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(flops.jax, "device_count", lambda: 2)
    assert flops.peak_of("bfloat16") == 2 * peak
    assert flops.peak_of("float32") is None


def test_what_is_frozen_has_no_backward_pass():
    whole = flops.pretraining(V3, 2, "float32").flops
    module, head = flops.module_flops(V3, 2), 2 * V3.vocab_size * V3.hidden_size
    assert whole == 3 * (flops.trunk_flops(V3, 2) + module + head)
    for depths in (1, 3):
        found = flops.heads(V3, depths, 2, "float32").flops
        assert found == flops.trunk_flops(V3, 2) + depths * (3 * module + 2 * head)
    bare = dataclasses.replace(V3, mtp=type(V3.mtp)())
    assert flops.pretraining(bare, 2, "float32").flops == 3 * flops.trunk_flops(V3, 2)


def test_mfu_needs_a_peak_and_a_speed():
    assert Speed(flops=2e9, peak=1e15).mfu(1e5) == pytest.approx(0.2)
    assert Speed(flops=2e9, peak=1e15).mfu(float("nan")) is None
    assert flops.heads(V3, 1, 2, "bfloat16").mfu(1e5) is None  # nobody knows a CPU's peak
