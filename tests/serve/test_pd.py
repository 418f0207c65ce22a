"""Prefill here, decode there: the tokens are those of one engine, whatever happens on the wire."""

import dataclasses

import jax
import numpy as np
import pytest

from serve.engine_api import Role
from serve.transfer.faults import Fault, Faults, Rule
from serve.transfer.states import TransferState
from serve.transfer.transport import Mode
from tests.decode.plain import Ask
from tests.serve.pd_stack import PAGE, Layout, asks, check_texts, cluster, expected, requests_of
from tests.serve.scores import check_scores

PLAIN = Layout()
LAYOUTS = (
    PLAIN,
    Layout(prefill=2),
    Layout(decode=2),
    Layout(prefill_tp=2),
    Layout(decode_tp=2),
    Layout(prefill_tp=2, decode_tp=2),
    Layout(ep=2),
)
ALWAYS = {(PLAIN, "chain", "layerwise"), (LAYOUTS[-1], "recycled", "whole")}
MODES = ["whole", "layerwise"]
SCHEMES = {1: "recycled", 3: "chain"}


def cases():
    for layout in LAYOUTS:
        for modules, scheme in SCHEMES.items():
            for mode in MODES:
                name = f"{layout}-{scheme}-{mode}"
                marks = () if (layout, scheme, mode) in ALWAYS else (pytest.mark.full,)
                yield pytest.param(layout, modules, mode, id=name, marks=marks)


@pytest.mark.parametrize(("layout", "modules", "mode"), list(cases()))
def test_tokens_are_those_of_one_engine(layout, modules, mode, request):
    some = asks()
    with cluster(layout, modules, layerwise=mode == "layerwise") as pd:
        requests = requests_of(some, request.node.name)
        summaries = pd.serve(requests)
        assert check_texts(pd, some, requests, modules) == len(some)
        pd.assert_empty()
        for engine in pd.engines:  # a step must know where logits are split, to gather them
            tp = layout.prefill_tp if engine.role is Role.PREFILL else layout.decode_tp
            sharding = engine._runner.config.sharding
            assert layout.ep * tp == (1 if sharding is None else sharding.mesh.size)
        stats = pd.transport.stats
    for ask, summary in zip(some, summaries, strict=True):
        assert summary.tokens_transferred == len(ask.prompt)  # nobody was served another way
        assert summary.mode is Mode(mode) and summary.failures == 0
    assert stats.transfers == {"success": len(some)} and stats.opened == {mode: len(some)}
    assert {s.prefill for s in summaries} == {f"prefill{i}" for i in range(layout.prefill)}
    assert {s.decode for s in summaries} == {f"decode{i}" for i in range(layout.decode)}
    many = [parts for parts in pd.parts.values() if len(parts) > 1]
    assert bool(many) == (mode == "layerwise")
    accepted = sum(asked.accepted for asked in requests)
    assert accepted > 0  # the modules' rows and hidden states came along


def delivered(pd, id, layers, tokens):
    """What a transfer brought, put together: by cache leaf, [layers, rows, width]."""
    found, seen = {}, np.zeros((layers, -(-tokens // PAGE)), int)
    for ticket, part in pd.parts[id]:
        first, end = (edge - ticket.pages[0] for edge in part.pages)
        seen[slice(*part.layers), first:end] += 1
        for name in ("latent", "rope"):
            pages = np.asarray(getattr(part.arrays["cache"], name))[:, : end - first]
            whole = found.setdefault(
                name, np.full((layers, seen.shape[1], *pages.shape[2:]), np.nan, np.float32)
            )
            whole[slice(*part.layers), first:end] = pages
    assert (seen == 1).all(), "a page of a layer is missing, or came twice"
    rows = {n: x.reshape(layers, -1, x.shape[-1])[:, :tokens] for n, x in found.items()}
    rows["hidden"] = np.asarray(pd.parts[id][-1][1].arrays["hidden"])
    return rows


@pytest.mark.parametrize("modules", [pytest.param(1, marks=pytest.mark.full), 3], ids=SCHEMES.get)
def test_both_modes_bring_the_same(modules):
    """The whole rectangle, each page of each layer once; layer groups are programs of their own."""
    some, brought = [ask for ask in asks() if len(ask.prompt) > PAGE][:4], []
    for mode in MODES:
        with cluster(PLAIN, modules, layerwise=mode == "layerwise") as pd:
            requests = requests_of(some, f"both-{mode}-{modules}")
            pd.serve(requests)
            layers = pd.engines[0].compat.layers
            trunk = pd.engines[0]._runner.cfg.num_hidden_layers
            brought.append(
                [
                    delivered(pd, f"{asked.id}#0", layers, len(ask.prompt))
                    for ask, asked in zip(some, requests, strict=True)
                ]
            )
            pd.assert_empty()
    # Rows of the modules near the end are computed again by whoever decodes.
    final = -(layers - trunk) or None
    for whole, grouped in zip(*brought, strict=True):
        for name, value in whole.items():
            mine, theirs = value, grouped[name]
            if name != "hidden":
                np.testing.assert_allclose(mine[:trunk], theirs[:trunk], atol=1e-5, err_msg=name)
                mine, theirs = mine[:, :final], theirs[:, :final]
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_decoding_engine_has_is_not_sent_again(mode):
    ask = Ask(prompt=tuple(np.random.default_rng(5).integers(0, 5, 26).tolist()), max_tokens=4)
    longer = Ask(prompt=(*ask.prompt, 3, 1, 4), max_tokens=4)
    with cluster(PLAIN, 3, layerwise=mode == "layerwise") as pd:
        sent = []
        for n, some in enumerate((ask, ask, longer)):
            before = pd.transport.stats.nbytes
            [asked] = requests_of([some], f"again-{mode}-{n}", salt=f"again-{mode}")
            [summary] = pd.serve([asked])
            assert check_texts(pd, [some], [asked], 3) == 1
            sent.append((pd.transport.stats.nbytes - before, summary.tokens_transferred))
        pd.assert_empty()
    (first, all_tokens), (second, rest), (third, more) = sent
    assert all_tokens == 26 and rest < 10 and more < 13
    assert second < first / 2 and third <= first


WIDE = pytest.param(Layout(prefill_tp=2), marks=pytest.mark.full)


@pytest.mark.parametrize("layout", [PLAIN, WIDE], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_prompts_are_scored_by_who_computes_them(mode, layout):
    """Whole, even where others go layer by layer; and what the decoding engine has is no hindrance
    on either side.
    """
    some, modules = [ask for ask in asks() if len(ask.prompt) > 1], 3
    with cluster(layout, modules, layerwise=mode == "layerwise") as pd:
        first = requests_of(some[:4], f"scored-{mode}-{layout}")
        pd.serve(first)
        for most in (0, 1, 12):
            cut = [dataclasses.replace(ask, max_tokens=most) for ask in some]
            name = f"scored-{mode}-{layout}"
            requests = requests_of(cut, f"{name}-{most}", salt=name, prompt_logprobs=3)
            summaries = pd.serve(requests)
            for ask, asked, summary in zip(cut, requests, summaries, strict=True):
                said = pd.answers.prompt_logprobs[asked.id]
                check_scores(said, ask.prompt, 3, modules)
                assert pd.answers.text(asked.id) == expected(ask, modules)
                assert summary.mode is Mode.WHOLE and summary.failures == 0
                assert (summary.tokens_transferred > 0) == (most > 1)
        pd.assert_empty()
    assert not any(asked.id in pd.answers.prompt_logprobs for asked in first)


@pytest.mark.parametrize("name", ["dropped", "failed at the end"])
def test_a_prompt_is_told_once_however_often_it_is_sent(name):
    some, modules = asks(6, seed=4), 3
    faults = Faults([dataclasses.replace(rule) for rule in SCRIPTS[name]])
    with cluster(PLAIN, modules, layerwise=True, faults=faults, **LIMITS) as pd:
        requests = requests_of(some, f"once-{name}", prompt_logprobs=2)
        summaries = pd.serve(requests)
        assert check_texts(pd, some, requests, modules) == len(some)
        pd.assert_empty()
    assert sum(summary.failures for summary in summaries) > 0
    for ask, asked in zip(some, requests, strict=True):
        check_scores(pd.answers.prompt_logprobs[asked.id], ask.prompt, 2, modules)


def test_a_request_that_its_first_token_ends_is_not_sent():
    some = [Ask(prompt=(1, 2, 3, 4, 0, 1), max_tokens=1)]
    with cluster(PLAIN, 3, layerwise=False) as pd:
        requests = requests_of(some, "one")
        [summary] = pd.serve(requests)
        assert check_texts(pd, some, requests, 3) == 1
        assert summary.tokens_transferred == 0
        pd.assert_empty()


# ------------------------------------------------------------------ faults

LIMITS = dict(transfer_timeout=0.5, retries=2)
PATIENT = dict(transfer_timeout=30.0, retries=2)  # nothing is lost: only a hang lasts as long
SCRIPTS = {
    "dropped": [Rule(fault=Fault.DROP)],
    "dropped for ever": [Rule(fault=Fault.DROP, times=100)],
    "corrupted": [Rule(fault=Fault.CORRUPT, times=3)],
    "corrupted for ever": [Rule(fault=Fault.CORRUPT, times=1000)],
    "late": [Rule(fault=Fault.DELAY, seconds=0.1, times=4)],
    "too late": [Rule(fault=Fault.DELAY, seconds=0.8, times=4)],
    "twice": [Rule(fault=Fault.DUPLICATE, seconds=0.05, times=4)],
    "twice at once": [Rule(fault=Fault.DUPLICATE, times=4)],
    "overtaken": [Rule(fault=Fault.REORDER, seconds=0.1, times=4)],
    "not taken": [Rule(fault=Fault.FAIL_PUSH, times=3)],
    "failed at the start": [
        Rule(fault=Fault.FAIL_STATE, state=TransferState.TRANSFERRING, times=3)
    ],
    "failed at the end": [Rule(fault=Fault.FAIL_STATE, state=TransferState.SUCCESS, times=3)],
    "never acknowledged": [Rule(fault=Fault.LOSE_ACK, times=2)],
}
HARMLESS = {"late", "overtaken", "twice", "twice at once"}
FATAL = {"dropped for ever", "corrupted for ever"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fault_never_makes_a_wrong_token(name, mode):
    some = asks(6, seed=1)
    faults = Faults([dataclasses.replace(rule) for rule in SCRIPTS[name]])  # they are used up
    limits = PATIENT if name in HARMLESS else LIMITS
    with cluster(PLAIN, 3, layerwise=mode == "layerwise", faults=faults, **limits) as pd:
        requests = requests_of(some, f"{name}-{mode}")
        summaries = pd.serve(requests)
        right = check_texts(pd, some, requests, 3)
        pd.assert_empty()
        assert pd.transport.healthy
    assert sum(faults.injected.values()) > 0
    failures = sum(summary.failures for summary in summaries)
    assert (failures == 0) == (name in HARMLESS), summaries
    if name in FATAL:
        assert right == 0
        errors = [pd.answers.ends[asked.id].message for asked in requests]
        assert all("transfer" in error or "arrive" in error for error in errors), errors
    else:
        assert right == len(some)  # what failed was tried again


RATES = (
    "drop=0.03,delay=0.1,duplicate=0.05,reorder=0.05,corrupt=0.05,fail-push=0.03,"
    "fail-state=0.01,lose-ack=0.03,seconds=0.2"
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 8))]
)
def test_faults_at_random(mode, seed):
    some = asks(30, seed=2)
    faults = Faults.parse(f"{RATES},seed={seed}")
    with cluster(PLAIN, 3, layerwise=mode == "layerwise", faults=faults, **LIMITS) as pd:
        requests = requests_of(some, f"random-{mode}-{seed}")
        pd.serve(requests)
        right = check_texts(pd, some, requests, 3)
        pd.assert_empty()
    assert right > len(some) // 3 and len(faults.injected) > 3, (right, faults.injected)


def test_the_checks_see_a_page_that_came_wrong():
    """A part that is changed where no checksum looks gives wrong tokens, and they are noticed."""
    some = asks(8, seed=3)
    with cluster(PLAIN, 3, layerwise=False) as pd:
        target = pd.engines[-1]
        install = target._link._programs.install

        def broken(state, arrays, *args, **options):
            shifted = jax.tree.map(lambda x: x + 1, arrays["cache"])
            return install(state, {**arrays, "cache": shifted}, *args, **options)

        target._link._programs.install = broken
        target._link._checks.poll = lambda: [
            (p.transfer_id, p.index, True) for p in target._link._checks._pending
        ]
        try:
            requests = requests_of(some, "broken")
            pd.serve(requests)
            with pytest.raises(AssertionError):
                check_texts(pd, some, requests, 3)
        finally:
            del target._link._programs.install
    assert expected(some[-1], 3) != pd.answers.tokens[requests[-1].id]
