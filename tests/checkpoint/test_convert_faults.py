"""Conversions that are killed, refused, or short of room; and how much memory they take."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dskjax.checkpoint import CheckpointError, Conversion, convert, load, save_params
from dskjax.checkpoint.from_hub import HubSource
from dskjax.config import ModelConfig
from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import draw, random_params, same_bits, tiny_config, write_folder

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}


@pytest.fixture
def source(tmp_path) -> Path:
    config = tiny_config(**SMALL)
    write_folder(tmp_path / "source", config, draw(config, BF16), files=2)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def stopped(monkeypatch):
    """Converts until so many weights are read, then fails as a broken disk does."""

    def stopped(source: Path, target: Path, conversion: Conversion, reads: int, error=5) -> None:
        read, left = HubSource.read, iter(range(reads))

        def broken(self, slot):
            if next(left, None) is None:
                raise OSError(error, os.strerror(error))
            return read(self, slot)

        with monkeypatch.context() as patch:
            patch.setattr(HubSource, "read", broken)
            convert(source, target, conversion)

    return stopped


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the weights that are read from now on."""
    read, names = HubSource.read, []

    def counted(self, slot):
        names.append(slot.name)
        return read(self, slot)

    monkeypatch.setattr(HubSource, "read", counted)
    return names


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        ({"max_shard_bytes": 40_000}, 9),
        ({"to": "orbax"}, 37),
        pytest.param({"max_shard_bytes": 40_000}, 1, marks=pytest.mark.full),
        pytest.param({"to": "orbax"}, 5, marks=pytest.mark.full),
    ],
)
def test_a_killed_conversion_goes_on(options, stride, source, tmp_path):
    """Killed before every STRIDEth of its steps (flush, rename, removal, read weight)."""
    folder = tmp_path / "killed"
    folder.mkdir()
    module = (sys.executable, "-m", "tests.checkpoint.killing")
    arguments = (str(source), str(folder), json.dumps(options), str(stride))
    done = subprocess.run([*module, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert len(steps) >= 4, steps
    read = [step["read"] for step in steps]
    assert read[0] > 60 and min(read) < read[0]  # what was done is not done again
    convert(source, tmp_path / "plain", Conversion(**options))
    expected = load(tmp_path / "plain")[0]
    for number in range(1, len(steps) * stride + 1, stride):
        target = folder / f"at{number}"
        if "to" in options:
            same_bits(load(target)[0], expected)
        else:
            assert content(target) == content(tmp_path / "plain")


def test_the_same_command_keeps_finished_files_and_another_is_refused(
    source, tmp_path, stopped, reads
):
    target, conversion = tmp_path / "b", Conversion(max_shard_bytes=40_000)
    with pytest.raises(OSError, match="Input/output error"):
        stopped(source, target, conversion, 60)
    assert not target.exists() and (tmp_path / ".b.part").is_dir()
    del reads[:]
    for change in ({"dtype": "float32"}, {"max_shard_bytes": 50_000}, {"to": "orbax"}):
        with pytest.raises(ValueError, match=r"was begun with conversion\..*--overwrite"):
            convert(source, target, Conversion(**{"max_shard_bytes": 40_000} | change))
    assert reads == [] and not target.exists()
    convert(source, target, conversion)
    assert 0 < len(reads) < 40
    convert(source, tmp_path / "plain", conversion)
    assert content(target) == content(tmp_path / "plain")


def test_a_source_that_changed_is_refused_until_told_to_begin_anew(source, tmp_path, stopped):
    target, conversion = tmp_path / "b", Conversion(max_shard_bytes=40_000)
    with pytest.raises(OSError, match="Input/output error"):
        stopped(source, target, conversion, 60)
    config = tiny_config(**SMALL)
    write_folder(source, config, draw(config, BF16, seed=1), files=2)
    with pytest.raises(ValueError, match=r"begun with source\.\S+ = '\d+ bytes, changed .*anew"):
        convert(source, target, conversion)
    convert(source, target, conversion, overwrite=True)
    same_bits(load(target)[0], load(source)[0])


def test_a_full_disk_is_named_and_what_is_done_is_kept(
    source, tmp_path, stopped, reads, monkeypatch
):
    target, conversion = tmp_path / "b", Conversion(max_shard_bytes=40_000)
    with pytest.raises(ValueError, match="the disk is full; .* the same command again"):
        stopped(source, target, conversion, 60, error=28)
    del reads[:]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ValueError, match=r"b needs 0\.00 GB, but .* has 0\.00 GB free"):
            convert(source, target, conversion)
        assert reads == []
        fresh = tmp_path / "no" / "folder" / "yet"
        with pytest.raises(ValueError, match=f"but {tmp_path} has"):
            convert(source, fresh, conversion)
        assert not (tmp_path / "no").exists()
    missing = 50_000  # less than all, more than what is not done yet
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=missing))
        with pytest.raises(ValueError, match="free some space"):
            convert(source, fresh, conversion)
        convert(source, target, conversion)
    same_bits(load(target)[0], load(source)[0])


# ------------------------------------------------------------------ refused


def test_a_place_that_is_taken(source, tmp_path, reads):
    target = tmp_path / "b"
    convert(source, target, Conversion())
    (target / "notes.txt").write_text("old")
    del reads[:]
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, target, Conversion(dtype="float32"))
    assert reads == []
    convert(source, target, Conversion(dtype="float32"), overwrite=True)
    assert load(target)[0]["norm"]["weight"].dtype == np.float32
    assert not (target / "notes.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a checkpoint folder"):
        convert(source, tmp_path / "home", Conversion(), overwrite=True)
    for place in (source, source.parent):
        with pytest.raises(ValueError, match="holds the source"):
            convert(source, place, Conversion(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "home", "source"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "gguf"}, "to='gguf' must be one of hf, orbax"),
        ({"dtype": "int8"}, "dtype=int8 must be bfloat16"),
        ({"quantise": "int2"}, "quantise='int2' must be one of fp8, w4afp8"),
        ({"quantise": "fp8", "dequantise": True}, "exclude each other"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be positive"),
    ],
)
def test_options_that_do_not_exist(options, says):
    with pytest.raises(ValueError, match=says):
        Conversion(**options)


def test_what_no_format_holds_is_refused_before_anything_is_written(source, tmp_path, reads):
    with pytest.raises(NotImplementedError, match="is int4 with 16 inputs, which groups of 128"):
        convert(source, tmp_path / "b", Conversion(quantise="w4afp8"))
    assert reads == []
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 12}
    config = tiny_config(**SMALL, **heads)  # of 20 rows: the 256th is amid rotary ones
    write_folder(tmp_path / "c", config, draw(config, BF16))
    for to in ("hf", "orbax"):
        with pytest.raises(NotImplementedError, match="q_b_proj.*more than one block of 128 rows"):
            convert(tmp_path / "c", tmp_path / "b", Conversion(quantise="fp8", to=to))
    assert reads == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "source"]


def test_damage_on_the_way_leaves_no_target(tmp_path):
    made = by_hand.config(by_hand.PACKED, **SMALL)
    tensors = by_hand.make(made, by_hand.all_of("words")).tensors
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][1, 0] = np.nan
    write_folder(tmp_path / "a", made, tensors)
    with pytest.raises(CheckpointError, match=f"{name}.*holds nan"):
        convert(tmp_path / "a", tmp_path / "b", Conversion())
    assert not (tmp_path / "b").exists()


def test_a_flipped_byte_of_an_orbax_part_is_seen(tmp_path):
    cfg = ModelConfig.from_hf(tiny_config(**SMALL))
    save_params(tmp_path / "a", random_params(cfg, BF16), cfg)
    largest = max((tmp_path / "a" / "layer-00001").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError, match="layer-00001.*SHA-256 differs"):
        convert(tmp_path / "a", tmp_path / "b", Conversion())


# ------------------------------------------------------------------ memory

MEMORY = """
import json, re, sys, threading, time
from pathlib import Path
from dskjax.checkpoint import Conversion, convert

def rss():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

source, target, options = sys.argv[1:]
warm = sys.argv[1] + "-warm"
convert(warm, target + "-warm", Conversion(**json.loads(options)))
before, peak, done = rss(), [0], threading.Event()

def sample():
    while not done.wait(0.002):
        peak[0] = max(peak[0], rss())

thread = threading.Thread(target=sample)
thread.start()
convert(source, target, Conversion(**json.loads(options)))
done.set()
thread.join()
print((peak[0] - before) // 1024)
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A model of many layers: 6.3 MB each, 250 MB in all; and one of few."""
    folder = tmp_path_factory.mktemp("long")
    for name, layers in (("model", 40), ("model-warm", 2)):
        config = tiny_config(num_hidden_layers=layers, num_nextn_predict_layers=0)
        config |= {"hidden_size": 512, "first_k_dense_replace": layers, "intermediate_size": 1800}
        write_folder(folder / name, config, draw(config, BF16), files=4)
    return folder / "model"


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"max_shard_bytes": 30_000_000}, 30),
        ({"dequantise": True, "dtype": "float32"}, 30),
        ({"quantise": "fp8"}, 60),
        ({"to": "orbax"}, 60),
    ],
)
def test_memory_is_that_of_a_weight_or_a_layer(options, limit, long, tmp_path):
    """MiB above what a conversion of a small model of the same width took."""
    size = sum(path.stat().st_size for path in long.iterdir()) >> 20
    assert size > 200
    arguments = (str(long), str(tmp_path / "b"), json.dumps(options))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
