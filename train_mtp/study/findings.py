"""What the numbers of a study say, as sentences: each is chosen and filled by the numbers alone."""

from collections.abc import Iterator

from train_mtp.study.compare import OBJECTIVE, Change, Setting, Study
from train_mtp.study.published import PUBLISHED, Published


def sentences(study: Study) -> Iterator[str]:
    """Findings: the best variant, what training gave, weights, objectives, data, published gains,
    and what is missing.
    """
    for setting in study.settings:
        yield from _best(study, setting)
    if study.untrained not in (None, study.baseline):
        yield from _compared(study, study.baseline, study.untrained, "its training")
    for fields, what in (
        (("weights",), "the weights alone"),
        (OBJECTIVE, "the objective alone"),
        (("data",), "the data alone"),
    ):
        for first, *others in study.rivals(fields):
            for name in others:
                yield from _compared(study, name, first, what)
    yield from _larger(study)
    for published in PUBLISHED:
        for setting in study.settings:
            if setting.drafts == published.drafts:
                yield from _reached(study, published, setting)
    lost = dict.fromkeys(row["variant"] for row in study.rows if row["diverged"])
    if lost:
        yield f"Diverged, and not measured: {', '.join(lost)}."
    single = [
        name
        for name in study.names
        if study.of(name)["trained"] and sum(row["variant"] == name for row in study.rows) == 1
    ]
    if single:
        yield f"Of one seed only, so without a spread: {'; '.join(single)}."
    if study.skipped:
        yield f"Left out for lack of time: {', '.join(study.skipped)}."


def percent(change: Change) -> str:
    """A relative change and its interval in %: "+7.4% (5.0 to 9.8)"."""
    low, high = 100 * change.low, 100 * change.high
    return f"{100 * change.value:+.1f}% ({low:+.1f} to {high:+.1f})"


def points(change: Change) -> str:
    """An absolute change of a share and its interval in points of 100."""
    low, high = 100 * change.low, 100 * change.high
    return f"{100 * change.value:+.2f} ({low:+.2f} to {high:+.2f})"


def _best(study: Study, setting: Setting) -> Iterator[str]:
    """The variant that accepts most, and whether it is clear of the baseline."""
    scores = {name: study.score(name, setting) for name in study.names}
    found = {name: score.rate for name, score in scores.items() if score is not None}
    name = max(found, key=found.__getitem__)
    if name == study.baseline:
        yield f"{setting}: no variant accepts more than the baseline ({found[name]:.3f})."
        return
    gain = study.gain(name, study.baseline, setting)
    if gain is None:
        yield f"{setting}: most is accepted of *{name}*, {found[name]:.3f}; no seed is shared."
        return
    clear = {1: "clear of 0", 0: "not clear of 0", -1: "below 0 on the seeds that both have"}
    yield (
        f"{setting}: most is accepted of *{name}*, {found[name]:.3f} of the drafts against "
        f"{found.get(study.baseline, float('nan')):.3f}; on the seeds that both have, accepted "
        f"length {percent(gain.length)}, accepted / drafted {percent(gain.relative)}, "
        f"{clear[gain.relative.sign]}."
    )


def _compared(study: Study, name: str, over: str, what: str) -> Iterator[str]:
    """One variant against another, at all settings."""
    gains = {setting: study.gain(name, over, setting) for setting in study.settings}
    found = {setting: gain.relative for setting, gain in gains.items() if gain is not None}
    if not found:
        return
    said = "; ".join(f"{percent(change)} at {setting}" for setting, change in found.items())
    signs = [change.sign for change in found.values()]
    counts = {"clear gains": signs.count(1), "clear losses": signs.count(-1)}
    counts["not to be told from 0"] = signs.count(0)
    verdict = ", ".join(f"{how}: {count}" for how, count in counts.items() if count)
    yield (
        f"*{name}* against *{over}* ({what}), accepted / drafted: {said}. Of {len(found)} "
        f"settings, {verdict}."
    )


def _larger(study: Study) -> Iterator[str]:
    """Whether more depths or parameters than the smallest step beyond the baseline are worth it."""
    usual = study.of(study.baseline)
    group = [
        name
        for name in study.names
        if (row := study.of(name))["trained"]
        and name != study.baseline
        and all(row[field] == usual[field] for field in (*OBJECTIVE, "data"))
    ]
    if len(group) < 2:
        return
    smallest, *others = sorted(
        group, key=lambda name: (study.of(name)["parameters"], study.of(name)["layers"])
    )
    clear: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for name in others:
        for setting in study.settings:
            gain = study.gain(name, smallest, setting)
            if gain is not None:
                said = f"*{name}* {percent(gain.relative)} at {setting}"
                clear[gain.relative.sign].append(said)
    better, worse = ("; ".join(clear[sign]) or "none" for sign in (1, -1))
    yield (
        f"More depths or parameters than *{smallest}*, accepted / drafted against it: clear gains: "
        f"{better}; clear losses: {worse}; not to be told from 0: {len(clear[0])}."
    )


def _reached(study: Study, published: Published, setting: Setting) -> Iterator[str]:
    """Whether the variant nearest to a published one gains as much, of each data set."""
    nearest: dict[str, str] = {}
    for name in published.variants(study):
        nearest.setdefault(study.of(name)["data"], name)
    if not nearest:
        yield f"Nothing here is like the published {published.name}."
    reference = study.untrained or study.baseline
    for name in nearest.values():
        gain = study.gain(name, reference, setting)
        if gain is not None:
            yield (
                f"The {100 * published.gain:+.1f}% published of {published.name} on another model: "
                f"{gain.length.against(published.gain)} at T = {setting.temperature:g} by "
                f"*{name}*, whose accepted length has {percent(gain.length)} over *{reference}*."
            )
