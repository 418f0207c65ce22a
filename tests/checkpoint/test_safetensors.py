"""The file format: agreement with the public package, and an error for every way to be wrong."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskjax.checkpoint import safetensors as ours
from dskjax.checkpoint.safetensors import CheckpointError, Pending, SafetensorsFile
from tests.checkpoint.build import raw_file, read_file, write_file

VALUES = {
    "vector": np.arange(5, dtype=np.float32),
    "matrix": np.linspace(-2, 2, 12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "half": np.float16([[1.5], [2.5]]),
    "scalar": np.array(7.25, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "deep": np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4),
}


def pending(values):
    return [Pending(name, w.dtype, w.shape, lambda w=w: w) for name, w in values.items()]


def test_reads_what_the_package_writes(tmp_path):
    write_file(tmp_path / "a", VALUES)
    with SafetensorsFile(tmp_path / "a") as file:
        assert set(file.entries) == set(VALUES)
        assert file.metadata == {"format": "pt"}
        for name, expected in VALUES.items():
            found = file.read(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()


def test_writes_what_the_package_reads(tmp_path):
    ours.write(tmp_path / "a", pending(VALUES), {"format": "pt", "made by": "ünïts"})
    found = read_file(tmp_path / "a")
    assert set(found) == set(VALUES)
    for name, expected in VALUES.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].tobytes() == expected.tobytes()
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.metadata["made by"] == "ünïts"
        assert all(
            e.offset % ours.numpy_dtype(e.dtype).itemsize == 0 for e in file.entries.values()
        )


def test_reads_rows_into_a_given_buffer(tmp_path):
    write_file(tmp_path / "a", VALUES)
    out = np.full((4, 4), -1, ml_dtypes.bfloat16)
    with SafetensorsFile(tmp_path / "a") as file:
        file.read("matrix", 1, 3, out[1:3])
        assert file.read("deep", 1, 2).tolist() == VALUES["deep"][1:2].tolist()
        assert file.read("empty", 0, 0).shape == (0, 3)
    assert out[1:3].tolist() == VALUES["matrix"][1:3].tolist()
    assert (out[0] == -1).all() and (out[3] == -1).all()


def test_any_bits_survive_both_ways(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)  # every bf16 there is, each NaN included
    ours.write(tmp_path / "a", pending({"w": bits.view(ml_dtypes.bfloat16)}))
    with SafetensorsFile(tmp_path / "a") as file:
        assert np.array_equal(file.read("w").view(np.uint16), bits)


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "a").write_text("precious")
    with pytest.raises(FileExistsError):
        ours.write(tmp_path / "a", pending(VALUES))
    assert (tmp_path / "a").read_text() == "precious"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


D8, D16 = bytes(8), bytes(16)
DAMAGED = {
    "empty file": (b"", "holds 0 bytes"),
    "half a length": (b"\1\0\0", "holds 3 bytes"),
    "header past the end": (raw_file({}, length=99), "claims 99 bytes; expected at most 2 in a"),
    "header huge": (raw_file({}, length=2**63), f"claims {2**63} bytes"),
    "not safetensors": (b"PK\3\4" + bytes(99), "claims 67324752 bytes; expected at most 95"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "header: not readable as UTF-8 JSON"),
    "not JSON": (raw_file(b"{'a': 1}"), "header: not readable as UTF-8 JSON"),
    "no header": (raw_file(b""), "header: not readable as UTF-8 JSON"),
    "list": (raw_file([1]), "header: expected a JSON object, found list"),
    "number": (raw_file(b"3"), "header: expected a JSON object, found int"),
    "too deep": (raw_file(b"[" * 200_000), "header: not readable as UTF-8 JSON"),
    "NaN": (raw_file(b'{"w": NaN}'), "NaN is not JSON"),
    "huge integer": (raw_file(b'{"w": ' + b"9" * 9999 + b"}"), "not readable as UTF-8 JSON"),
    "tensor twice": (
        raw_file(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2), D8),
        "key 'w' occurs twice",
    ),
    "field twice": (
        raw_file(b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'),
        "key 'dtype' occurs twice",
    ),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "__metadata__ must map strings"),
    "metadata a list": (raw_file({"__metadata__": []}), "__metadata__ must map strings"),
    "tensor a number": (raw_file({"w": 3}), "tensor 'w': expected dtype, shape and data_offsets"),
    "no dtype": (
        raw_file({"w": {"shape": [], "data_offsets": [0, 0]}}),
        "tensor 'w': expected dty",
    ),
    "unknown dtype": (
        raw_file({"w": entry("F33")}, D8),
        "tensor 'w': unknown dtype 'F33'; known: ",
    ),
    "dtype a list": (raw_file({"w": entry(["F32"])}, D8), "unknown dtype ['F32']"),
    "shape a number": (raw_file({"w": entry(shape=2)}, D8), "shape 2 is not a list of non-neg"),
    "shape negative": (raw_file({"w": entry(shape=[-2])}, D8), "shape [-2] is not a list"),
    "shape negative twice": (raw_file({"w": entry(shape=[-2, -1])}, D8), "shape [-2, -1] is not"),
    "shape bool": (raw_file({"w": entry(shape=[True, 2])}, D8), "shape [True, 2] is not a list"),
    "shape float": (raw_file({"w": entry(shape=[2.0])}, D8), "shape [2.0] is not a list"),
    "shape overflows": (
        raw_file({"w": entry(shape=[2**62, 4])}, D8),
        f"shape {[2**62, 4]} of F32 needs",
    ),
    "shape beyond int64": (
        raw_file({"w": entry(shape=[2**64, 0])}, D8),
        "is not a list of non-neg",
    ),
    "100 axes": (raw_file({"w": entry(shape=[1] * 100)}, D8), "100 axes; expected at most 64"),
    "offsets negative": (raw_file({"w": entry(offsets=[-8, 0])}, D8), "[-8, 0] must be 0 <= begin"),
    "offsets reversed": (
        raw_file({"w": entry(offsets=[8, 0])}, D8),
        "[8, 0] must be 0 <= begin <=",
    ),
    "offsets floats": (
        raw_file({"w": entry(offsets=[0.0, 8])}, D8),
        "[0.0, 8] are not two integers",
    ),
    "offsets bool": (raw_file({"w": entry(offsets=[False, 8])}, D8), "[False, 8] are not two int"),
    "three offsets": (raw_file({"w": entry(offsets=[0, 4, 8])}, D8), "are not two integers"),
    "truncated": (
        raw_file({"w": entry()}, bytes(5)),
        "tensor 'w': ends at data byte 8, but the file has 5 data bytes; it is truncated",
    ),
    "too few bytes": (
        raw_file({"w": entry(shape=[3])}, D8),
        "tensor 'w': shape [3] of F32 needs 12 bytes, but data_offsets [0, 8] hold 8",
    ),
    "too many bytes": (
        raw_file({"w": entry(shape=[1])}, D8),
        "tensor 'w': shape [1] of F32 needs 4 bytes, but data_offsets [0, 8] hold 8",
    ),
    "half a byte": (raw_file({"w": entry("F4", [3], [0, 1])}, b"0"), "of F4 needs 1.5 bytes"),
    "overlap": (
        raw_file({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)),
        "tensors 'v' and 'w' overlap: expected data byte 8, found 4",
    ),
    "same place": (raw_file({"v": entry(), "w": entry()}, D8), "tensors 'v' and 'w' overlap"),
    "gap": (
        raw_file({"v": entry(), "w": entry(offsets=[12, 20])}, bytes(20)),
        "tensors 'v' and 'w' leave a gap: expected data byte 8, found 12",
    ),
    "gap at the start": (
        raw_file({"w": entry(offsets=[8, 16])}, D16),
        "tensors 'the header' and 'w' leave a gap",
    ),
    "trailing bytes": (
        raw_file({"w": entry()}, D16),
        "8 bytes follow the last tensor 'w'; expected none",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        SafetensorsFile(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value)


def test_a_header_larger_than_any_real_one_is_not_even_read(tmp_path):
    (tmp_path / "a").write_bytes(raw_file(b"{}", length=150_000_000))
    os.truncate(tmp_path / "a", 200_000_000)  # a hole, which takes no room on the disk
    with pytest.raises(CheckpointError, match="claims 150000000 bytes; expected at most 100000000"):
        SafetensorsFile(tmp_path / "a")


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would block until someone writes
    for name in ("pipe", ".", "absent"):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path / name))}: "):
            SafetensorsFile(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_open_is_named(tmp_path):
    write_file(tmp_path / "a", VALUES)
    with SafetensorsFile(tmp_path / "a") as file:
        os.truncate(tmp_path / "a", file.entries["matrix"].offset + 10)
        with pytest.raises(
            CheckpointError, match="ends inside matrix: expected 24 bytes at .*found 10"
        ):
            file.read("matrix")


def test_no_handle_is_left_open_by_damaged_files(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for content, _ in DAMAGED.values():
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "bad")
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_and_cut_bytes_never_cause_another_error(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a"
    write_file(path, {name: VALUES[name] for name in ("vector", "matrix")})
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    path.write_bytes(content[:cut])
    try:
        with SafetensorsFile(path) as file:
            for name, found in file.entries.items():
                assert found.offset + found.nbytes <= cut
                file.read(name)
    except CheckpointError as error:
        assert str(path) in str(error)
    except NotImplementedError as error:  # a flip turned the dtype into one that NumPy lacks
        assert "cannot be read into NumPy" in str(error)


def test_unknown_fields_and_padding_are_allowed_as_in_the_reference(tmp_path):
    header = json.dumps({"w": {**entry(), "comment": "new"}}).encode() + b"   "
    (tmp_path / "a").write_bytes(raw_file(header, D8))
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.read("w").tolist() == [0, 0]
