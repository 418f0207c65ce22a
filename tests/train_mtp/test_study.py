"""Studies: several sets of heads on one trunk pass learn what runs of their own teach them."""

import dataclasses
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.checkpoint import load_config, load_hf
from dskjax.documents import iter_documents
from dskjax.params import named_leaves
from dskjax.tokenizer import Tokenizer
from tests.train_mtp import toy
from train_mtp.acceptance import measure, prompts_of
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.run import recipe_of, train_heads
from train_mtp.metrics import METRICS, read_metrics, without_clock
from train_mtp.state import TrainState
from train_mtp.study import evaluate, run
from train_mtp.study.evaluate import Evaluation
from train_mtp.study.page import render
from train_mtp.study.run import run_study
from train_mtp.study.train import Trainee
from train_mtp.study.variants import read_table

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-deepseek"
STEPS = 5
SHARED = {"name": "shared 2", "layers": 2, "weights": "shared", "ce": 1.0, "kl": 0.0}
CHAIN = {
    **{"name": "chain 2", "layers": 2, "weights": "independent", "lk": 0.5, "lr": 2e-2},
    **{"init": "random", "seeds": [1]},  # weights that depend on the seed
}
OWN = {**SHARED, "name": "own text", "data": "own"}
RAW = {"name": "shipped", "trained": False}
TABLE = {
    "baseline": "shipped",
    "variants": [
        RAW,
        {**SHARED, "seeds": [0, 1]},
        OWN,
        CHAIN,
        {"name": "lost", "layers": 1, "weights": "shared", "lr": 1e18},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with toy.quick_compiler():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trunk with one module, and text."""
    folder = tmp_path_factory.mktemp("study")
    lines = toy.write_trunk(folder)
    (folder / "code.txt").write_text("\x1e\n".join(reversed(lines)) + "\x1e\n")
    (folder / "prose.txt").write_text("Été, ça va, et toi, comment vas-tu ?\x1e\n")
    (folder / "own").mkdir()
    for name, part in (("a.jsonl", lines[:2]), ("b.jsonl", lines[2:30])):
        records = [{"prompt": line[:9], "completion": line[9:] * 3} for line in part]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "own" / name).write_text(text)
    return folder


def config(folder: Path, out: str, **changes) -> HeadsConfig:
    given = {
        "trunk": str(folder / "trunk"),
        "data": [folder / "train.txt"],
        "out": folder / out,
        "cache_dir": folder / "tokens",
        "seq_len": 16,
        "batch_size": 4,
        "steps": STEPS,
        "warmup": 2,
        "lr": 1e-2,
        "top_k": 32,
        "precision": "float32",
        "mesh": "dp=1",
        "log_every": 2,
        "progress": False,
    }
    return HeadsConfig(**{**given, **changes})


def evaluation(folder: Path, **changes) -> Evaluation:
    given = {
        "text": [folder / "code.txt", folder / "prose.txt"],
        "drafts": (2,),
        "prompts": 3,
        "prompt_tokens": 8,
        "stride": 4,
        "max_tokens": 6,
    }
    return Evaluation(**{**given, **changes})


@pytest.fixture(scope="module")
def studied(folder):
    (folder / "table.json").write_text(json.dumps(TABLE))
    path = run_study(
        config(folder, "study"),
        folder / "table.json",
        evaluation(folder),
        sets={"own": [folder / "own"]},
        keep=True,
        command="this",
    )
    return json.loads(path.read_text())


def heads_of(model: Path) -> dict[str, np.ndarray]:
    params, _ = load_hf(model)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(params["mtp_layers"])}


@pytest.mark.parametrize(
    ("row", "slug", "seed"),
    [(OWN, "own-text-seed0", 0), (SHARED, "shared-2-seed1", 1), (CHAIN, "chain-2-seed1", 1)],
)
def test_heads_learn_together_what_a_run_of_their_own_teaches(row, slug, seed, studied, folder):
    options = {name: value for name, value in row.items() if name not in ("name", "seeds")}
    if options.pop("data", None):
        options["data"] = [folder / "own"]
    alone = config(folder, f"alone-{slug}", seed=seed, **options)
    expected = heads_of(train_heads(alone))
    found = heads_of(folder / "study" / slug / "model")
    assert expected.keys() == found.keys()
    for name, leaf in expected.items():
        assert leaf.tobytes() == found[name].tobytes(), name
    logs = [read_metrics(path / METRICS) for path in (Path(alone.out), folder / "study" / slug)]
    theirs, ours = ([without_clock(r) for r in rows if r["event"] == "train"] for rows in logs)
    assert ours == theirs and [r["step"] for r in ours] == [1, 2, 4, 5]
    before = heads_of(folder / "trunk")["eh_proj"]
    assert np.abs(found["eh_proj"] - before).max() > 1e-3


def test_result_has_a_row_for_each_variant_and_seed(studied):
    rows = {(row["variant"], row["seed"]): row for row in studied["rows"]}
    names = [("shipped", 0), ("shared 2", 0), ("shared 2", 1), ("own text", 0), ("chain 2", 1)]
    assert set(rows) == {*names, ("lost", 0)}
    assert studied["baseline"] == "shipped" and studied["command"] == "this"
    assert studied["evaluation"]["prompts"] == {"code": 3, "prose": 3}
    assert len(studied["trunk"]["sha256"]) == 64 and studied["versions"]["jax"] == jax.__version__
    for name in names:
        settings = [(a["drafts"], a["temperature"]) for a in rows[name]["acceptance"]]
        assert settings == [(2, 0.0), (2, 1.0)], name
    assert rows[("shipped", 0)]["steps"] == 0 and rows[("shared 2", 0)]["tokens"] == STEPS * 64
    chain = rows[("chain 2", 1)]
    assert (chain["lk"], chain["lr"], chain["layers"]) == (0.5, 2e-2, 2)
    assert chain["parameters"] == 2 * rows[("shared 2", 0)]["parameters"]
    for record in chain["acceptance"]:
        kinds = record["kinds"].values()
        accepted, drafted = (sum(sum(k[name]) for k in kinds) for name in ("accepted", "drafted"))
        assert record["accepted_per_drafted"] == accepted / drafted
        assert sum(kind["prompts"] for kind in kinds) == 6


def test_result_says_which_data_each_variant_learnt_from(studied, folder):
    data = {(row["variant"], row["data"]) for row in studied["rows"] if row["trained"]}
    assert data == {(name, "corpus") for name in ("shared 2", "chain 2", "lost")} | {
        ("own text", "own")
    }
    corpus, own = (studied["data_sets"][name] for name in ("corpus", "own"))
    assert corpus["files"] == ["train.txt"] and corpus["scored"] == corpus["tokens"] > 1000
    assert own["files"] == ["a.jsonl", "b.jsonl"] and own["documents"] == 30
    tokenizer = Tokenizer.load(TOKENIZER)
    texts = list(iter_documents([folder / "own"]))
    assert own["scored"] == sum(1 + len(tokenizer.encode(d.text[d.prompt :])) for d in texts)
    prompts = sum(1 + len(tokenizer.encode(d.text[: d.prompt])) for d in texts)
    assert own["tokens"] == own["scored"] + prompts


def test_variants_that_differ_in_their_data_are_compared(studied, folder):
    text = render([folder / "study" / "study.json"], folder / "report.md")
    assert "*own text* against *shared 2* (the data alone), accepted / drafted: " in text
    assert f"| own | a.jsonl, b.jsonl | 30 | {studied['data_sets']['own']['tokens']:,} |" in text


def test_groups_are_those_of_a_seed_and_a_data_set(folder):
    """Seed after seed, so that what is left out for lack of time is a further seed."""
    table = of({**SHARED, "seeds": [0, 1]}, {**OWN, "seeds": [0, 1]}, {**CHAIN, "seeds": [2, 0]})
    (folder / "groups.json").write_text(json.dumps(table))
    found = read_table(folder / "groups.json", config(folder, "x"), {"own": [folder / "own"]})
    slugs = [[variant.slug for variant in group] for group in found.groups()]
    assert slugs == [
        ["shared-2-seed0", "chain-2-seed0"],
        ["own-text-seed0"],
        ["shared-2-seed1"],
        ["own-text-seed1"],
        ["chain-2-seed2"],
    ]
    assert found.groups()[3][0].config.data == [folder / "own"]


@pytest.fixture(scope="module")
def three(folder) -> list[Trainee]:
    """A shared module, and chains of two and three."""
    table = of({**SHARED}, {**CHAIN}, {**CHAIN, "name": "chain 3", "layers": 3})
    (folder / "three.json").write_text(json.dumps(table))
    variants = read_table(folder / "three.json", config(folder, "x")).variants
    trunk, heads = load_config(folder / "trunk"), {"w": jnp.ones(2)}
    return [
        Trainee(variant=v, recipe=recipe_of(v.config, trunk, None), state=TrainState(0, heads, {}))
        for v in variants
    ]


def test_variant_is_measured_at_the_drafts_it_can_serve(three, folder, monkeypatch):
    """Those that share a compiled step take turns; each variant is reported once, in order."""

    def answer(trainee, frozen, prompts, evaluation, drafts):
        return [{"drafts": drafts, "temperature": t} for t in evaluation.temperatures[::-1]]

    done = []
    monkeypatch.setattr(evaluate, "measure_one", answer)
    asked = evaluation(folder, drafts=(3, 2))
    evaluate.evaluate_together(three, {}, {}, asked, lambda t, found, _: done.append((t, found)))
    found = {t.variant.name: [(r["drafts"], r["temperature"]) for r in rows] for t, rows in done}
    every = [(2, 0.0), (2, 1.0), (3, 0.0), (3, 1.0)]
    assert found == {"shared 2": every, "chain 2": every[:2], "chain 3": every}
    assert len(done) == 3


def test_steps_of_the_evaluation_are_compiled_once_while_variants_learn(three, folder, monkeypatch):
    seen = []

    def answer(trainee, frozen, prompts, evaluation, drafts):
        learning.wait(10)  # until the weights that training had are gone
        weight = float(trainee.state.params["w"].sum())
        seen.append((trainee.variant.name, drafts, evaluation.temperatures, weight))

    monkeypatch.setattr(evaluate, "measure_one", answer)
    learning = threading.Event()
    ahead = evaluate.Ahead({}, {}, evaluation(folder, drafts=(3, 2)))
    shared, chain, deep = three
    lost = dataclasses.replace(shared, state=TrainState(0, {"w": jnp.ones(2)}, {}))
    with ahead.running([lost, chain]):
        lost.state.params["w"].delete()
        learning.set()
    cold = (0.0,)
    assert sorted(seen) == [
        ("chain 2", 2, cold, 2.0),
        ("shared 2", 2, cold, 2.0),
        ("shared 2", 3, cold, 2.0),
    ]
    seen.clear()
    with ahead.running([shared, chain, deep]):
        pass
    assert seen == [("chain 3", 3, cold, 2.0)]


def test_failure_of_the_evaluation_while_variants_learn_is_raised(three, folder, monkeypatch):
    def fail(*args):
        raise ValueError("out of memory")

    monkeypatch.setattr(evaluate, "measure_one", fail)
    ahead = evaluate.Ahead({}, {}, evaluation(folder))
    with pytest.raises(ValueError, match="out of memory"), ahead.running(three):
        pass


def test_variant_that_diverges_is_said_to_and_not_measured(studied):
    [lost] = [row for row in studied["rows"] if row["variant"] == "lost"]
    assert lost["diverged"] and lost["acceptance"] == [] and lost["last_step"]["loss"] == "nan"
    assert not any(row["diverged"] for row in studied["rows"] if row is not lost)


def test_acceptance_is_that_of_the_exported_model(studied, folder):
    tokenizer = Tokenizer.load(TOKENIZER)
    prompts = evaluation(folder).read(tokenizer)
    params, cfg = load_hf(folder / "study" / "shared-2-seed1" / "model")
    with jax.default_matmul_precision("highest"):
        expected = measure(
            params, cfg, prompts, drafts=2, temperature=1.0, rule="rejection", max_tokens=6
        )
    [row] = [r for r in studied["rows"] if (r["variant"], r["seed"]) == ("shared 2", 1)]
    [record] = [r for r in row["acceptance"] if (r["drafts"], r["temperature"]) == (2, 1.0)]
    for name in ("accepted_per_drafted", "mean_accepted_length", "tokens", "per_position"):
        assert record[name] == pytest.approx(expected[name], nan_ok=True), name


def test_report_reads_what_a_study_writes(studied, folder):
    text = render([folder / "study" / "study.json"], folder / "report.md")
    assert "The variant that the others are compared with is **shipped**." in text
    [row] = [r for r in studied["rows"] if r["variant"] == "chain 2"]
    [record] = [r for r in row["acceptance"] if r["temperature"] == 0]
    assert f"| chain 2 | 1 | {record['accepted_per_drafted']:.3f} (" in text
    assert "Diverged, and not measured: lost." in text


def test_prompts_are_taken_from_every_document_in_turn(folder):
    tokenizer = Tokenizer.load(TOKENIZER)
    documents = list(iter_documents([folder / "code.txt"]))[:2]
    ids = [tokenizer.encode(d.text, bos=True) for d in documents]
    found = prompts_of(documents, tokenizer, count=4, length=8, stride=4)
    assert found == [ids[0][:8], ids[1][:8], ids[0][4:12], ids[1][4:12]]


def test_study_leaves_out_the_seeds_for_which_there_is_no_time(folder):
    table = {"baseline": "shared 2", "variants": [{**SHARED, "seeds": [0, 1]}]}
    (folder / "short.json").write_text(json.dumps(table))
    given = config(folder, "short", max_minutes=1e-3)
    asked = evaluation(folder, temperatures=(0.0,))
    result = json.loads(run_study(given, folder / "short.json", asked).read_text())
    assert result["skipped"] == ["shared-2-seed1"]
    [row] = result["rows"]
    assert 1 <= row["steps"] < STEPS and len(row["acceptance"]) == 1


def of(*rows: dict, baseline: str = "shared 2") -> dict:
    return {"baseline": baseline, "variants": list(rows)}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "not JSON"),
        ({"variants": [SHARED]}, 'expected an object of "baseline" and "variants"'),
        (of(), "at least one variant"),
        (of(SHARED, baseline="x"), r"\"baseline\": 'x' is none of \['shared 2'\]"),
        (of({"layers": 2}), 'variant 0: expected an object with a "name"'),
        (of({**SHARED, "top_k": 4}), r"\('shared 2'\): 'top_k' cannot be set here"),
        (of({**SHARED, "layers": 0}), r"\('shared 2'\): layers=0 must be at least 1"),
        (of({**SHARED, "layers": "two"}), r"\('shared 2'\): layers='two' must be of type int"),
        (of({**SHARED, "seeds": [1, 1]}), r"seeds=\[1, 1\] must list different"),
        (of({**SHARED, "trained": 0}), "trained=0 must be true or false"),
        (of({**SHARED, "data": "own"}), r"data='own' is none of the data sets: corpus"),
        (of({**SHARED, "data": ["own"]}), r"data=\['own'\] is none of the data sets"),
        (of(SHARED, {**RAW, "data": "corpus"}), r"without \['data'\]"),
        (of(SHARED, {**SHARED, "name": "Shared-2"}), "share the folder 'shared-2-seed0'"),
        (of({**SHARED, "trained": False}), r"shipped module, without \['ce', 'kl', 'layers'"),
    ],
)
def test_table_that_makes_no_sense_is_refused(table, message, folder):
    path = folder / "bad.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path, config(folder, "x"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "sets", "message"),
    [
        ([SHARED], {"own": ["own"]}, r"two\.json: no variant learns from the data set 'own'"),
        ([RAW], {"own": ["own"]}, r"two\.json: no variant learns from the data set 'own'"),
        ([OWN], {"own": ["own"]}, r"two\.json: no variant learns from the data set 'corpus'"),
        ([SHARED, OWN], {"own": []}, "data set 'own' is empty"),
        ([SHARED, OWN], {"own": ["nothing"]}, "no such file or folder"),
        ([SHARED], {"corpus": ["own"]}, "no further data set can be called 'corpus'"),
    ],
)
def test_data_sets_that_make_no_sense_are_refused(rows, sets, message, folder):
    (folder / "two.json").write_text(json.dumps(of(*rows, baseline=rows[0]["name"])))
    paths = {name: [folder / part for part in parts] for name, parts in sets.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_study(config(folder, "x"), folder / "two.json", evaluation(folder), sets=paths)


def test_data_sets_of_the_command_are_named(dskjax, folder, monkeypatch):
    seen = {}

    def fake(given, table, evaluation, *, sets, keep):
        seen.update(sets=sets, data=given.data)
        return Path("study.json")

    monkeypatch.setattr(run, "run_study", fake)
    table = ("--table", folder / "table.json", "--eval-data", folder / "code.txt")
    asked = (
        "train-mtp",
        "study",
        folder / "trunk",
        *table,
        "--out",
        folder / "x",
        "--data",
        "t.txt",
    )
    code, _, err = dskjax(*asked, "--data-set", "a=b.txt", "--data-set", "a=c=d.txt")
    assert code == 0, err
    assert seen == {"sets": {"a": [Path("b.txt"), Path("c=d.txt")]}, "data": [Path("t.txt")]}
    for broken in ("b.txt", "=b.txt", "a="):
        code, _, err = dskjax(*asked, "--data-set", broken)
        assert code == 2 and f"--data-set {broken}: expected NAME=PATH" in err


def test_variant_that_can_draft_nothing_of_what_is_asked_is_refused(folder):
    table = {"baseline": "one", "variants": [{"name": "one", "layers": 1}]}
    (folder / "one.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"'one' has 1 independent modules and cannot draft any"):
        run_study(config(folder, "x"), folder / "one.json", evaluation(folder))
