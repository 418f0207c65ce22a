"""The report of a study: what it computes from the counts, says of them, and keeps."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dskjax.cli import app
from train_mtp.study.compare import OBJECTIVE, Change, Setting, Study
from train_mtp.study.findings import sentences
from train_mtp.study.page import BEGIN, END, kept_reading, page, render, write_page
from train_mtp.study.published import PUBLISHED
from train_mtp.study.variants import FIELDS

ROOT = Path(__file__).parents[2]
COLD, WARM = (Setting(drafts=2, temperature=t) for t in (0.0, 1.0))
KINDS = {"code": [2, 18, 10], "prose": [4, 8]}
"""Accepted drafts of the baseline by prompt; each prompt has 20 drafts."""
PLOTS = {"gains": "a.png", "positions": "b.png", "kinds": "c.png"}


def record(setting: Setting, more: int) -> dict:
    """Every prompt has `more` accepted drafts than the baseline's."""
    kinds = {}
    for kind, accepted in KINDS.items():
        counts = {"accepted": [n + more for n in accepted], "drafted": [20] * len(accepted)}
        at = {name: [0.9, 0.5] for name in ("per_position", "conditional")}
        kinds[kind] = {**counts, **at, "prompts": len(accepted)}
    rate = sum(n + more for counts in KINDS.values() for n in counts) / 100
    return {
        "drafts": setting.drafts,
        "temperature": setting.temperature,
        "accepted_per_drafted": rate,
        "mean_accepted_length": 1 + setting.drafts * rate,
        "per_position": [0.9, 0.5 + more / 10],
        "conditional": [0.9, "nan"],
        "kinds": kinds,
    }


def row(variant: str, seed: int = 0, more: int = 0, **changes) -> dict:
    """One row of a result: `more` accepted drafts a prompt at T = 0, none at T = 1."""
    usual = {**dict.fromkeys(FIELDS, 0), "weights": "shared", "layers": 1, "ce": 0.1, "kl": 0.9}
    return {
        **usual,
        "variant": variant,
        "seed": seed,
        "trained": True,
        "parameters": 1234,
        "steps": 7,
        "tokens": 448,
        "diverged": False,
        "last_step": {"mtp_ce": [2.5], "mtp_kl": [0.25]},
        "acceptance": [record(COLD, more), record(WARM, 0)],
        **changes,
    }


def of(*rows: dict, **changes) -> dict:
    """A result of a study."""
    return {
        "command": "dskjax train-mtp study TRUNK --out runs/study",
        "commit": "0123abcd",
        "device": "2 CPU cores",
        "versions": {"jax": "1.2.3"},
        "seconds": 1234.5,
        "trunk": {
            "sha256": "f00d" * 16,
            "command": "dskjax pretrain --out runs/trunk",
            "parameters": 567890,
            "steps": 11,
            "tokens": 720896,
            "corpus": {"tokens": 360448},
            "epochs": 2.0,
            "validation": {"code": {"loss": 1.25, "bits_per_byte": 0.75, "mtp_loss": [1.5]}},
        },
        "baseline": "one",
        "settings": {
            "steps": 7,
            "batch_size": 4,
            "seq_len": 16,
            "temperature": 1.0,
            "top_k": 32,
            "precision": "float32",
        },
        "evaluation": {
            "prompts": {kind: len(counts) for kind, counts in KINDS.items()},
            "prompt_tokens": 8,
            "max_tokens": 6,
            "rule": "rejection",
        },
        "skipped": [],
        "rows": list(rows),
        **changes,
    }


FIVE = {"weights": "independent", "layers": 5}
LOST = {"diverged": True, "acceptance": [], "last_step": {"mtp_ce": ["nan"]}}
RESULT = of(
    row("raw", more=-2, trained=False, steps=0, last_step={}),
    row("one", 0),
    row("one", 1, more=1),
    row("shared 2", 0, more=2, layers=2),
    row("shared 2", 1, more=2, layers=2),
    row("five", 1, more=4, **FIVE),
    row("five ce", 1, more=3, ce=1.0, kl=0.0, **FIVE),
    row("lost", **LOST),
    skipped=["five-seed2"],
)


@pytest.fixture(scope="module")
def study() -> Study:
    return Study([RESULT])


def test_seeds_are_joined(study):
    score = study.score("one", COLD)
    assert score.rate == pytest.approx((42 + 47) / 200)  # 42 of 100 accepted, then 1 more a prompt
    assert score.length == pytest.approx(1 + 2 * 0.445)
    assert score.seeds == pytest.approx([0.42, 0.47]) and score.spread == pytest.approx(
        0.05 / 2**0.5
    )
    assert score.per_position == pytest.approx([0.9, 0.55])
    low, high = score.ci95
    assert 0.2 < low < 0.35 and 0.55 < high < 0.7  # prompts differ widely
    assert study.score("raw", COLD).spread is None
    assert study.score("one", COLD, "prose").rate == pytest.approx((12 + 14) / 80)
    assert study.score("lost", COLD) is None and "lost" not in study.names


def test_gain_pairs_prompts_and_seeds(study):
    """Each prompt gains as much: however widely prompts differ, the difference is certain."""
    gain = study.gain("shared 2", "one", COLD)
    drafts = 5 * 20
    for figure in (gain.absolute.value, gain.absolute.low, gain.absolute.high):
        assert figure == pytest.approx((2 + 1) / 2 * 5 / drafts)
    assert gain.relative.value == pytest.approx(0.52 / 0.445 - 1)
    assert gain.relative.low < gain.relative.value < gain.relative.high
    assert gain.length.value == pytest.approx((1 + 2 * 0.52) / (1 + 2 * 0.445) - 1)
    assert gain.seeds == pytest.approx([0.52 / 0.42 - 1, 0.52 / 0.47 - 1])
    # Only seed 1 is shared.
    assert study.gain("five", "one", COLD).absolute.value == pytest.approx(0.62 - 0.47)
    # Seed 0 of what is not trained stands for every seed, on either side.
    assert study.gain("five", "raw", COLD).absolute.value == pytest.approx(0.62 - 0.32)
    assert study.gain("raw", "one", COLD).absolute.value == pytest.approx(0.32 - 0.445)
    assert len(study.gain("raw", "one", COLD).seeds) == 2
    prose = study.gain("five", "one", COLD, "prose")
    assert prose.absolute.value == pytest.approx(3 * 2 / 40)
    assert prose.relative.value == pytest.approx(6 / 14)
    assert study.gain("shared 2", "one", WARM).relative.sign == 0


def test_variants_without_a_common_seed_are_not_compared():
    study = Study([of(row("one", 0), row("other", 1, more=9))])
    assert study.gain("other", "one", COLD) is None
    assert "no seed is shared" in "".join(sentences(study))
    assert "other" in page(study, PLOTS, "x", "")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.08, 0.2, "reached"), (0.0, 0.07, "not reached"), (0.0, 0.1, "within the interval")],
)
def test_target_is_reached_if_the_interval_says_so(low, high, said):
    assert Change(value=0.075, low=low, high=high).against(0.075) == said


def test_published_gains_stand_beside_variants_of_their_kind(study):
    found = {one.name: one.variants(study) for one in PUBLISHED}
    assert found["shared MTP2"] == ["shared 2"]
    assert found["independent MTP2"] == ["five"] == found["independent MTP3"]
    said = [line for line in sentences(study) if "independent MTP2" in line]
    # Five's accepted length is 1 + 2 * 0.62 on seed 1, raw's 1 + 2 * 0.32: 37% more.
    assert ": reached at T = 0 by *five*" in said[0] and "+36.6%" in said[0]
    assert ": not reached at T = 1 by *five*" in said[1] and "+0.0%" in said[1]


def test_findings_follow_the_numbers():
    better, worse = (
        list(sentences(Study([of(row("one"), row("two", more=more))]))) for more in (3, -1)
    )
    assert "most is accepted of *two*, 0.570 of the drafts against 0.420" in better[0]
    assert "clear of 0" in better[0]
    assert worse[0] == "2 drafts, T = 0: no variant accepts more than the baseline (0.420)."
    rivals = of(row("one"), row("two", more=-1, ce=1.0, kl=0.0), row("three", more=2, lk=1.0))
    said = "\n".join(sentences(Study([rivals])))
    assert re.search(r"\*two\* against \*one\*.*-11.9% .*clear losses: 1, not to be told", said)
    assert re.search(r"\*three\* against \*one\*.*\+23.8% .*clear gains: 1, not to be told", said)


def test_larger_variants_are_held_against_the_smallest():
    deep = {"layers": 5, "parameters": 5000}
    rows = [row("five", more=2, **deep), row("two", more=1, layers=2), row("three", layers=3)]
    [said] = [s for s in sentences(Study([of(row("one"), *rows)])) if s.startswith("More depths")]
    assert "than *two*, accepted / drafted" in said
    assert re.search(
        r"gains: \*five\* \+10.6% [^;]* 2 drafts, T = 0; clear losses: \*three\*", said
    )
    assert said.endswith("not to be told from 0: 2.")


def test_rivals_differ_in_the_named_fields_alone(study):
    assert study.rivals(OBJECTIVE) == [["five", "five ce"]]
    assert study.rivals(("weights",)) == []
    same = of(row("one"), row("chain", weights="independent"), row("deep", layers=2))
    assert Study([same]).rivals(("weights",)) == [["one", "chain"]]


OWN = {"layers": 2, "data": "own"}
SETS = {
    "corpus": {"files": ["a.txt", "b.txt"], "documents": 12, "tokens": 3456, "scored": 3456},
    "own": {"files": ["c.jsonl"], "documents": 34, "tokens": 5678, "scored": 1234},
}


@pytest.fixture(scope="module")
def two_sets() -> Study:
    """Variants of two data sets; what learnt from the other one comes first in the result."""
    rows = [row("own", more=3, **OWN), row("own lk", more=-1, lk=1.0, **OWN), row("one")]
    rows += [row("two", more=1, layers=2), row("two lk", more=1, layers=2, lk=1.0)]
    return Study([of(*rows, data_sets=SETS)])


def test_data_are_compared_between_variants_alike_in_all_else(two_sets):
    assert two_sets.names == ["one", "two", "two lk", "own", "own lk"]
    assert two_sets.learnt == ["corpus", "own"]
    assert two_sets.rivals(("data",)) == [["two", "own"], ["two lk", "own lk"]]
    assert two_sets.rivals(OBJECTIVE) == [["two", "two lk"], ["own", "own lk"]]
    [first, second] = [line for line in sentences(two_sets) if "(the data alone)" in line]
    # 42 of 100 are accepted of the baseline, 5 more for each one more a prompt.
    assert first.startswith("*own* against *two* (the data alone), accepted / drafted: +21.3% (")
    assert second.startswith("*own lk* against *two lk* (the data alone), accepted / drafted: -21")
    assert "More depths" not in "".join(sentences(two_sets))


def test_published_gains_are_held_against_the_nearest_of_each_data_set(two_sets):
    [shared, *_] = PUBLISHED
    assert shared.variants(two_sets) == ["two", "own"]
    said = [line for line in sentences(two_sets) if "+7.4% published" in line and "T = 0" in line]
    assert [re.findall(r"by \*(\w+)\*", line) for line in said] == [["two"], ["own"]]


def test_page_says_which_data_were_learnt_from(two_sets):
    text = page(two_sets, PLOTS, "x", "")
    for said in (
        "on the same batches of a seed and data set. What",
        "| own | c.jsonl | 34 | 5,678 | 1,234 |",
        "| own | shared | 2 | 0.1 CE + 0.9 KL | own | 0 | 1,234 | 7 | 448 |",
        "| two | corpus |  |  |",
        "| own | own | +10.00 (+10.00 to +10.00) | +0.00 (+0.00 to +0.00) |",
    ):
        assert said in text, said


def test_page_of_one_data_set_does_not_speak_of_data(study):
    text = page(study, PLOTS, "x", "")
    assert "batches of a seed. What" in text
    assert "## Data" not in text and "the data" not in text and "| data |" not in text


def test_page_says_what_was_done(study):
    text = page(study, PLOTS, "dskjax train-mtp study-report R.json", "By hand.")
    for said in (
        "written by `dskjax train-mtp study-report R.json`",
        f"| SHA-256 of the weights | `{'f00d' * 16}` |",
        "| parameters | 567,890 |",
        "| text | 360,448 tokens, seen 2 times |",
        "| code | 1.250 | 0.750 | 1.500 |",
        "| five ce | independent | 5 | 1 CE | 1 | 1,234 | 7 | 448 | 2.500 | 0.250 |",
        "| lost (diverged) |",
        "Left out for lack of time: five-seed2.",
        "Diverged, and not measured: lost.",
        "| one | 2 | 0.445 ± 0.035 (",
        "| shared 2 | +7.50 (+7.50 to +7.50) | +16.9% (",
        "| +23.8, +10.6 |",
        "| independent MTP2, +8.8% | T = 0 | five | +36.6% (",
        "| five ce | 1 CE | -5.00 (-5.00 to -5.00) | +0.00 (+0.00 to +0.00) |",
        "| five | 0.900 (0.900), nan (0.900) |",
        "| five | 0.700 (+27.3%*) | 0.500 (+42.9%*) |",
        "    dskjax pretrain --out runs/trunk",
        "    dskjax train-mtp study TRUNK --out runs/study",
        "2 CPU cores; commit 0123abcd (+: with changes); 1,234 s in all, compilation included; ",
        "; jax 1.2.3.",
    ):
        assert said in text, said


def test_reading_is_kept_and_the_rest_written_anew(tmp_path):
    result, out = tmp_path / "result.json", tmp_path / "docs" / "report.md"
    result.write_text(json.dumps(RESULT))
    asked = ["train-mtp", "study-report", str(result), "--out", str(out)]
    assert CliRunner().invoke(app, asked).exit_code == 0
    names = ("report.md", "report.png", "report_kinds.png", "report_positions.png")
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(names)
    written = [(out.parent / name).read_bytes() for name in names]
    assert kept_reading(out) == "" and all(len(data) > 1000 for data in written)
    for name in names[1:]:
        assert f"]({name})" in out.read_text()

    mine = "What I read.\n\n- One thing | **another**\n"
    out.write_text(out.read_text().replace(END, mine + END).replace("+16.9%", "+99.9%"))
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert kept_reading(out) == mine.strip("\n")
    out.write_text(out.read_text().replace(mine.strip("\n"), ""))
    assert [(out.parent / name).read_bytes() for name in names] == written


def test_committed_page_is_that_of_the_committed_result(monkeypatch):
    monkeypatch.chdir(ROOT)
    result, out = Path("benchmarks/results/mtp-experiment.json"), Path("docs/mtp_experiment.md")
    assert out.read_text() == render([result], out)
    assert len(kept_reading(out)) > 500
    for name in re.findall(r"\]\((\w+\.png)\)", out.read_text()):
        assert (out.parent / name).is_file(), name


@pytest.mark.parametrize("broken", ["", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}"])
def test_page_with_broken_marks_is_not_overwritten(broken, tmp_path):
    result, out = tmp_path / "result.json", tmp_path / "report.md"
    result.write_text(json.dumps(RESULT))
    out.write_text(f"# By hand\n{broken}")
    with pytest.raises(ValueError, match=r"report\.md: expected one block from"):
        write_page([result], out)
    assert out.read_text() == f"# By hand\n{broken}"


def test_results_are_joined():
    first = of(row("one", 0), row("two", 0, more=1), skipped=["one-seed1", "two-seed1"])
    later = of(row("one", 1), skipped=["two-seed1"], command="later")
    study = Study([first, later])
    assert study.skipped == ["two-seed1"] and len(study.score("one", COLD).seeds) == 2
    text = page(study, PLOTS, "x", "")
    assert "    later\n" in text and "    dskjax train-mtp study TRUNK" in text


def partial() -> dict:
    """A step that drafted one token of two."""
    broken = copy.deepcopy(of(row("one")))
    broken["rows"][0]["acceptance"][1]["mean_accepted_length"] += 0.01
    return broken


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "at least one study.json"),
        ([RESULT, of(trunk={"sha256": "bad"})], "results differ in 'trunk'"),
        ([RESULT, of(settings={})], "results differ in 'settings'"),
        ([RESULT, of(row("one", 1))], "hold variant 'one' of seed 1 twice"),
        (
            [of(data_sets=SETS), of(data_sets={"own": SETS["corpus"]})],
            "results differ in the data set 'own'",
        ),
        ([of(row("two"))], "the baseline 'one' was not measured"),
        ([of(row("one", **LOST), row("two"))], "the baseline 'one' was not measured"),
        ([partial()], "2 drafts, T = 1 says mean_accepted_length"),
    ],
)
def test_results_that_do_not_fit_are_refused(results, message):
    with pytest.raises(ValueError, match=message):
        Study(results)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ('{"rows": []}', "lacks 'trunk'")]
)
def test_file_that_is_no_result_is_refused(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
        Study.read([path])


def test_interval_of_a_gain_draws_prompts():
    """Half of the prompts gain 4, half nothing: as wide as such a mean is, not as the prompts."""
    result = of(row("one"), row("two"))
    counts = np.random.default_rng(1).integers(0, 16, 200)
    for entry, more in zip(result["rows"], (0, np.arange(200) % 2 * 4), strict=True):
        accepted, drafted = (counts + more).tolist(), [20] * 200
        rate = sum(accepted) / 4000
        entry["acceptance"] = [
            {
                **record(COLD, 0),
                "accepted_per_drafted": rate,
                "mean_accepted_length": 1 + 2 * rate,
                "kinds": {"code": {"accepted": accepted, "drafted": drafted}},
            }
        ]
    change = Study([result]).gain("two", "one", COLD).absolute
    half = 1.96 * 2 / 20 / 200**0.5  # standard deviation of the prompts' gains: 2 of 20 drafts
    assert change.value == pytest.approx(0.1)
    assert change.high - change.value == pytest.approx(half, rel=0.15)
    assert change.value - change.low == pytest.approx(half, rel=0.15)
