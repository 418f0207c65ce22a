"""The runner in an engine: every option of a request is its own, and nothing compiles any more."""

import jax
import numpy as np
import pytest

from dskjax.decode.rules import RuleOptions
from serve.programs import CompileCounter
from serve.request import FinishReason
from tests.decode.plain import Ask, answer, logprobs
from tests.serve.stack import EOS, Answers, assert_empty, build, make_request, small, toy_model

RULES = ("strict", "rejection", "block", "typical", "relaxed", "hybrid")
MODULES = 3
PROMPT = (1, 2, 3, 4, 0, 1, 2, 2, 2, 3, 3, 3, 4)

EXACT = {
    "greedy": dict(),
    "no drafts": dict(drafts=0),
    "one draft": dict(drafts=1),
    "temperature": dict(temperature=1.3, seed=1),
    "top-p": dict(temperature=1.2, top_p=0.6, seed=2),
    "top-k": dict(temperature=1.5, top_k=2, seed=3),
    "min-p": dict(temperature=1.5, min_p=0.3, seed=4),
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(temperature=0.8, frequency_penalty=0.9, seed=5),
    "repetition": dict(temperature=1.3, seed=1, repetition_penalty=3.0),
    "bias": dict(logit_bias=((4, -3.0), (0, 2.5))),
    "seed": dict(temperature=1.3, seed=2**32 - 1),
    "logprobs": dict(temperature=1.0, seed=6, logprobs=3),
    "stop id": dict(stop_token_ids=(3,)),
    "min tokens": dict(stop_token_ids=(2, 3), min_tokens=6),
    "max tokens": dict(max_tokens=1),
    "ignore eos": dict(logit_bias=((EOS, 4.0),)),
    "eos": dict(logit_bias=((EOS, 4.0),), min_tokens=3, ignore_eos=False),
    "everything": dict(
        temperature=0.9,
        top_p=0.95,
        top_k=4,
        min_p=0.05,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logit_bias=((2, 0.5),),
        logprobs=5,
        stop_token_ids=(0,),
        min_tokens=5,
    ),
}
"""Requests whose text a slow oracle knows: greedy, or sampled under `strict`."""
LAWFUL = {rule: dict(temperature=1.1, seed=8, rule=rule) for rule in RULES[1:]} | {
    "typical, strictly": dict(temperature=1.1, seed=8, rule="typical:eps=0.9,delta=1.0"),
    "relaxed, strictly": dict(temperature=0.7, seed=8, rule="relaxed:top_n=1", thinking=True),
    "lenient": dict(temperature=1.1, seed=8, rule="hybrid:lenience=0.5", thinking=True),
}
"""Requests whose text depends on the drafts, but on nobody else."""
REQUESTS = {n: {"ignore_eos": True, **options} for n, options in (EXACT | LAWFUL).items()}


def ask_of(options) -> Ask:
    """The same request for the oracle."""
    ends = () if options["ignore_eos"] else (EOS,)
    return Ask(
        prompt=PROMPT,
        max_tokens=options.get("max_tokens", 12),
        temperature=options.get("temperature", 0.0),
        top_p=options.get("top_p", 1.0),
        top_k=options.get("top_k", 0),
        min_p=options.get("min_p", 0.0),
        seed=options.get("seed", 0),
        presence=options.get("presence_penalty", 0.0),
        frequency=options.get("frequency_penalty", 0.0),
        repetition=options.get("repetition_penalty", 1.0),
        bias=dict(options.get("logit_bias", ())),
        stop_ids=(*ends, *options.get("stop_token_ids", ())),
        min_tokens=options.get("min_tokens", 0),
    )


LADDERS = [True, pytest.param(False, marks=pytest.mark.full)]


@pytest.fixture(scope="module", params=LADDERS, ids=["few programs", "all programs"])
def served(request):
    """(engine, its answers), started. With all programs, a request runs in another one alone than
    among others: smaller, and without what it does not need.

    The draft temperature learns from the whole batch: without that, hybrid requests too are
    nobody's business but their own.
    """
    answers = Answers()
    strict = RuleOptions(name="strict")
    config = small(rules=RULES, accept=strict, pages=100, few_buckets=request.param)
    engine = build(toy_model(MODULES), config, answers)
    engine._runner.tuner = None
    engine.start()
    yield engine, answers
    engine.stop()


@pytest.fixture(scope="module")
def together(served):
    """Every request at once: more than there are slots, each with other neighbours."""
    engine, answers = served
    for name, options in REQUESTS.items():
        engine.submit(make_request(name, PROMPT, salt=name, **options))
    answers.wait(REQUESTS)
    assert_empty(engine)
    return answers


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_as_if_it_were_alone(served, together, name):
    engine, answers = served
    id = f"{name}, alone"
    engine.submit(make_request(id, PROMPT, salt=id, **REQUESTS[name]))
    answers.wait([id])
    assert answers.text(id) == together.text(name)
    assert answers.ends[id].finish is together.ends[name].finish
    if name in EXACT:
        assert together.text(name) == answer(ask_of(REQUESTS[name]), MODULES)
    if REQUESTS[name].get("logprobs") is not None:
        for mine, theirs in zip(answers.logprobs[id], together.logprobs[name], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [id for id, _ in mine.top] == [id for id, _ in theirs.top]


def test_each_option_did_something(together):
    """Otherwise the test above compares nothing."""
    texts = {name: together.text(name) for name in REQUESTS}
    plain = texts["greedy"]
    for name in ("presence", "bias", "ignore eos", "stop id", "min tokens"):
        assert texts[name] != plain, name
    sampled = [name for name in EXACT if REQUESTS[name].get("temperature")]
    assert len({tuple(texts[name]) for name in sampled}) == len(sampled)
    assert texts["no drafts"] == texts["one draft"] == plain
    lossy = ("typical, strictly", "relaxed, strictly", "lenient")
    assert len({tuple(texts[name]) for name in (*RULES[1:], *lossy)}) >= 5


def test_ends_are_told_with_their_reason(together):
    ends = together.ends
    assert ends["stop id"].finish is FinishReason.STOP and ends["stop id"].stop_token == 3
    assert ends["eos"].stop_token == EOS and len(together.text("eos")) == 4
    assert together.text("ignore eos").count(EOS) > 1
    assert ends["max tokens"].finish is FinishReason.LENGTH
    assert ends["max tokens"].stop_token is None


def test_logprobs_are_the_models_own(together):
    text, found = together.text("logprobs"), together.logprobs["logprobs"]
    exact = logprobs(ask_of(REQUESTS["logprobs"]), text, MODULES)
    assert len(found) == len(text)
    for own, row, token in zip(found, exact, text, strict=True):
        assert own.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [id for id, _ in own.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in own.top], row[best], atol=1e-4)


def test_nothing_compiles_after_the_warm_up(served):
    """Under every feature, chunk shape and batch size, requests that come and go included."""
    engine, answers = served
    rng = np.random.default_rng(0)
    pool, shared = list(REQUESTS.items()), rng.integers(0, 5, 30).tolist()
    counter = CompileCounter()
    ids, gone = [], set()
    for n in range(60):
        name, options = pool[n % len(pool)]
        options = {**options, "max_tokens": options.get("max_tokens", int(rng.integers(6, 20)))}
        prompt = rng.integers(0, 5, int(rng.integers(1, 40))).tolist()
        prompt = [*shared, *prompt[:4]] if n % 3 == 0 else prompt
        ids.append(f"load {n}, {name}")
        engine.submit(make_request(ids[-1], prompt, **options))
        if n % 7 == 6:
            engine.abort(ids[-3])
            gone.add(ids[-3])
    answers.wait(set(ids) - gone)
    assert_empty(engine)
    assert engine.scheduler.stats().hit_tokens > 0
    assert counter.count == 0
    jax.jit(lambda x: x * 3 + 1)(np.float32(1))
    assert counter.count == 1  # the counter counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt=(1, 5)), r"prompt has id 5, outside 0\.\.4 \(vocab_size\)"),
        (dict(prompt=(-1, 2)), "prompt has id -1"),
        (dict(logit_bias=((7, 1.0),)), "logit_bias has id 7"),
        (dict(stop_token_ids=tuple(range(2, 10))), "9 ids end the request"),
        (dict(max_tokens=60), "13 prompt tokens .* max_tokens=60 exceed the longest"),
    ],
)
def test_what_cannot_be_served_is_refused(served, changes, message):
    engine, _ = served
    engine.validate(make_request("good", PROMPT))
    changes = dict(changes)
    with pytest.raises(ValueError, match=message):
        engine.validate(make_request("bad", changes.pop("prompt", PROMPT), **changes))


def test_a_rule_that_was_not_compiled_in_is_refused(served):
    engine, _ = served
    config = engine._runner.config
    try:
        engine._runner.config = type(config)(spec=config.spec, rules=("strict", "block"))
        with pytest.raises(ValueError, match="'typical' is not among .*strict, block .*--rules"):
            engine.validate(make_request("bad", PROMPT, rule="typical"))
        engine.validate(make_request("good", PROMPT, rule="block"))
    finally:
        engine._runner.config = config
