"""`dskjax eplb`: the file it writes, and that bad input ends with one line that names it."""

import json

import numpy as np
import pytest

from dskjax.eplb import Layout, Placement, Policy, plan, replan
from tests.placements import ratio, zipf

LAYOUT = Layout(num_replicas=24, num_groups=4, num_nodes=2, num_gpus=8)
SIZES = ("--replicas", 24, "--groups", 4, "--nodes", 2, "--gpus", 8)


@pytest.fixture
def eplb(dskjax, tmp_path):
    """Runs `dskjax eplb` on `loads`; returns (exit code, stdout, stderr, what it wrote)."""

    def run(loads, *args, sizes=SIZES):
        np.save(tmp_path / "loads.npy", loads)
        out = tmp_path / "out" / "plan.json"
        code, printed, err = dskjax(
            "eplb", "--load", tmp_path / "loads.npy", "--out", out, *sizes, *args
        )
        return code, printed, err, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.mark.parametrize("policy", [None, *Policy])
def test_writes_the_plan(eplb, policy):
    loads = (1000 * zipf(3, 16, 1.0)).astype(np.int64)
    code, printed, err, result = eplb(loads, *(() if policy is None else ("--policy", policy)))
    assert code == 0, err
    policy = policy or Policy.GLOBAL_REFINED
    expected = plan(loads, LAYOUT, policy)
    assert {name: result[name] for name in expected.to_dict()} == expected.to_dict()
    assert result["settings"] == {
        "policy": policy,
        "num_replicas": 24,
        "num_groups": 4,
        "num_nodes": 2,
        "num_gpus": 8,
    }
    np.testing.assert_allclose(result["imbalance"]["after"], ratio(loads, expected, 8))
    plain = Placement.of(np.tile(np.arange(16), (3, 1)), 16)
    np.testing.assert_allclose(result["imbalance"]["before"], ratio(loads, plain, 8))
    assert np.shape(result["gpu_loads"]["after"]) == (3, 8)
    assert "moves" not in result
    for name in ("before", "after"):
        assert f"{np.mean(result['imbalance'][name]):.3f}" in printed


def test_a_plan_in_use_is_kept_where_it_can_be(eplb, tmp_path):
    old = zipf(3, 16, 1.0)
    loads = old * np.exp(0.3 * np.random.default_rng(0).standard_normal(old.shape))
    in_use = plan(old, LAYOUT)
    (tmp_path / "now.json").write_text(json.dumps(in_use.to_dict()))
    plot = tmp_path / "plots" / "loads.png"
    more = ("--current", tmp_path / "now.json", "--tolerance", 0.05, "--plot", plot)
    code, printed, err, result = eplb(loads, *more)
    assert code == 0, err
    expected = replan(in_use, loads, LAYOUT, tolerance=0.05)
    assert result["moves"] == expected.moves.tolist() and result["moves"]
    assert result["phy2log"] == expected.placement.phy2log.tolist()
    assert result["settings"]["tolerance"] == 0.05
    np.testing.assert_allclose(result["imbalance"]["before"], ratio(loads, in_use, 8))
    assert "slots that change" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "now.json").write_text(json.dumps(result))  # what it wrote, it reads
    code, _, err, result = eplb(loads, *more)
    assert code == 0 and result["moves"] == [], err


def test_gpus_that_do_not_divide_the_experts(eplb, tmp_path):
    loads = zipf(2, 10, 1.0)
    sizes = ("--replicas", 12, "--gpus", 4)
    code, printed, err, result = eplb(loads, "--plot", tmp_path / "a.png", sizes=sizes)
    assert code == 0, err
    assert result["imbalance"]["before"] is None and result["gpu_loads"]["before"] is None
    assert "-" in printed and (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("loads", "args", "message"),
    [
        (-np.ones((2, 16)), (), "loads.npy: load of layer 0, expert 0 is -1; expected 0 or more"),
        (np.full((2, 16), np.nan), (), "loads.npy: load of layer 0, expert 0 is nan"),
        (np.ones(16), (), "loads.npy: loads are float64 (16,); expected real numbers [layers"),
        (np.ones((2, 16), complex), (), "loads.npy: loads are complex128 (2, 16)"),
        (np.ones((2, 16)), ("--replicas", 25), "num_replicas=25 must be a multiple"),
        (np.ones((2, 16)), ("--replicas", 8), "num_replicas=8 is less than 16 experts"),
        (np.ones((2, 16)), ("--groups", 3, "--policy", "hierarchical"), "num_groups=3"),
        (np.ones((2, 16)), ("--load", "nowhere.npy"), "nowhere.npy: no such file; expected a .npy"),
        (np.ones((2, 16)), ("--current", "nowhere.json"), "nowhere.json: no such file; expected a"),
    ],
)
def test_bad_input_ends_with_one_line(eplb, loads, args, message):
    code, printed, err, result = eplb(loads, *args)
    assert code == 2 and result is None and not printed
    assert message in err and err.count("\n") == 1, err


def test_an_unknown_policy_is_refused(eplb):
    code, _, err, result = eplb(np.ones((2, 16)), "--policy", "best")
    assert code == 2 and result is None
    assert "best" in err and "global_refined" in err


GOOD = plan(np.ones((1, 2)), Layout(num_replicas=4, num_gpus=2)).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "is not a plan"),
        ([1], "not a JSON object"),
        ({"phy2log": [[0, 1]]}, "no 'log2phy'"),
        (GOOD | {"phy2log": [[0, 1], [0]]}, "phy2log has rows of unequal length"),
        (GOOD | {"phy2log": [0, 1]}, "phy2log must be 2 levels of lists of integers"),
        (GOOD | {"phy2log": [[0.5, 1, 0, 1]]}, "phy2log must be 2 levels of lists of integers"),
        (GOOD | {"logcnt": [[]]}, "logcnt must be 2 levels of lists of integers, not empty"),
        (GOOD | {"phy2log": [[0, 1, 2, 1]]}, "phy2log must be within 0..1"),
        (GOOD | {"phy2log": [[0, 1, -1, 1]]}, "phy2log must be within 0..1"),
        (GOOD | {"phy2log": [[0, 0, 0, 0]]}, "phy2log leaves an expert without a slot"),
        (GOOD | {"phy2log": [[0, 1, 1, 1]]}, "logcnt does not count the experts"),
        (GOOD | {"log2phy": [[[0, 1], [2, 2]]]}, "log2phy does not name the slots"),
        (GOOD, "placement in use has (layers, experts, slots) (1, 2, 4), the loads and the layout"),
    ],
)
def test_a_plan_in_use_that_is_none_is_refused(eplb, tmp_path, fields, message):
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "now.json").write_text(text)
    code, _, err, result = eplb(np.ones((2, 16)), "--current", tmp_path / "now.json")
    assert code == 2 and result is None
    assert message in err and err.count("\n") == 1, err
    if fields is not GOOD:
        assert "now.json is not a plan" in err


def test_a_plan_is_read_as_it_was_written():
    made = plan([[0, 0, 9, 0], [7, 5, 2, 2]], Layout(num_replicas=8, num_gpus=2), Policy.DEEPSEEK)
    assert made.log2phy.tolist() != Placement.of(made.phy2log, 4).log2phy.tolist()
    assert Placement.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_replicas_are_all_slots(dskjax, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, printed, _ = dskjax("eplb", "--help")
    assert code == 0 and "Slots of all GPUs together, not just the spare ones" in printed
