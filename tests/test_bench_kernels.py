"""`dskjax bench kernels`: what it lists, runs and refuses; the table of tiles, by made-up times."""

import dataclasses
import functools
import importlib
import json
import sys
import types

import pytest

from benchmarks import kernels
from pallas_kernels.testing.bench import Ceilings

EVERY = [
    (op, module, case) for op, found in kernels.chosen_cases([]).items() for module, case in found
]
OTHER_DEVICE = {"router": {"b": {"us": 1.0}}}


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int
    registers: tuple[int, int] = (24, 240)


class Op:
    """A module of cases whose implementations take as long as it says.

    Args:
        times: {tiles: (kernels' microseconds or None, wall-clock ones), or the error it ends with},
            the usual ones first.
        fits: whether inputs do.
    """

    CASES = ("a", "b")

    def __init__(self, times, fits=True):
        self.times, self.fits, self.ran = times, fits, []

    def make(self, case):
        if not self.fits:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return {}

    def answers(self, case, inputs):
        return case

    def implementations(self, case, sweep, others):
        usual, *rest = self.times
        yield "ours", usual, usual
        yield "ours op", "op", None
        if others:
            yield "xla", "xla"  # also without tiles
        if sweep:
            for tiles in rest:
                yield f"ours rows {tiles.rows}", tiles, tiles

    def check(self, run, case, answers):
        self.ran.append((case, run))
        if isinstance(self.times.get(run), Exception):
            raise self.times[run]
        return {"random": 1e-3}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Lets ops of this file run, as if on a GPU; {name: op}."""
    ops = {}
    results = tmp_path / "results"  # instead of the committed ones
    results.mkdir()
    monkeypatch.setattr(kernels, "RESULTS", results)

    def timed(op, case, inputs, run, top):
        ours, wall = op.times.get(run, (5.0, 6.0))
        spread = {"p5": 1.0, "p95": 99.0, "samples": 25}
        return {
            "wall_us": {"median": wall} | spread,
            "kernels_us": ours and {"median": ours} | spread,
            "tflops": 1.0,
            "gbs": 1.0,
            "part_of_floor": 0.5,
            "others_us": {},
        }

    def cases(words):
        return {name: [(op, case) for case in op.CASES] for name, op in ops.items()}

    ceilings = Ceilings(matmul_tflops=1.0, fp8_tflops=1.0, read_gbs=1.0, copy_gbs=1.0)
    monkeypatch.setattr(kernels, "timed", timed)
    monkeypatch.setattr(kernels, "chosen_cases", cases)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels.jax, "devices", lambda: [types.SimpleNamespace(device_kind="H100")])
    monkeypatch.setattr(kernels, "source_commit", lambda: "abc")
    return ops


def test_lists_every_op_and_case_without_a_gpu(dskjax):
    code, printed, err = dskjax("bench", "kernels", "--list")
    assert code == 0, err
    lines = printed.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(kernels.OPS)
    assert [line[2:] for line in lines if line.startswith(" ")] == [str(c) for *_, c in EVERY]


def test_lists_the_cases_asked_for(dskjax):
    code, printed, err = dskjax(
        *("bench", "kernels", "--list", "router:* t128", "mla_decode:b32 * q1", "router:*v3 t*")
    )
    assert code == 0, err
    names = ["deepseek-v3 t128", "deepseek-v2 t128", "kimi-k2 t128", "deepseek-v3 t4096"]
    assert printed.splitlines() == [
        *("router", *(f"  {name}" for name in names)),
        *("mla_decode", "  b32 kv8192 q1"),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rooter"], ["no op 'rooter'", *kernels.OPS]),
        (["router:t7"], ["no case of router is called 't7'", "kimi-k2 t4096"]),
    ],
)
def test_a_wrong_name_ends_with_the_right_ones(dskjax, words, told):
    code, _, err = dskjax("bench", "kernels", *words)
    assert code == 2
    assert all(part in err for part in told), err


def test_without_a_gpu_nothing_runs(dskjax, monkeypatch):
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "cpu")
    code, _, err = dskjax("bench", "kernels", "router", "--check")
    assert code == 2
    assert "no GPU" in err


def test_without_a_checkout_it_says_what_to_do(dskjax, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.kernels", None)
    code, _, err = dskjax("bench", "kernels", "--list")
    assert code == 2
    assert "clone it" in err and "pip install -e ." in err


def test_a_package_missing_in_a_checkout_is_not_taken_for_that(dskjax, monkeypatch):
    find = importlib.import_module

    def missing(name, package=None):
        if name == "benchmarks.kernels":
            raise ModuleNotFoundError("no triton_of_mars", name="triton_of_mars")
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="triton_of_mars"):
        dskjax("bench", "kernels", "--list")


def test_runs_what_is_asked_for(dskjax, gpu, tmp_path):
    few, many = Tiles(8), Tiles(16)
    gpu["mine"] = op = Op({few: (10.0, 11.0), many: (9.0, 10.0)})
    ways = {
        (): [few, "op"],
        ("--others",): [few, "op", "xla"],
        ("--sweep",): [few, "op", many],
        ("--tiles", "*rows 16 *"): [many],
        ("--tune", "--out", tmp_path): [few, many],
    }
    for options, ran in ways.items():
        op.ran.clear()
        code, printed, err = dskjax("bench", "kernels", *options)
        assert code == 0, err
        assert op.ran == [(case, run) for case in op.CASES for run in ran], options
    assert "9.0 us" in printed


def test_writes_rows_with_tiles_and_where_they_come_from(dskjax, gpu, tmp_path):
    gpu["mine"] = Op({Tiles(8): (10.0, 11.0)})
    code, _, err = dskjax("bench", "kernels", "--out", tmp_path / "new")
    assert code == 0, err
    result = json.loads((tmp_path / "new" / "kernels-mine.json").read_text())
    assert result["device"] == "H100" and result["commit"] == "abc"
    assert result["ceilings"] == result["ceilings_after"]
    first, second = result["rows"][:2]
    assert first["tiles"] == {"rows": 8, "registers": [24, 240]} and "tiles" not in second
    assert first["kernels_us"]["median"] == 10.0 and first["errors"] == {"random": 1e-3}


@pytest.mark.parametrize("fits", [True, False])
def test_what_fails_is_told_by_the_exit_status(dskjax, gpu, fits):
    gpu["mine"] = Op({Tiles(8): ValueError("off by 0.5")}, fits)
    code, printed, err = dskjax("bench", "kernels")
    assert code == 1
    assert ("off by 0.5" if fits else "RESOURCE_EXHAUSTED") in printed
    assert "2 of " in err  # both cases


def test_the_table_has_the_fastest_tiles_that_are_right_and_fit(dskjax, gpu, tmp_path):
    wrong, large = ValueError("off by 0.5"), RuntimeError("no room in shared memory")
    best = Tiles(16, (40, 232))
    gpu["mine"] = Op(
        {
            Tiles(8): (10.0, 11.0),
            Tiles(32): (9.5, 10.5),
            best: (9.0, 10.0),
            Tiles(64): wrong,
            Tiles(128): large,
        }
    )
    code, printed, err = dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    assert code == 0, err
    entry = {
        "best": {"rows": 16, "registers": [40, 232]},
        "us": 9.0,
        "default": {"rows": 8, "registers": [24, 240]},
        "default_us": 10.0,
        "timed_by": "kernels_us",
        "tried": 5,
        "failed": {
            "ours rows 64": "ValueError: off by 0.5",
            "ours rows 128": "RuntimeError: no room in shared memory",
        },
        "commit": "abc",
    }
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table == {"H100": {"mine": {"a": entry, "b": entry}}}
    assert "mine a: 9.0 us, 10 % less than 10.0" in printed
    assert (tmp_path / "tune-mine.json").exists()
    assert not (tmp_path / "kernels-mine.json").exists()


def test_the_table_is_among_the_committed_results_by_default(dskjax, gpu):
    gpu["mine"] = Op({Tiles(8): (10.0, 11.0)})
    code, _, err = dskjax("bench", "kernels", "--tune")
    assert code == 0, err
    assert [path.name for path in kernels.RESULTS.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(("usual", "told"), [(9.2, False), (9.3, True)])
def test_tiles_that_gain_little_are_not_told(dskjax, gpu, tmp_path, usual, told):
    gpu["mine"] = Op({Tiles(8): (usual, 11.0), Tiles(16): (9.0, 10.0)})
    _, printed, _ = dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    assert ("less than" in printed) == told


def test_usual_tiles_that_fail_are_told(dskjax, gpu, tmp_path):
    gpu["mine"] = Op({Tiles(8): ValueError("off by 0.5"), Tiles(16): (9.0, 10.0)})
    _, printed, _ = dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    assert "mine b: the usual tiles fail; 9.0 us" in printed
    entry = json.loads((tmp_path / "tiles.json").read_text())["H100"]["mine"]["b"]
    assert entry["default_us"] is None and entry["us"] == 9.0


def test_tiles_are_compared_by_one_clock(dskjax, gpu, tmp_path):
    gpu["mine"] = Op({Tiles(8): (10.0, 11.0), Tiles(16): (9.0, 12.0), Tiles(32): (None, 13.0)})
    dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    entry = json.loads((tmp_path / "tiles.json").read_text())["H100"]["mine"]["a"]
    assert (entry["best"]["rows"], entry["us"], entry["timed_by"]) == (8, 11.0, "wall_us")


def test_a_table_keeps_what_was_not_measured_again(dskjax, gpu, tmp_path):
    path = tmp_path / "tiles.json"
    old = {"us": 1.0}
    before = {"H200": OTHER_DEVICE, "H100": {"mine": {"a": old, "c": old}, "bad": {"a": old}}}
    path.write_text(json.dumps(before))
    gpu["mine"] = Op({Tiles(8): (10.0, 11.0)})
    gpu["bad"] = Op({Tiles(8): ValueError("off by 0.5")})
    code, _, err = dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    assert code == 0, err
    after = json.loads(path.read_text())
    assert after["H200"] == OTHER_DEVICE
    assert after["H100"]["bad"] == {"a": old}  # nothing right was found
    mine = after["H100"]["mine"]
    assert mine["c"] == old and mine["a"]["us"] == mine["b"]["us"] == 10.0
    assert kernels.table_text(after) + "\n" == path.read_text()


def test_an_op_without_tiles_is_left_out_of_the_table(dskjax, gpu, tmp_path):
    gpu["mine"] = op = Op({None: (10.0, 11.0)})
    code, printed, err = dskjax("bench", "kernels", "--tune", "--out", tmp_path)
    assert code == 0, err
    assert not op.ran and "mine: has no tiles" in printed
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize("option", ["--check", "--others"])
def test_tiles_are_not_chosen_without_times_or_with_others(dskjax, gpu, option):
    gpu["mine"] = op = Op({Tiles(8): (10.0, 11.0)})
    code, _, err = dskjax("bench", "kernels", "--tune", option)
    assert code == 2
    assert "leave out --check and --others" in err and not op.ran


def of_run(run):
    """The tiles that what an op's module runs has with it, None for the usual ones."""
    if isinstance(run, tuple):  # moe_permute
        return run[1] or None
    if isinstance(run, functools.partial):
        return run.keywords.get("tiles") or run.keywords
    return getattr(run, "tiles", getattr(run, "cut", None))


def plain(tiles):
    """Values without the names of fields."""
    if isinstance(tiles, dict):
        return {key: plain(value) for key, value in tiles.items()}
    if dataclasses.is_dataclass(tiles) and not isinstance(tiles, type):
        return dataclasses.astuple(tiles)
    return tiles


@pytest.mark.parametrize("op", kernels.OPS)
def test_variants_have_the_tiles_they_run_with_and_no_two_the_same(op):
    for module, case in (found[1:] for found in EVERY if found[0] == op):
        ways = kernels.variants(module, case, sweep=None, others=False, tune=True)
        seen = [json.dumps(kernels.fields(way.tiles)) for way in ways]
        assert len(set(seen)) == len(seen), case
        assert all(plain(of_run(way.run)) == plain(way.tiles) for way in ways[1:]), case
        assert not ways or of_run(ways[0].run) is None and len(ways) > 1, case


def test_tiles_of_several_kernels_are_written_by_name():
    both = {"for_keys": Tiles(8), "for_queries": Tiles(16, (40, 232)), "warps": 4}
    assert kernels.fields(both) == {
        "for_keys": {"rows": 8, "registers": (24, 240)},
        "for_queries": {"rows": 16, "registers": (40, 232)},
        "warps": 4,
    }


def test_the_committed_table_is_of_cases_that_there_are():
    path = kernels.RESULTS / kernels.TABLE
    text = path.read_text()
    table = json.loads(text)
    assert text == kernels.table_text(table) + "\n"
    known = {(op, str(case)) for op, _, case in EVERY}
    entries = [
        (op, case, entry)
        for ops in table.values()
        for op, cases in ops.items()
        for case, entry in cases.items()
    ]
    assert entries
    for op, case, entry in entries:
        assert (op, case) in known
        assert entry["commit"] and entry["tried"] > len(entry["failed"])
        assert entry["default_us"] is None or entry["us"] <= entry["default_us"]
        if source := entry.get("source"):
            assert json.loads((path.parent / source).read_text())["commit"] == entry["commit"]
