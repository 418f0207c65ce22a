"""Timelines of kernels, from traces made here: only a GPU makes real ones."""

import importlib
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex

timeline = importlib.import_module("benchmarks.kernel_timeline")


def trace(*phases):
    """Events of (thread, name, begin, end), in cycles."""
    events = []
    for thread, name, begin, end in phases:
        common = {"name": name, "tid": 1 + thread}
        events.append(common | {"ph": "B", "ts": begin / 1e3})
        events.append(common | {"ph": "E", "ts": end / 1e3})
    return events


TWO_BLOCKS = trace(
    (0, "Init", 0, 5),
    (0, "softmax", 10, 30),
    (0, "scores", 30, 90),
    (0, "softmax", 100, 140),
    (0, "scores", 150, 230),
    (1, "products", 20, 60),
    (2, "wait", 40, 45),
    (3, "softmax", 1000, 1010),
    (3, "softmax", 1200, 1210),
)


def test_phases_are_told_apart_by_thread_block_and_warpgroup():
    first, second = timeline.thread_blocks(TWO_BLOCKS)
    assert [name for name, *_ in first[0]] == ["softmax", "scores", "softmax", "scores"]
    assert first[0][1] == ("scores", pytest.approx(30), pytest.approx(90))
    assert [name for name, *_ in first[1]] == ["products"]
    assert [name for name, *_ in first[2]] == ["wait"]
    assert len(second[0]) == 2 and second[1:] == [[], []]


def test_cycles_are_medians_over_tiles_and_thread_blocks():
    blocks = timeline.thread_blocks(TWO_BLOCKS)
    found = timeline.medians(block[0] for block in blocks)
    assert found == pytest.approx({"softmax": 15, "scores": 70})
    assert timeline.period(blocks) == pytest.approx((90 + 200) / 2)


def test_the_first_tiles_are_left_out():
    phases = timeline.thread_blocks(TWO_BLOCKS)[0][0]
    assert timeline.phases_after(phases, 1) == phases[2:]
    assert timeline.phases_after(phases, 2) == [] and timeline.phases_after([], 2) == []


def test_launches_of_a_kernel_are_added_up():
    times = [("a", 0.001), ("b", 0.25), ("a", 0.002)]
    assert timeline.by_kernel(times) == pytest.approx({"a": 3.0, "b": 250.0})


def test_sequences_may_be_given_other_lengths():
    case = timeline.with_rows(timeline.op.CASES[0], 256)
    assert set(case.lens) == {256} and len(case.lens) == len(timeline.op.CASES[0].lens)
    assert str(case).endswith("with 256 rows")


def test_products_of_a_tile_at_the_peak():
    sizes = {"latent": 512, "rope": 64}
    bf16 = timeline.tensor_cycles(SimpleNamespace(kv="auto", **sizes))
    fp8 = timeline.tensor_cycles(SimpleNamespace(kv="fp8_tensor", **sizes))
    assert bf16 == 64 * 64 * (576 + 512) / 2048 and fp8 == bf16 - 64 * 64 * 576 / 4096


def test_a_picture_has_a_line_for_each_warpgroup_and_a_colour_for_each_phase():
    figure = timeline.draw(timeline.thread_blocks(TWO_BLOCKS)[0], "a case")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(timeline.WARPGROUPS)
    bars = [collection for collection in axes.collections if collection.get_paths()]
    assert sum(len(collection.get_paths()) for collection in bars) == 6
    assert len({to_hex(collection.get_facecolor()[0]) for collection in bars}) == 4


def test_refuses_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernel_timeline", "b128 kv4096 q1"])
    with pytest.raises(SystemExit):
        timeline.main()
    assert "JAX finds no GPU here" in capsys.readouterr().err
