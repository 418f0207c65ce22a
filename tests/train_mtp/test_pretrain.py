"""Runs from text to checkpoint: resumed bit for bit after a kill, refused when they do not fit.

All runs are the same one but for its folder, so that this process compiles it once; the killed one
is another process, with the same settings.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from dskjax.checkpoint import load_hf
from dskjax.checkpoint.store import Store
from dskjax.documents import Document
from dskjax.evaluation import documents_by_kind
from dskjax.tokenizer import Tokenizer
from tests.train_mtp import toy
from train_mtp import evaluation, loop, pretrain
from train_mtp.config import PretrainConfig
from train_mtp.data import PackedDataset
from train_mtp.loss import LossSums
from train_mtp.metrics import CLOCK, METRICS, MetricsLog, read_metrics, without_clock
from train_mtp.plot import plot_runs
from train_mtp.runs import differences
from train_mtp.state import abstract_state

pytestmark = pytest.mark.usefixtures("quick_compiler")

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "tiny-deepseek"
MODEL = dataclasses.replace(
    toy.model(vocab_size=6144), num_hidden_layers=1, first_k_dense_replace=0
)
STEPS = 6


@pytest.fixture(scope="module")
def quick_compiler():
    with toy.quick_compiler():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text and the model's config."""
    folder = tmp_path_factory.mktemp("pretrain")
    lines = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(60)]
    (folder / "train.txt").write_text("\x1e\n".join(lines) + "\x1e\n")
    (folder / "valid.txt").write_text("def g(x):\n    return x * 2\n\x1e\nÉté, ça va.\n\x1e\n")
    rows = [{"split": "valid", "kind": k, "bytes": n} for k, n in (("code", 27), ("prose", 15))]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(MODEL.to_hf()))
    return folder


def config(folder: Path, out: str, **changes) -> PretrainConfig:
    given = {
        "model": str(folder / "config.json"),
        "data": [folder / "train.txt"],
        "tokenizer": TOKENIZER,
        "out": folder / out,
        "cache_dir": folder / "tokens",
        "seq_len": 16,
        "batch_size": 4,
        "steps": STEPS,
        "warmup": 2,
        "lr": 1e-2,
        "precision": "float32",
        "mesh": "dp=1",
        "save_every": 2,
        "keep_last": 9,
        "log_every": 1,
        "eval_every": 4,
        "eval_data": [folder / "valid.txt"],
        "eval_index": folder / "docs.jsonl",
        "progress": False,
    }
    return PretrainConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def straight(folder, quick_compiler):
    """The run that nothing disturbs."""
    setting = config(folder, "straight")
    return setting, pretrain.pretrain(setting, command="the command")


def state_bytes(setting: PretrainConfig, step: int) -> dict[str, bytes]:
    tokenizer = Tokenizer.load(TOKENIZER)
    recipe = pretrain.make_recipe(setting, pretrain.model_config(setting, tokenizer))
    with Store(Path(setting.out) / "checkpoints", keep_last=9) as store:
        assert store.latest() == step
        state, _ = store.restore(step, abstract_state(recipe))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def metrics(setting: PretrainConfig) -> list[dict]:
    return [without_clock(row) for row in read_metrics(Path(setting.out) / METRICS)]


def assert_same_run(one: PretrainConfig, other: PretrainConfig):
    assert state_bytes(one, STEPS) == state_bytes(other, STEPS)
    assert metrics(one) == metrics(other)
    ends = [Path(run.out) / "model" / "model.safetensors" for run in (one, other)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_run_writes_metrics_checkpoint_and_record(straight, folder):
    setting, exported = straight
    rows = metrics(setting)
    order = [(row["event"], row["step"]) for row in rows]
    train = [("train", step) for step in range(1, STEPS + 1)]
    assert order == [*train[:4], ("eval", 4), *train[4:], ("eval", STEPS)]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses[0] == pytest.approx(math.log(6144), rel=0.05) and losses[-1] < losses[0] - 1
    assert exported == folder / "straight" / "model"
    params, cfg = load_hf(exported)
    tokenizer = Tokenizer.load(exported)
    assert cfg == dataclasses.replace(
        MODEL,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tuple(tokenizer.eos_ids),
    )
    assert params["embed_tokens"]["weight"].dtype == np.dtype("bfloat16")
    record = json.loads((exported / "training.json").read_text())
    assert record["command"] == "the command" and record["tokens"] == STEPS * 4 * 16
    assert record["validation"] == rows[-1]["kinds"]
    kinds = record["validation"]
    assert set(kinds) == {"code", "prose", "all"}
    assert [kinds[k]["bytes"] for k in ("code", "prose", "all")] == [27, 15, 42]
    assert (folder / "straight" / "metrics.png").stat().st_size > 10_000
    assert not list((folder / "straight").rglob("*.tmp*"))


def test_finished_run_is_only_exported_again(straight):
    setting, exported = straight
    before = metrics(setting), (exported / "model.safetensors").read_bytes()
    assert pretrain.pretrain(setting) == exported
    assert (metrics(setting), (exported / "model.safetensors").read_bytes()) == before


KILLED = """
    import os, pathlib, signal, sys, warnings
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    from train_mtp.config import PretrainConfig
    from train_mtp.pretrain import pretrain

    def kill(step, metrics):
        if step == 3:  # step 4 is queued, the checkpoint of step 2 perhaps half written
            os.kill(os.getpid(), signal.SIGKILL)

    pretrain(PretrainConfig(**{config}), on_step=kill)
"""


def test_killed_run_goes_on_bit_for_bit(straight, folder):
    setting = config(folder, "killed")
    text = textwrap.dedent(KILLED).replace("{config}", repr(_plain(setting)))
    child = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=_environment(), timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert metrics(setting)[-1]["step"] == 3 and not (folder / "killed" / "model").exists()
    with open(folder / "killed" / METRICS, "a") as file:
        file.write('{"event": "train", "step": 4, "lo')  # as if killed while writing
    pretrain.pretrain(setting)
    assert_same_run(setting, straight[0])


def _plain(setting: PretrainConfig) -> dict:
    fields = {**vars(setting), "data": list(map(str, setting.data))}
    fields["eval_data"] = list(map(str, setting.eval_data))
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def test_terminated_run_saves_exits_and_goes_on_bit_for_bit(straight, folder):
    setting = config(folder, "terminated", save_every=4)
    handler = signal.getsignal(signal.SIGTERM)

    def terminate(step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Interrupted, match=r"SIGTERM after step 3.*same command") as stopped:
        pretrain.pretrain(setting, on_step=terminate)
    assert stopped.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == handler
    assert metrics(setting)[-1]["step"] == stopped.value.step == 3
    pretrain.pretrain(setting)
    assert_same_run(setting, straight[0])


def test_time_limit_stops_saves_and_exports(straight, folder):
    setting = config(folder, "limited", max_minutes=1e-6)
    exported = pretrain.pretrain(setting)
    record = json.loads((exported / "training.json").read_text())
    assert record["steps"] == 1 and set(record["validation"]) == {"code", "prose", "all"}
    pretrain.pretrain(dataclasses.replace(setting, max_minutes=None))
    assert_same_run(setting, straight[0])


def test_another_run_is_refused_by_the_fields_that_differ(straight, folder):
    setting, _ = straight
    with pytest.raises(ValueError, match=r"step 6: run\.lr: 0\.01 -> 0\.02.*another out"):
        pretrain.pretrain(dataclasses.replace(setting, lr=0.02))
    assert MODEL.moe is not None
    wider = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, moe_intermediate_size=8))
    (folder / "wider.json").write_text(json.dumps(wider.to_hf()))
    with pytest.raises(ValueError, match=r"model\.moe\.moe_intermediate_size: 16 -> 8"):
        pretrain.pretrain(dataclasses.replace(setting, model=str(folder / "wider.json")))
    (folder / "other.txt").write_text("other text")
    with pytest.raises(ValueError, match="; data: |step 6: data: "):
        pretrain.pretrain(dataclasses.replace(setting, data=[folder / "other.txt"]))


def test_nan_stops_with_the_batch_saved_and_a_hint(straight, folder, monkeypatch):
    setting = config(folder, "nan")
    real = PackedDataset.batch

    def batch(self, step):
        out = real(self, step)
        if step == 3:  # an id past the vocabulary embeds to NaN
            out.tokens[1, 2] = 6144
        return out

    monkeypatch.setattr(PackedDataset, "batch", batch)
    with pytest.raises(
        loop.NonFiniteLossError, match=r"step 4: loss nan.*checkpoint is step 2.*lr"
    ):
        pretrain.pretrain(setting)
    with np.load(folder / "nan" / "bad_batch_step4_process0.npz") as saved:
        assert saved["tokens"][1, 2] == 6144 and saved["segment_ids"].shape == (4, 16)
    assert metrics(setting)[-1]["step"] == 3
    monkeypatch.undo()
    pretrain.pretrain(setting)
    assert_same_run(setting, straight[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, r"lr=0\.0 must be positive"),
        ({"warmup": STEPS}, r"warmup=6 must be in 0\.\.5"),
        ({"seq_len": 1}, r"seq_len=1 must be at least 2"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1\.5 must be between 0 and 1"),
        ({"eval_data": ()}, "eval_every=4 needs eval_data"),
        ({"data": ()}, r"data=\(\) must list at least one file"),
        ({"max_minutes": -1.0}, r"max_minutes=-1\.0 must be positive"),
    ],
)
def test_config_is_checked_at_birth(folder, change, message):
    with pytest.raises(ValueError, match=message):
        config(folder, "x", **change)


def test_model_must_fit_tokenizer_and_rows(folder):
    tokenizer = Tokenizer.load(TOKENIZER)
    with pytest.raises(ValueError, match=r"vocab_size=256; use a config.json"):
        pretrain.model_config(config(folder, "x", model="tiny-v3"), tokenizer)
    with pytest.raises(ValueError, match=r"seq_len=65 is longer than.*=64"):
        pretrain.model_config(config(folder, "x", seq_len=65), tokenizer)
    with pytest.raises(ValueError, match=r"'huge' is neither a preset \(.*tiny-v3.*config.json"):
        pretrain.model_config(config(folder, "x", model="huge"), tokenizer)


def test_differences_name_nested_fields():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_log_drops_what_a_resumed_run_will_write_again(tmp_path):
    path = tmp_path / METRICS
    with MetricsLog(path, steps=0) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": math.nan, CLOCK[0]: step})
    with MetricsLog(path, steps=2) as log:
        log.write("train", 2, {"loss": 0.0})  # is there already
        log.write("train", 3, {"loss": 0.5})
    rows = [without_clock(row) for row in read_metrics(path)]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == ["nan", "nan", 0.5]
    path.write_text('{"event": "train", "st\n{"event": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a line"):
        read_metrics(path)


# ------------------------------------------------------------------ evaluation


def test_bits_per_byte_counts_eos_and_bytes_of_text(folder, monkeypatch):
    """A model that spends one bit a token: bits per byte is tokens over bytes."""
    tokenizer = Tokenizer.load(TOKENIZER)
    texts = ["def f(x):\n    return x\n" * 20, "ça"]

    def one_bit(params, batch, *, recipe):
        valid = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (
            batch.positions[:, 1:] > 0
        )
        count = int(valid.sum())
        return LossSums(
            nats=np.array([count * math.log(2), 1.0]),
            lse_squares=np.zeros(2),
            tokens=np.array([count, 2]),
            top1=np.array([0, 1]),
            agree=np.array([count, 2]),
            loads={},
        )

    monkeypatch.setattr(evaluation, "eval_step", one_bit)
    made = [Document(text, "test") for text in texts]
    kinds = {
        name: evaluation.hold_out([document], tokenizer, seq_len=16, batch_size=2)
        for name, document in zip("ab", made, strict=True)
    }
    scores = evaluation.evaluate({}, kinds, toy.recipe())
    tokens = [len(tokenizer.encode(text)) + 1 for text in texts]  # with eos, without bos
    sizes = [len(text.encode()) for text in texts]
    assert sizes[1] == 3
    assert [scores[name].tokens for name in "ab"] == tokens
    expected = [t / n for t, n in zip(tokens, sizes, strict=True)]
    assert [scores[name].bits_per_byte for name in "ab"] == pytest.approx(expected)
    assert scores["all"].bits_per_byte == pytest.approx(sum(tokens) / sum(sizes))
    assert scores["a"].mtp_top1 == [0.5] and scores["a"].mtp_agree == [1.0]
    few = evaluation.hold_out(made, tokenizer, seq_len=16, batch_size=2, max_tokens=5)
    assert few.documents == 1


def test_kinds_come_from_names_or_from_the_index(folder):
    tokenizer = Tokenizer.load(TOKENIZER)
    path, index = folder / "valid.txt", folder / "docs.jsonl"
    group = lambda *paths, **given: {  # noqa: E731
        kind: len(found)
        for kind, found in documents_by_kind(paths, tokenizer=tokenizer, **given).items()
    }
    assert group(path) == {"valid": 2}
    assert group(f"mine={path}", path) == {"mine": 2, "valid": 2}
    assert group(f"mine={path}", path, index=index) == {"code": 1, "mine": 2, "prose": 1}
    wrong = folder / "wrong.jsonl"
    wrong.write_text(index.read_text().replace("15", "16"))
    with pytest.raises(ValueError, match=r"valid.txt byte 29.*says 16 bytes, found 15"):
        group(path, index=wrong)
    wrong.write_text(index.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has 1 documents of split 'valid', but .* has 2"):
        group(path, index=wrong)


def test_several_runs_are_drawn_together(tmp_path):
    """Of different depths, one without experts and without evaluations."""
    for name, depths in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        with MetricsLog(tmp_path / name / METRICS, steps=0) as log:
            for step in (1, 2):
                per_depth = [1.0 / step] * depths
                values = {"loss": 2.0, "grad_norm": 1.0, "mtp_loss": per_depth}
                load = {"max_vio": 1.0, "mean_max_vio": 0.5} if depths == 2 else {}
                log.write("train", step, {**values, **load, "mtp_agree": per_depth})
                if depths == 2:
                    log.write("eval", step, {"kinds": {"prose": {"bits_per_byte": 2.0}}})
    runs = [tmp_path / "one", tmp_path / "two" / METRICS]
    assert plot_runs(runs, tmp_path / "both.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        plot_runs([tmp_path], tmp_path / "none.png")
