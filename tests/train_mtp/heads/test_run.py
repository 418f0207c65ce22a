"""Runs that train heads: a folder from a trunk, resumed bit for bit, exported, served."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.checkpoint import load, load_hf, save_hf
from dskjax.checkpoint.store import Store
from dskjax.config import MtpConfig
from dskjax.decode import generate
from dskjax.model import head, init, mtp_chain, trunk
from dskjax.params import named_leaves
from dskjax.recycled import mtp_recycled
from dskjax.tokenizer import Tokenizer
from tests.train_mtp import toy
from train_mtp import loop
from train_mtp.data import PackedDataset
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.run import export_heads, fingerprint, recipe_of, train_heads
from train_mtp.metrics import METRICS, read_metrics, without_clock
from train_mtp.plot import plot_runs
from train_mtp.state import abstract_state

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "examples" / "tiny-deepseek"
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with toy.quick_compiler():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trunk with one module, text, and conversations."""
    folder = tmp_path_factory.mktemp("heads")
    toy.write_trunk(folder)
    (folder / "valid.txt").write_text("def g(x):\n    return x * 2\n\x1e\nÉté, ça va.\n\x1e\n")
    rows = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, out: str, **changes) -> HeadsConfig:
    given = {
        "trunk": str(folder / "trunk"),
        "data": [folder / "train.txt"],
        "out": folder / out,
        "cache_dir": folder / "tokens",
        "layers": 2,
        "seq_len": 16,
        "batch_size": 4,
        "steps": STEPS,
        "warmup": 2,
        "lr": 1e-2,
        "top_k": 32,
        "precision": "float32",
        "mesh": "dp=1",
        "save_every": 2,
        "keep_last": 9,
        "log_every": 1,
        "eval_data": [folder / "valid.txt"],
        "progress": False,
    }
    return HeadsConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def straight(folder):
    """The run that nothing disturbs."""
    setting = config(folder, "straight")
    return setting, train_heads(setting, command="the command")


def metrics(setting: HeadsConfig) -> list[dict]:
    return [without_clock(row) for row in read_metrics(Path(setting.out) / METRICS)]


def state_bytes(setting: HeadsConfig, step: int) -> dict[str, bytes]:
    _, trunk_cfg = load(setting.trunk)
    sharding = None
    recipe = recipe_of(setting, trunk_cfg, sharding)
    with Store(Path(setting.out) / "checkpoints", keep_last=9) as store:
        state, _ = store.restore(step, abstract_state(recipe))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same_run(one: HeadsConfig, other: HeadsConfig):
    assert state_bytes(one, STEPS) == state_bytes(other, STEPS)
    assert metrics(one) == metrics(other)
    ends = [run.model_folder / "model.safetensors" for run in (one, other)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_run_trains_logs_and_exports(straight, folder):
    setting, exported = straight
    rows = metrics(setting)
    train = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(len(row["mtp_agree"]) == 2 and row["accepted_length"] >= 1 for row in train)
    assert {row["step"] for row in rows if row["event"] == "eval"} == {2, 4, 6}  # saved, so judged
    params, cfg = load_hf(exported)
    assert cfg.mtp == MtpConfig(num_nextn_predict_layers=2, mtp_scheme="chain")
    before, _ = load_hf(folder / "trunk")
    assert fingerprint(params) == fingerprint(before), "the trunk changed"
    moved = params["mtp_layers"]["eh_proj"] - before["mtp_layers"]["eh_proj"]
    assert float(jnp.abs(moved).max()) > 1e-3
    record = json.loads((exported / "training.json").read_text())
    assert record["command"] == "the command" and record["trunk"] == fingerprint(before)
    assert set(record["validation"]) == {"valid"}
    assert (folder / "straight" / "metrics.png").stat().st_size > 10_000


@pytest.mark.parametrize(("weights", "depths"), [("independent", 2), ("shared", 3)])
def test_training_sees_what_serving_sees(weights, depths, folder):
    """Greedy drafts of the exported heads are the argmax of the training pass on the same tokens,
    draft after draft: accepted are exactly those that agree with the trunk. The heads learn what
    the trunk is going to say: others would agree with it nowhere.
    """
    tokenizer = Tokenizer.load(folder / "trunk")
    prompt = tokenizer.encode("def f1(x):\n    return x", bos=True)
    plain = generate(*load_hf(folder / "trunk"), [prompt], max_tokens=24, ignore_eos=True)
    said = tokenizer.decode(prompt + plain.tokens[0])
    (folder / "said.txt").write_text("\x1e\n".join([said] * 60) + "\x1e\n")
    options = {"weights": weights, "layers": depths, "steps": 40, "save_every": 40, "eval_data": ()}
    setting = config(folder, f"served-{weights}", data=[folder / "said.txt"], **options)
    params, cfg = load_hf(train_heads(setting))
    drafted = generate(params, cfg, [prompt], max_tokens=24, drafts=depths, ignore_eos=True)
    assert plain.tokens == drafted.tokens
    ids = jnp.asarray([prompt + plain.tokens[0]])
    run = mtp_chain if weights == "independent" else mtp_recycled

    @jax.jit
    def guesses(params, ids):
        hidden = trunk(params, ids, cfg=cfg).hidden
        out = run(params, ids, hidden, cfg=cfg, depths=depths).hidden
        return [head(params, h, cfg=cfg)[0].argmax(-1) for h in out]

    agree = [
        np.asarray(guess)[: -k - 1] == np.asarray(ids[0])[k + 1 :]
        for k, guess in enumerate(guesses(params, ids), start=1)
    ]
    steps, at = [], len(prompt)  # position of the newest known token after the first step
    while at < len(prompt) + 23:
        anchor, accepted = at - 1, 0
        while accepted < depths and anchor < len(agree[accepted]) and agree[accepted][anchor]:
            accepted += 1
        steps.append(accepted)
        at += accepted + 1
    stats = drafted.stats
    assert len(stats.per_position) == depths and all(stats.per_position), "no draft was accepted"
    expected = sum(steps[:-1])  # the last step may be cut off by max_tokens
    assert stats.accepted in range(expected, expected + depths + 1), (stats.accepted, steps)


KILLED = """
    import os, signal
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    from train_mtp.heads.config import HeadsConfig
    from train_mtp.heads.run import train_heads

    def kill(step, metrics):
        if step == 3:  # step 4 is queued, the checkpoint of step 2 perhaps half written
            os.kill(os.getpid(), signal.SIGKILL)

    train_heads(HeadsConfig(**{config}), on_step=kill)
"""


def test_killed_run_goes_on_bit_for_bit(straight, folder):
    setting = config(folder, "killed")
    fields = {**vars(setting), "data": list(map(str, setting.data))}
    fields["eval_data"] = list(map(str, setting.eval_data))
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}
    text = textwrap.dedent(KILLED).replace("{config}", repr(plain))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert metrics(setting)[-1]["step"] == 3 and not setting.model_folder.exists()
    train_heads(setting)
    assert_same_run(setting, straight[0])


def test_many_devices_resume_bit_for_bit_too(folder):
    one = config(folder, "eight", mesh="dp=8", batch_size=8, sharding="fsdp")
    other = dataclasses.replace(one, out=folder / "eight-again", max_minutes=1e-6)
    train_heads(one)
    train_heads(other)  # one step, saved
    train_heads(dataclasses.replace(other, max_minutes=None))
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a == b


def test_another_trunk_or_run_is_refused(straight, folder):
    setting, _ = straight
    with pytest.raises(ValueError, match=r"step 6: .*run\.layers: 2 -> 3"):
        train_heads(dataclasses.replace(setting, layers=3))
    params, cfg = load_hf(folder / "trunk")
    changed = params | {"norm": {"weight": params["norm"]["weight"] * 1.01}}
    save_hf(folder / "trunk2", changed, cfg)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / "trunk2" / name)
    with pytest.raises(ValueError, match=r"step 6: trunk: "):
        train_heads(dataclasses.replace(setting, trunk=str(folder / "trunk2")))


def test_a_checkpoint_on_the_way_is_exported(straight, folder):
    setting, exported = straight
    last = export_heads(setting.out, folder / "last", step=STEPS)
    for name in ("model.safetensors", "config.json"):
        assert (last / name).read_bytes() == (exported / name).read_bytes()
    early, _ = load_hf(export_heads(setting.out, folder / "early", step=2))
    late, _ = load_hf(last)
    assert not np.array_equal(early["mtp_layers"]["eh_proj"], late["mtp_layers"]["eh_proj"])
    best = json.loads((export_heads(setting.out, folder / "best") / "training.json").read_text())
    rows = [row for row in metrics(setting) if row["event"] == "eval"]
    scores = {row["step"]: row["kinds"]["valid"]["accepted_length"] for row in rows}
    assert scores[best["steps"]] == max(scores.values())
    with pytest.raises(ValueError, match=r"no checkpoint of step=99; found \[2, 4, 6\]"):
        export_heads(setting.out, folder / "none", step=99)
    with pytest.raises(FileNotFoundError, match="settings.json: no such file"):
        export_heads(folder, folder / "none")


def test_conversations_score_their_answers_alone(folder):
    # As many steps as the others take, though the first one tells: so it is their compiled step.
    setting = config(folder, "chat", data=[folder / "chat.jsonl"], eval_data=())
    train_heads(setting)
    everything = dataclasses.replace(setting, out=folder / "chat-all", answers_only=False)
    train_heads(everything)
    some, all_ = (metrics(run)[0]["tokens"][0] for run in (setting, everything))
    assert 0 < some < 0.7 * all_


def test_accumulated_run_is_the_same_run(straight, folder):
    setting = config(folder, "parts", accumulate=2)
    train_heads(setting)
    for a, b in zip(metrics(setting), metrics(straight[0]), strict=True):
        if a["event"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_nan_stops_with_the_batch_saved(folder, monkeypatch):
    setting = config(folder, "nan", eval_data=())
    real = PackedDataset.batch

    def batch(self, step):
        out = real(self, step)
        if step == 3:  # an id past the vocabulary embeds to NaN
            out.tokens[1, 2] = 6144
        return out

    monkeypatch.setattr(PackedDataset, "batch", batch)
    with pytest.raises(loop.NonFiniteLossError, match=r"step 4: loss nan.*checkpoint is step 2"):
        train_heads(setting)
    with np.load(folder / "nan" / "bad_batch_step4_process0.npz") as saved:
        assert saved["tokens"][1, 2] == 6144 and saved["scored"].shape == (4, 16)


def test_several_runs_are_drawn_together(straight, folder):
    drawn = plot_runs([straight[0].out, straight[0].out], folder / "both.png")
    assert drawn.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"accumulate": 3}, "accumulate=3 must be a divisor of batch_size=4"),
        ({"ce": 0.0, "kl": 0.0}, "nor all 0"),
        ({"watch": (0.0,)}, "watch"),
        ({"depth_decay": 2.0}, r"depth_decay=2.0 must be in \(0, 1\]"),
    ],
)
def test_config_is_checked_at_birth(folder, change, message):
    with pytest.raises(ValueError, match=message):
        config(folder, "x", **change)


def test_trunk_and_tokenizer_must_fit(folder):
    shutil.copytree(folder / "trunk", folder / "small")
    cfg = toy.model(vocab_size=64)
    save_hf(folder / "small", jax.jit(lambda: init(cfg, jax.random.key(0)))(), cfg, overwrite=True)
    with pytest.raises(ValueError, match="vocab_size=64: this tokenizer belongs to another trunk"):
        train_heads(config(folder, "x", trunk=str(folder / "small")))
    with pytest.raises(ValueError, match="seq_len=65 is longer than"):
        train_heads(config(folder, "x", seq_len=65))


def test_weights_of_the_trunk_may_be_quantised(folder):
    from dskjax import quantise

    params, cfg = load_hf(folder / "trunk")
    save_hf(folder / "fp8", quantise(params, "fp8"), cfg)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / "fp8" / name)
    exported = train_heads(config(folder, "fp8-run", trunk=str(folder / "fp8"), steps=2, warmup=0))
    shipped, _ = load_hf(exported)
    kinds = {type(leaf).__name__ for _, leaf in named_leaves(shipped)}
    assert "QTensor" in kinds
    before, _ = load_hf(folder / "fp8")
    assert fingerprint(shipped) == fingerprint(before)


def test_commands_export_draw_and_evaluate(dskjax, straight, folder):
    code, _, err = dskjax("train-mtp", "export", straight[0].out, "--out", folder / "by-command")
    assert code == 0, err
    code, _, err = dskjax("train-mtp", "plot", straight[0].out, "--out", folder / "by-command.png")
    assert code == 0 and (folder / "by-command.png").stat().st_size > 10_000
    asked = ("--prompts", 1, "--prompt-tokens", 4, "--max-tokens", 6, "--drafts", 2)
    out = folder / "by-command.json"
    code, _, err = dskjax(
        *("train-mtp", "evaluate", folder / "by-command", "--text", folder / "valid.txt"),
        *("--rule", "typical:eps=0.2", *asked, "--json", out, "--dtype", "float32"),
    )
    assert code == 0, err
    found = json.loads(out.read_text())
    keys = {"accepted_per_drafted", "mean_accepted_length", "per_position", "tokens", "ci95"}
    assert keys <= set(found) and found["rule"] == "typical:eps=0.2" and found["tokens"] == 6


def test_run_command_hands_over_every_option(dskjax, folder, monkeypatch):
    from train_mtp.heads import run

    seen = []
    monkeypatch.setattr(run, "train_heads", lambda config: seen.append(config) or Path("there"))
    code, _, err = dskjax(
        *("train-mtp", "run", folder / "trunk", "--data", folder / "train.txt", "--out", "o"),
        *("--layers", 3, "--weights", "shared", "--init", "random", "--kl", 0.5, "--lk", 0.25),
        *("--no-answers-only", "--accumulate", 2, "--precision", "bfloat16", "--detach"),
    )
    assert code == 0 and "exported there" in err, err
    [config] = seen
    assert (config.layers, config.weights, config.init) == (3, "shared", "random")
    assert (config.kl, config.lk, config.ce) == (0.5, 0.25, 0.1)
    assert (config.accumulate, config.detach, config.answers_only) == (2, True, False)
    assert config.precision == "bfloat16" and config.trunk == str(folder / "trunk")
