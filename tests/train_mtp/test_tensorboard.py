"""What TensorBoard gets to see: the numbers of metrics.jsonl, each once, also after a resume."""

import collections
import dataclasses
import json
import math
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from tests.train_mtp import toy
from train_mtp import pretrain
from train_mtp.config import PretrainConfig
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.run import train_heads
from train_mtp.metrics import METRICS, MetricsLog, read_metrics

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "tiny-deepseek"


def events(folder: Path) -> list[Event]:
    """Of the folder's only event file: records of u64 length, u32 masked CRC, bytes, u32 CRC."""
    [path] = folder.iterdir()
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        data = content[at + 12 : at + 12 + length]
        (check,) = struct.unpack_from("<I", content, at + 12 + length)
        crc = crc32c(data)
        assert check == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        found.append(Event.FromString(data))
        at += length + 16
    return found


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) in order."""
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]


def numbers(value) -> list[float]:
    """Every number in a line of metrics, whatever it is called."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if value in (None, "train", "eval") else [float(value)]


def test_a_line_becomes_scalars_by_path(tmp_path):
    row = {"loss": 2.5, "mtp_loss": [3.0, 4.0], "mfu": None, "tokens_per_s": math.nan}
    with MetricsLog(tmp_path / METRICS, steps=0, tensorboard=tmp_path / "tb") as log:
        log.write("train", 10, row)
        log.write("eval", 10, {"kinds": {"code": {"bits_per_byte": 1.5, "mtp_top1": [0.5]}}})
    *found, last = sorted(scalars(tmp_path / "tb"))
    assert found == [
        ("eval/kinds/code/bits_per_byte", 10, 1.5),
        ("eval/kinds/code/mtp_top1/1", 10, 0.5),
        ("train/loss", 10, 2.5),
        ("train/mtp_loss/1", 10, 3.0),
        ("train/mtp_loss/2", 10, 4.0),
    ]
    assert last[0] == "train/tokens_per_s" and math.isnan(last[2])


def test_a_resumed_log_holds_every_step_once(tmp_path):
    path, folder = tmp_path / METRICS, tmp_path / "tb"
    with MetricsLog(path, steps=0) as log:  # begun without TensorBoard
        log.write("train", 1, {"loss": math.inf, "seconds": 100.0})
    for kept, steps in ((1, (2, 3, 4)), (2, (2, 3))):
        with MetricsLog(path, steps=kept, tensorboard=folder) as log:
            for step in steps:
                log.write("train", step, {"loss": step / kept, "seconds": 100.0 * step})
        [file] = folder.iterdir()
        file.rename(folder / "events.out.tfevents.1.elsewhere")  # names tell seconds only
    with MetricsLog(path, steps=9, tensorboard=folder):
        pass
    assert [s for s in scalars(folder) if s[0] == "train/loss"] == [
        ("train/loss", 1, math.inf),
        ("train/loss", 2, 2.0),
        ("train/loss", 3, 1.5),
    ]
    times = [event.wall_time for event in events(folder) if event.summary.value]
    assert times[-1] - times[0] == pytest.approx(200)  # the run's clock, pauses left out
    begun = [event.step for event in events(folder) if event.HasField("session_log")]
    assert begun == [0]  # tells a TensorBoard that looks on to forget the older file


@pytest.mark.full
def test_a_stopped_run_goes_on_in_both(tmp_path):
    (tmp_path / "train.txt").write_text("def f(x):\n    return x\n\x1e\n" * 40)
    model = dataclasses.replace(
        toy.model(vocab_size=6144), num_hidden_layers=1, first_k_dense_replace=0
    )
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()))
    config = PretrainConfig(
        model=str(tmp_path / "config.json"),
        data=[tmp_path / "train.txt"],
        tokenizer=TOKENIZER,
        out=tmp_path / "run",
        seq_len=16,
        batch_size=4,
        steps=4,
        warmup=1,
        precision="float32",
        mesh="dp=1",
        save_every=2,
        log_every=1,
        eval_data=[tmp_path / "train.txt"],
        eval_max_tokens=64,
        progress=False,
        tensorboard=True,
    )

    def stop(step, metrics):
        if step == 3:  # logged, not saved
            raise KeyboardInterrupt

    with toy.quick_compiler():
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, on_step=stop)
        assert {step for _, step, _ in scalars(tmp_path / "run" / "tensorboard")} == {1, 2, 3}
        pretrain.pretrain(config)
        pretrain.pretrain(dataclasses.replace(config, tensorboard=False))  # still the same run
    written = collections.defaultdict(list)
    for name, step, value in scalars(tmp_path / "run" / "tensorboard"):
        written[name.split("/")[0], step].append(value)
    rows = read_metrics(tmp_path / "run" / METRICS)
    assert [(row["event"], row["step"]) for row in rows] == list(written)
    for row, values in zip(rows, written.values(), strict=True):
        wanted = [x for name, item in row.items() if name != "step" for x in numbers(item)]
        assert values == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_without_the_extra_a_run_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    given = {"data": ["nowhere.txt"], "out": tmp_path / "run", "tensorboard": True}
    message = r"tensorboardX is not installed.*pip install 'dskjax\[tensorboard\]'"
    with pytest.raises(ValueError, match=message):
        train_heads(HeadsConfig(trunk=str(tmp_path / "nowhere"), **given))
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(PretrainConfig(model="nothing", tokenizer="nowhere", **given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [True, False])
def test_commands_hand_the_option_over(dskjax, monkeypatch, asked):
    seen = []
    keep = lambda config: seen.append(config) or Path("there")  # noqa: E731
    monkeypatch.setattr("train_mtp.heads.run.train_heads", keep)
    monkeypatch.setattr("train_mtp.pretrain.pretrain", keep)
    option = ["--tensorboard"] if asked else []
    common = ("--data", "a.txt", "--out", "o", *option)
    assert dskjax("train-mtp", "run", "trunk", *common)[0] == 0
    assert dskjax("pretrain", "--tokenizer", "t", *common)[0] == 0
    assert [config.tensorboard for config in seen] == [asked, asked]
