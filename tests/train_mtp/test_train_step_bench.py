"""`benchmarks/train_step.py`: every part is timed and written, and what fails is a row."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import kernel_shares, train_step
from pallas_kernels.testing.bench import Ceilings
from tests.train_mtp import toy
from train_mtp import flops

MODEL = dataclasses.replace(toy.model(modules=0), num_hidden_layers=1, first_k_dense_replace=0)
CEILINGS = Ceilings(matmul_tflops=2.0, fp8_tflops=4.0, read_gbs=1.0, copy_gbs=1.0)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the benchmark of a toy; returns what it wrote."""
    monkeypatch.setattr(train_step, "RUNS", 2)
    monkeypatch.setattr(train_step, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(train_step, "load_config", lambda _: MODEL)

    def run(*options):
        out = tmp_path / "step.json"
        sizes = ["--model", "toy", "--rows", "2", "--seq-len", "16"]
        monkeypatch.setattr("sys.argv", ["train_step", *sizes, "--out", str(out), *options])
        with toy.quick_compiler():
            train_step.main()
        return json.loads(out.read_text())

    return run


def check(row, tokens=2 * 16):
    """What every row must say of itself."""
    assert row["step_us"]["samples"] == 2 and row["mfu"] is None  # nobody knows a CPU's peak
    assert row["tokens_per_s"] == pytest.approx(tokens * 1e6 / row["back_to_back_us"])
    share = row["tokens_per_s"] * row["flops_per_token"] / 2e12
    assert row["mfu_of_ceiling"] == pytest.approx(share)
    # fp32 weights, two moments of those that learn, a few counters
    assert row["aliased_bytes"] == row["state_bytes"] < 13 * row["trained_parameters"]
    assert np.isfinite(row["metrics"]["total_loss"]) and "failed" not in row


def test_a_pretraining_step_is_timed(bench):
    report = bench("--documents", "2")
    (row,) = report["rows"]
    assert report["ceilings"]["matmul_tflops"] == 2.0
    check(row)
    assert row["part"] == "pretraining" and row["frozen_bytes"] == 0
    assert row["flops_per_token"] == flops.pretraining(MODEL, 8, "bfloat16").flops
    assert row["metrics"]["tokens"] == 2 * 2 * 7  # the last of a document has no label


@pytest.mark.full
@pytest.mark.parametrize("weights", ["independent", "shared"])
def test_a_step_of_heads_is_timed(bench, weights):
    (row,) = bench("--heads", "2", "--weights", weights, "--no-pretraining")["rows"]
    check(row)
    assert row["part"] == "heads" and row["frozen_bytes"] > 0
    assert row["flops_per_token"] == flops.heads(MODEL, 2, 16, "bfloat16").flops


def test_a_part_that_does_not_fit_is_a_row(bench, monkeypatch):
    def compiled(part, batch):
        if part.name == "heads":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        raise ValueError("no such kernel")

    monkeypatch.setattr(train_step, "compiled", compiled)
    (row,) = bench("--heads", "1", "--no-pretraining")["rows"]
    assert row["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert row["trained_parameters"] > 0 and "step_us" not in row
    with pytest.raises(SystemExit, match="no such kernel"):  # and is told of in the end
        bench("--heads", "1")


def test_time_is_shared_out_by_kind_and_scope():
    program = """
      %loop_add_fusion.16 = f32[8]{0} fusion(%x), metadata={op_name="jit(step)/optimizer/add"}
      %input_fusion.2 = bf16[8]{0} fusion(%x), metadata={op_name="transpose(jvp(loss))/exp"}
      %gather = bf16[8]{0} fusion(%x), metadata={op_name="jit(step)/moe/experts/expert_mlp/gather"}
      %copy.1 = bf16[8]{0} copy(%x), metadata={op_name="jit(step)/convert"}
    """
    where = kernel_shares.scopes(program)
    assert where == {
        "loop_add_fusion_16": "optimizer",
        "input_fusion_2": "loss",
        "gather": "expert_mlp",
    }
    kernels = [
        ("nvjet_hsh_128x256", 50.0, 4),
        ("grouped_matmul_bf16_128_t", 30.0, 3),
        ("grouped_matmul_dw_256", 15.0, 3),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 20.0, 1),
        ("loop_add_fusion_16", 40.0, 1),
        ("gather", 5.0, 1),
        ("copy_1", 1.0, 1),
    ]
    found = kernel_shares.shares(kernels, where)
    assert found["by_kind_us"] == {
        "attention": 20.0,
        "expert products": 45.0,
        "dense products": 50.0,
        "rest": 46.0,
    }
    assert found["rest_us"] == {"optimizer": 40.0, "expert_mlp": 5.0, "elsewhere": 1.0}
    assert [name for name, _ in found["largest"]] == [
        "dense products",
        "expert products",
        "rest: optimizer",
    ]
    assert found["kernels_us"] == 161.0 and found["launches"] == 14
    rates = kernel_shares.rates({"attention": 2e9, "dense products": 0.0}, found["by_kind_us"])
    assert rates == {"attention": pytest.approx(100), "dense products": 0.0}
    assert kernel_shares.rates({"attention": 1.0}, {"attention": 0.0}) == {}
