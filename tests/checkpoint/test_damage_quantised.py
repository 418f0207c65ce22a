"""Quantized folders that are damaged, contradict themselves or are of another kind."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dskjax.checkpoint import CheckpointError, load_hf
from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import write_folder
from tests.checkpoint.quantised import AWQ, E4M3, FP8, PACKED, W4AFP8, all_of, experts_of
from tests.checkpoint.spoil import Damage, config, damage, edit, put
from tests.checkpoint.spoil_quantised import CASES, FACTORS, FP8_CASES

BF16 = ml_dtypes.bfloat16
KINDS = {
    "fp8": (FP8, all_of("fp8")),
    "w4afp8": (W4AFP8, experts_of("int8", "fp8")),
    "words": (PACKED, all_of("words")),
    "pairs": (AWQ, all_of("row_pairs")),
    "plain": (None, all_of("plain")),
}


LATE = ("scale NaN", "scale infinite", "scale e8m0 NaN", "int4 scale NaN", "shape contradicts")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound folder of each kind; it must load."""
    places = {}
    for kind, (told, form_of) in KINDS.items():
        places[kind] = tmp_path_factory.mktemp(kind) / "model"
        made = by_hand.make(by_hand.config(told), form_of)
        write_folder(places[kind], by_hand.config(told), made.tensors, files=3)
        load_hf(places[kind])
    return places


def refused(folder: Path, spoilt: Damage, **options: Any) -> None:
    """The error names the culprit; no file stays open and no thread runs on."""
    handles, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with pytest.raises(spoilt.error) as error:
        load_hf(folder, **options)
    message = str(error.value)
    assert str(folder) in message
    for part in spoilt.says:
        assert part in message, message
    assert len(os.listdir("/proc/self/fd")) == handles
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k, cases in CASES.items() for c in cases])
def test_message_names_the_culprit(kind, case, good, tmp_path):
    folder = shutil.copytree(good[kind], tmp_path / "model")
    CASES[kind][case].do(folder)
    refused(folder, CASES[kind][case])
    if case in LATE:
        refused(folder, CASES[kind][case], quantised="dequantise")
        refused(folder, CASES[kind][case], layers="separate")


def test_factors_must_be_finite(good, tmp_path):
    folder = shutil.copytree(good["pairs"], tmp_path / "model")
    factors = np.ones(64, np.float32)
    factors[5] = np.inf
    put(FACTORS, factors)(folder)
    refused(folder, damage(put, f"'{FACTORS}' holds inf at [5]"), quantised="dequantise")


def test_rotary_rows_that_straddle_blocks_are_refused_or_dequantised(tmp_path, monkeypatch):
    """In blocks of 20 rows, rows 16..23 of a head have two scales, so they cannot change places."""
    monkeypatch.setattr(by_hand, "BLOCK", (20, 24))
    told = {**FP8, "weight_block_size": [20, 24]}
    made = by_hand.make(by_hand.config(told), all_of("fp8"))
    write_folder(tmp_path, by_hand.config(told), made.tensors)
    spoilt = damage(put, "rotary rows of 'model.layers.0.self_attn.q_b_proj.weight'", "of 20 rows")
    refused(tmp_path, spoilt)
    params, _ = load_hf(tmp_path, quantised="dequantise", dtype=np.float32)
    heads = made.real["model.layers.0.self_attn.q_b_proj.weight"].reshape(4, 24, 64)
    order = [*range(16), 16, 18, 20, 22, 17, 19, 21, 23]
    found = params["dense_layers"]["self_attn"]["q_b_proj"][0]
    assert np.array_equal(found, heads[:, order].reshape(96, 64))
    # half-split in the files: nothing moves, so nothing stands in the way
    config(rope_interleave=False)(tmp_path)
    load_hf(tmp_path)


def test_a_head_that_is_quantized_is_dequantised(good, tmp_path):
    folder = shutil.copytree(good["fp8"], tmp_path / "model")
    FP8_CASES["head quantized"].do(folder)
    put("lm_head.weight", np.ones((48, 64), E4M3))(folder)
    put("lm_head.weight_scale_inv", np.full((3, 3), 0.5, np.float32))(folder)
    params, _ = load_hf(folder, quantised="dequantise")
    assert (np.asarray(params["lm_head"]["weight"], np.float32) == 0.5).all()


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_error_or_harmless(seed, good, tmp_path):
    """A tensor lost, cut, cast or renamed: never another exception than the documented ones."""
    rng = np.random.default_rng(seed)
    kind = ("fp8", "w4afp8", "words", "pairs")[seed % 4]
    folder = shutil.copytree(good[kind], tmp_path / "model")

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = str(rng.choice(sorted(n for n in tensors if ".layers.1." in n)))
        value = tensors.pop(name)
        how = rng.integers(4)
        if how == 1:
            tensors[name] = value[: len(value) // 2] if value.ndim else value
        elif how == 2:
            dtypes = (np.float32, BF16, np.int8, np.uint8, np.int32, E4M3)
            tensors[name] = value.astype(np.float32).astype(dtypes[rng.integers(len(dtypes))])
        elif how == 3:
            suffixes = (".weight", ".weight_scale", ".weight_scale_inv", ".weight_packed")
            tensors[name.rsplit(".", 1)[0] + suffixes[rng.integers(4)]] = value

    edit(folder, change)
    try:
        load_hf(folder)
    except (CheckpointError, NotImplementedError) as error:
        assert str(folder) in str(error)
