"""The report of a study as a Markdown page, every number and finding computed from its results.

What a person reads out of the numbers stands between two marks (`BEGIN`, `END`) and is kept when
the page is written again.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train_mtp.study import figures, findings
from train_mtp.study.compare import OBJECTIVE, Gain, Row, Score, Setting, Study
from train_mtp.study.findings import percent, points
from train_mtp.study.published import PUBLISHED, SOURCE

BEGIN = "<!-- reading: what stands from here to its end is kept when this page is written again -->"
END = "<!-- end of reading -->"


def write_page(results: Sequence[Path], out: Path) -> list[Path]:
    """Writes the page and its plots beside it; returns what was written.

    Args:
        results: `study.json` files of one study.
        out: the page, .md.

    Raises:
        ValueError: the results do not fit together, or a page is there whose marks are broken.
    """
    text, stem = render(results, out), out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.draw(Study.read(results), stem)
    out.write_text(text)
    return [out, *figures.paths(stem).values()]


def render(results: Sequence[Path], out: Path) -> str:
    """The text of the page, with what a person wrote on the one that is there. See `write_page`."""
    words = ["dskjax", "train-mtp", "study-report", *map(str, results), "--out", str(out)]
    plots = {name: path.name for name, path in figures.paths(out.with_suffix("")).items()}
    return page(Study.read(results), plots, shlex.join(words), kept_reading(out))


def kept_reading(path: Path) -> str:
    """What a person wrote on the page; empty if there is no page yet.

    Raises:
        ValueError: the page has not one block of it.
    """
    if not path.is_file():
        return ""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(
            f"{path}: expected one block from {BEGIN!r} to {END!r}, whose text is kept; put the "
            "marks back, or write to another file"
        )
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def page(study: Study, plots: Mapping[str, str], command: str, reading: str) -> str:
    """The page.

    Args:
        study: what was measured.
        plots: file names beside the page (`figures.paths`).
        command: what writes it.
        reading: what a person adds.
    """
    batches = "batches of a seed" + (" and data set" if len(study.learnt) > 1 else "")
    lines = [
        "# Several MTP layers against one, on one frozen trunk",
        "",
        f"This page is written by `{command}`; only the section *Reading* is by hand.",
        "",
        "Each variant below is a set of MTP heads trained on the same frozen trunk, on the same "
        f"{batches}. What it is worth is measured by real speculative decoding of held-out "
        "prompts: *accepted / drafted* counts draft tokens, the *mean accepted length* is 1 + "
        "accepted drafts per step. The variant that the others are compared with is "
        f"**{study.baseline}**.",
        "",
        f"![gain in accepted length by variant]({plots['gains']})",
        "",
        "## Findings",
        "",
        *(f"- {sentence}" for sentence in findings.sentences(study)),
        "",
        "## Reading",
        "",
        *(BEGIN, reading, END, ""),
        *_trunk(study),
        *_sets(study),
        *_heads(study),
        *_acceptance(study),
        *_gains(study),
        *_published(study),
        *_rivals(study),
        *_data(study),
        *_positions(study, plots["positions"]),
        *_kinds(study, plots["kinds"]),
        *_provenance(study),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _trunk(study: Study) -> Iterator[str]:
    trunk = study.trunk
    yield from ("## Trunk", "")
    facts = [["SHA-256 of the weights", f"`{trunk['sha256']}`"]]
    for name, label in (("parameters", "parameters"), ("steps", "steps"), ("tokens", "tokens")):
        if name in trunk:
            facts.append([label, f"{trunk[name]:,}"])
    if "corpus" in trunk:
        corpus, epochs = trunk["corpus"], trunk["epochs"]
        facts.append(["text", f"{corpus['tokens']:,} tokens, seen {epochs:g} times"])
    if "train_seconds" in trunk:
        facts.append(["seconds of training", f"{trunk['train_seconds']:,.0f}"])
    if "devices" in trunk:
        facts.append(["device", str(trunk["devices"])])
    yield from table(["trunk", ""], facts)
    if scores := trunk.get("validation"):
        yield from table(
            ["held-out text", "loss, nats/token", "bits per byte", "loss of its own module"],
            [
                [kind, f"{one['loss']:.3f}", f"{one['bits_per_byte']:.3f}", _row(one["mtp_loss"])]
                for kind, one in scores.items()
            ],
        )


def _sets(study: Study) -> Iterator[str]:
    """What the data sets are, if there are several."""
    if len(study.learnt) < 2:
        return
    yield from ("## Data", "")
    yield (
        "Tokens learnt are those that count in the loss: all of a text, of a record with a prompt "
        "what follows it."
    )
    yield ""
    body = []
    for name, facts in study.sets.items():
        counts = [f"{facts[what]:,}" for what in ("documents", "tokens", "scored")]
        body.append([name, ", ".join(facts["files"]), *counts])
    yield from table(["data set", "files", "documents", "tokens", "tokens learnt"], body)


def _heads(study: Study) -> Iterator[str]:
    options, several = study.options, len(study.learnt) > 1
    yield from ("## Heads", "")
    yield (
        f"{options['batch_size']} rows of {options['seq_len']} tokens a step, "
        f"{options['precision']}, the trunk's law at temperature {options['temperature']:g} cut to "
        f"its {options['top_k']} likeliest tokens. CE and KL, in nats, are those of the last "
        "step's batch, by depth; of several seeds the first."
    )
    yield ""
    body = []
    for name in dict.fromkeys((*study.names, *(row["variant"] for row in study.rows))):
        rows = [row for row in study.rows if row["variant"] == name]
        row, last = rows[0], rows[0]["last_step"]
        losses = [_row(last[loss]) if loss in last else "" for loss in ("mtp_ce", "mtp_kl")]
        steps, tokens = (sorted({row[what] for row in rows}) for what in ("steps", "tokens"))
        body.append(
            [
                name + (" (diverged)" if any(row["diverged"] for row in rows) else ""),
                row["weights"] if row["trained"] else "as they came",
                str(row["layers"]),
                objective(row) if row["trained"] else "",
                *([row["data"] if row["trained"] else ""] if several else []),
                ", ".join(str(row["seed"]) for row in rows) if row["trained"] else "",
                f"{row['parameters']:,}",
                " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1]))),
                " to ".join(f"{n:,}" for n in dict.fromkeys((tokens[0], tokens[-1]))),
                *losses,
            ]
        )
    header = ["variant", "weights", "depths", "objective", *(["data"] if several else []), "seeds"]
    yield from table([*header, "parameters", "steps", "tokens", "CE", "KL"], body)
    if study.skipped:
        yield f"Left out for lack of time: {', '.join(study.skipped)}."
        yield ""


def _acceptance(study: Study) -> Iterator[str]:
    how, kinds = study.evaluation, study.evaluation["prompts"]
    yield from ("## Acceptance", "")
    yield (
        f"{sum(kinds.values())} prompts of {how['prompt_tokens']} tokens, continued by "
        f"{how['max_tokens']} tokens each under the rule {how['rule']}. Seeds are joined; ± is "
        "the standard deviation over seeds, the interval that over prompts (bootstrap)."
    )
    yield ""
    body = []
    for name in study.names:
        scores = [(setting, study.score(name, setting)) for setting in study.settings]
        seeds = max(len(score.seeds) for _, score in scores if score is not None)
        body.append([name, str(seeds), *(_score(score) for _, score in scores)])
    header = ["variant", "seeds", *map(str, study.settings)]
    yield "accepted / drafted (95%), mean accepted length:"
    yield ""
    yield from table(header, body)


def _gains(study: Study) -> Iterator[str]:
    yield from (f"## Gain over {study.baseline}", "")
    yield (
        "In accepted / drafted, absolute (points, of 100) and relative, and relative in the mean "
        "accepted length; 95% intervals over prompts drawn for both alike. Only seeds that both "
        "have are compared."
    )
    yield ""
    for setting in study.settings:
        body = []
        for name in study.names:
            gain = study.gain(name, study.baseline, setting)
            if name != study.baseline and gain is not None:
                seeds = ", ".join(f"{100 * seed:+.1f}" for seed in gain.seeds)
                trained = study.of(name)["trained"]
                changes = [points(gain.absolute), percent(gain.relative), percent(gain.length)]
                body.append([name, *changes, seeds if trained else ""])
        yield from (f"### {setting}", "")
        header = ["variant", "points (95%)", "relative (95%)", "accepted length (95%)"]
        yield from table([*header, "relative by seed, %"], body)


def _published(study: Study) -> Iterator[str]:
    yield from ("## Beside published gains", "")
    yield (
        f"Published elsewhere, on another model: {SOURCE} trained five MTP layers for DeepSeek's "
        "671B and report more output tokens per second and request than with the open-source "
        "layer, recycled for every further draft: "
        + ", ".join(f"{one.name} {100 * one.gain:+.1f}% ({one.drafts} drafts)" for one in PUBLISHED)
        + ". Nearest to it is the mean accepted length at the same number of drafts, what a step "
        "costs being the same. Neither temperature, data nor intervals are published. Beside each "
        "stand the variants of the same kind, over the module as pre-trained and over the baseline."
    )
    yield ""
    references = list(dict.fromkeys((study.untrained or study.baseline, study.baseline)))
    body = []
    for one in PUBLISHED:
        for setting in (setting for setting in study.settings if setting.drafts == one.drafts):
            for name in one.variants(study):
                cells = []
                for reference in references:
                    gain = study.gain(name, reference, setting)
                    cells += _against(gain, one.gain)
                target = f"{one.name}, {100 * one.gain:+.1f}%"
                body.append([target, f"T = {setting.temperature:g}", name, *cells])
    header = ["published elsewhere", "temperature", "here"]
    for reference in references:
        header += [f"accepted length over {reference} (95%)", "", "accepted / drafted"]
    yield from table(header, body)


def _rivals(study: Study) -> Iterator[str]:
    yield from ("## What is learnt from: CE, KL or LK", "")
    yield (
        "Variants that differ in their objective alone, each against the first of its group on the "
        "same seeds: change of accepted / drafted in points (95%)."
    )
    yield ""
    yield from _groups(study, OBJECTIVE, "objective", objective)


def _data(study: Study) -> Iterator[str]:
    if len(study.learnt) < 2:
        return
    yield from ("## What is learnt from: the data", "")
    yield (
        "Variants that differ in their data alone, each against the first of its group on the same "
        "seeds: change of accepted / drafted in points (95%)."
    )
    yield ""
    yield from _groups(study, ("data",), "data", lambda row: row["data"])


def _groups(
    study: Study, fields: Sequence[str], label: str, value: Callable[[Row], str]
) -> list[str]:
    """A table of variants that differ in `fields` alone, whose values `value` spells."""
    body = []
    for group in study.rivals(fields):
        for name in group:
            gains = [study.gain(name, group[0], setting) for setting in study.settings]
            cells = [points(gain.absolute) if gain and name != group[0] else "" for gain in gains]
            body.append([name, value(study.of(name)), *cells])
    return table(["variant", label, *map(str, study.settings)], body)


def _positions(study: Study, plot: str) -> Iterator[str]:
    yield from ("## Acceptance by position", "")
    yield from (f"![acceptance by position, given all before it]({plot})", "")
    yield "P(draft i accepted, given all before it), mean over seeds; in brackets P(drafts 1..i)."
    yield ""
    body = []
    for name in study.names:
        cells = [_by_position(study.score(name, setting)) for setting in study.settings]
        body.append([name, *cells])
    yield from table(["variant", *map(str, study.settings)], body)


def _kinds(study: Study, plot: str) -> Iterator[str]:
    yield from ("## By kind of text", "")
    yield from (f"![gain in accepted / drafted by kind of text]({plot})", "")
    yield "accepted / drafted, and its relative gain over the baseline (* interval clear of 0):"
    yield ""
    for setting in study.settings:
        body = [
            [name, *(_kind(study, name, setting, kind) for kind in study.kinds)]
            for name in study.names
            if study.score(name, setting) is not None
        ]
        yield from (f"### By kind: {setting}", "")
        yield from table(["variant", *study.kinds], body)


def _provenance(study: Study) -> Iterator[str]:
    yield from ("## How it was made", "")
    if "command" in study.trunk:
        yield from ("The trunk:", "", f"    {study.trunk['command']}", "")
    for part in study.parts:
        yield from ("The heads and their acceptance:", "", f"    {part['command']}", "")
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        yield (
            f"{part['device']}; commit {part['commit']} (+: with changes); "
            f"{part['seconds']:,.0f} s in all, compilation included; {versions}."
        )
        yield ""


def objective(row: Row) -> str:
    """What a variant learns from: "0.1 CE + 0.9 KL"."""
    return " + ".join(f"{row[name]:g} {name.upper()}" for name in OBJECTIVE if row[name])


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    rows = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    spread = "" if score.spread is None else f" ± {score.spread:.3f}"
    low, high = score.ci95
    return f"{score.rate:.3f}{spread} ({low:.3f}-{high:.3f}), {score.length:.3f}"


def _against(gain: Gain | None, target: float) -> list[str]:
    if gain is None:
        return ["", "", ""]
    return [percent(gain.length), gain.length.against(target), percent(gain.relative)]


def _by_position(score: Score | None) -> str:
    if score is None:
        return ""
    both = zip(score.conditional, score.per_position, strict=True)
    return ", ".join(f"{given:.3f} ({chain:.3f})" for given, chain in both)


def _kind(study: Study, name: str, setting: Setting, kind: str) -> str:
    score, gain = (
        study.score(name, setting, kind),
        study.gain(name, study.baseline, setting, kind),
    )
    if score is None or gain is None or name == study.baseline:
        return "" if score is None else f"{score.rate:.3f}"
    mark = "*" if gain.relative.sign else ""
    return f"{score.rate:.3f} ({100 * gain.relative.value:+.1f}%{mark})"


def _row(values: Any) -> str:
    return ", ".join(f"{float(value):.3f}" for value in values)
