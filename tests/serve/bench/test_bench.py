"""Whole measurements of a fake service over HTTP, in process and by the command."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from dskjax import cli
from serve.api import GenerateOptions, OverloadedError
from serve.bench.options import BenchOptions
from serve.bench.reference import compare
from serve.bench.report import SYNTHETIC, table, to_json
from serve.bench.run import run_bench
from serve.bench.summary import Objectives
from serve.http import create_app
from serve.metrics import Metrics
from serve.request import SamplingOptions, StopOptions
from tests.serve.bench.virtual import answer
from tests.serve.http.fake import TINY, listening

GREEDY = GenerateOptions(sampling=SamplingOptions(temperature=0.0), stop=StopOptions(max_tokens=1))
PROMPTS = [f"prompt number {n}" for n in range(9)]


@pytest.fixture
def url(service):
    metrics = Metrics("org/fake")
    engine = metrics.engine("ifb0")
    given = service._usage

    def usage(prompt, options, count):
        found = given(prompt, options, count)
        drafted = options.sampling.temperature > 0
        engine._drafts.inc(count if drafted else 0)
        engine._accepted.inc(found.accepted if drafted else 0)
        return found

    service._usage = usage
    service.delay, service.max_model_len = 0.002, 1000
    with listening(create_app(service, registry=metrics.registry)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return file


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 30)
    return file


@pytest.fixture
def bench(url, monkeypatch, capsys, tmp_path):
    """Runs `dskjax bench serve ARGS...`; returns (exit code, stdout, stderr, JSON or None).

    The server starts before capsys does: it sets logging up anew, whereupon absl's handler closes
    its stream unless that is the sys.stderr of the moment.
    """

    def run(*args):
        out = tmp_path / "out"
        arguments = ["bench", "serve", "--url", url, "--out", out, *args]
        monkeypatch.setattr("sys.argv", ["dskjax", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        file = out / "serve.json"
        if file.exists():
            assert (out / "serve.png").stat().st_size > 5000
        data = json.loads(file.read_text()) if file.exists() else None
        return exit_.value.code or 0, captured.out, captured.err, data

    return run


def forgetful(service):
    """A server whose texts change when it is busy."""
    given = service._output

    def output(prompt, options, index, step, count):
        found = given(prompt, options, index, step, count)
        return dataclasses.replace(found, text=found.text.upper()) if service.open > 1 else found

    service._output = output


def test_a_closed_loop(bench, service, prompts):
    code, out, err, data = bench(
        *("--prompts", prompts, "--concurrency", 3, "--requests", 12, "--warmup", 2),
        *("--max-tokens", 8, "--repeats", 2, "--device", "a fake", "--accept", "block"),
    )
    assert code == 0, err
    assert "4 of 4 equal" not in out and "8 of 8 equal" in out
    assert "1.000" not in out and "0.500, mean accepted length 2.00" in out
    assert len(data["runs"]) == 2 and data["device"] == "a fake"
    summary = data["runs"][0]["summary"]
    assert summary["completed"] == 12 and summary["errors"] == {}
    assert summary["output_tokens"]["p50"] == 4
    assert summary["speculation"]["mean_accepted_length"] == 2.0
    assert summary["tokens_per_s"]["output"] == pytest.approx(48 / summary["seconds"])
    assert len(data["runs"][0]["samples"]["ttft_s"]) == 12
    qpm = data["spread"]["qpm"]
    assert qpm["min"] <= qpm["median"] <= qpm["max"]
    assert data["synthetic_acceptance"] is False and "api_key" not in data["settings"]
    measured = [options for _, options, _ in service.calls if options.sampling.temperature > 0]
    assert len(measured) == 2 * (12 + 2)
    assert {options.accept.name for options in measured} == {"block"}
    assert len({options.sampling.seed for options in measured}) == len(measured)
    assert len(service.calls) - len(measured) == 4 + 2 * 4  # alone once, amid each run
    assert 3 <= service.most <= 3 + 4


def test_an_open_loop_of_drawn_lengths(bench, service, text):
    service.length = 1000
    code, out, err, data = bench(
        *("--text", text, "--scale", 0.01, "--rate", 50, "--constant", "--requests", 15),
        *("--references", 2),
    )
    assert code == 0, err
    summary = data["runs"][0]["summary"]
    assert summary["completed"] == 15 and summary["seconds"] >= 14 / 50
    drawn = [call for call in service.calls if call[1].sampling.temperature > 0]
    assert all(options.stop.ignore_eos for _, options, _ in drawn)
    assert all(len(prompt) <= 160 and prompt[0] == TINY.bos_id for prompt, _, _ in drawn)
    assert {len(prompt) for prompt, _, _ in drawn} != {35}
    assert summary["input_tokens"]["mean"] == pytest.approx(
        sum(len(prompt) for prompt, _, _ in drawn[4:]) / 15, rel=0.5
    )


def test_the_local_tokenizer_gives_the_same_prompts(bench, service, text):
    arguments = ("--text", text, "--scale", 0.01, "--concurrency", 2, "--requests", 4)
    assert bench(*arguments)[0] == 0
    first = sorted(prompt for prompt, _, _ in service.calls)
    service.calls.clear()
    assert bench(*arguments, "--tokenizer", "examples/tiny-deepseek")[0] == 0
    assert first == sorted(prompt for prompt, _, _ in service.calls)


def test_a_search(bench, service, prompts):
    """The first of four words takes 2 ms, so that no rate keeps 1 ms and every rate seconds."""
    search = ("--prompts", prompts, "--search", "--rate", 40, "--requests", 6)
    search = (*search, "--probe-seconds", 0.1, "--probes", 3)
    code, out, err, data = bench(*search, "--slo-tpot", 1.0, "--slo-ttft", 5.0, "--repeats", 2)
    assert code == 0, err
    assert data["search"]["best_qpm"] == pytest.approx(9600) and not data["search"]["bounded"]
    assert [point["qpm_offered"] for point in data["search"]["curve"]] == [2400, 4800, 9600]
    assert data["search"]["curve"][2]["summary"]["requests"] == 16
    assert len(data["runs"]) == 2 and "9600.0 QPM" in out
    code, out, err, data = bench(*search, "--slo-ttft", 0.001)
    assert code == 1 and data["search"]["best_qpm"] is None and data["runs"] == []
    assert "no rate of 3 kept the objectives" in err


def test_texts_that_change_under_load_fail_the_run(bench, service, prompts):
    forgetful(service)
    arguments = ("--prompts", prompts, "--concurrency", 4, "--requests", 8)
    code, out, err, data = bench(*arguments)
    assert code == 1 and "greedy texts changed under load" in err
    assert data["reference"]["mismatches"]
    first = data["reference"]["mismatches"][0]
    assert first["alone"] != first["loaded"] and first["at"] >= 0
    code, out, err, data = bench(*arguments, "--allow-mismatch")
    assert code == 0 and "greedy texts changed under load" in err


def test_reference_answers_that_never_come_are_no_check(bench, service, prompts):
    given = service.generate

    def generate(prompt, options, *, request_id):
        if options.sampling.temperature == 0 and service.calls[-1][1].sampling.temperature > 0:
            raise OverloadedError("full")
        return given(prompt, options, request_id=request_id)

    service.calls.append(([], GREEDY, ""))
    service.generate = generate
    code, out, err, data = bench("--prompts", prompts, "--concurrency", 1, "--requests", 8)
    assert code == 1 and "no greedy text came back under load" in err
    assert data["reference"] == {"compared": 0, "mismatches": []}
    assert data["runs"][0]["summary"]["completed"] == 8


def test_simulated_acceptance_is_marked_and_not_compared(bench, service, prompts):
    service.synthetic = True
    forgetful(service)
    code, out, err, data = bench("--prompts", prompts, "--concurrency", 4, "--requests", 8)
    assert code == 0 and data["synthetic_acceptance"] is True
    assert SYNTHETIC in out and "not compared" in out


def test_requests_that_fail_are_counted_by_kind(service, url, prompts):
    given = service.generate

    def generate(prompt, options, *, request_id):
        if options.sampling.temperature > 0 and len(service.calls) % 3 == 0:
            service.calls.append((list(prompt), options, request_id))
            raise OverloadedError("full")
        return given(prompt, options, request_id=request_id)

    service.generate = generate
    options = BenchOptions(
        url=url, prompts=prompts, concurrency=2, requests=30, options={"temperature": 1.0}
    )
    result = run_bench(options, Console(quiet=True))
    errors = result.trials[0].summary["errors"]
    assert set(errors) == {"HTTP 429"} and 3 <= errors["HTTP 429"] < 30
    page = io.StringIO()
    Console(file=page, width=120).print(table(result, Objectives()))
    shown = page.getvalue()
    assert re.search(rf"errors\s+│\s+{errors['HTTP 429']} x HTTP 429", shown)
    assert json.dumps(to_json(result), allow_nan=False)


def test_a_server_that_answers_nobody_is_no_result(bench, service, prompts):
    service.refusal = OverloadedError("full")
    code, _, err, data = bench("--prompts", prompts, "--rate", 5)
    assert code == 2 and data is None
    assert "the server fails without load: HTTP 429: full" in err.replace("\n", " ")
    code, _, err, _ = bench("--prompts", prompts, "--rate", 50, "--references", 0)
    assert code == 2 and "every request failed; the first: HTTP 429" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "PROMPTS"], "give exactly one of them"),
        (["--prompts", "PROMPTS", "--rate", 1, "--concurrency", 1], "give exactly one of them"),
        (["--rate", 1], "give either real prompts"),
        (["--prompts", "PROMPTS", "--rate", 1, "--text", "PROMPTS"], "give either real prompts"),
        (["--prompts", "PROMPTS", "--rate", -1], "must be positive"),
        (["--prompts", "PROMPTS", "--rate", 1, "--requests", 0], "requests=0 must be at least 1"),
        (["--prompts", "PROMPTS", "--rate", 1, "--warmup", -1], "warmup=-1"),
        (["--prompts", "PROMPTS", "--rate", 1, "--percentile", 0], "must be above 0"),
        (["--prompts", "nowhere.jsonl", "--rate", 1], "nowhere.jsonl: no such file"),
        (["--prompts", "PROMPTS", "--rate", 1, "--model", "x"], "no model 'x'; it has org/fake"),
        (["--text", "PROMPTS", "--rate", 1], "the server takes 1000 together"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(bench, prompts, arguments, said):
    code, _, err, data = bench(*[prompts if a == "PROMPTS" else a for a in arguments])
    assert code == 2 and data is None
    assert said in err.replace("\n", " ")


def test_compare_names_the_first_difference():
    def said(text, **rest):
        return answer(0.0, 0.0, 1.0, 2.0, text=text, **rest)

    alone = [said("abc"), said("abc"), said("ab"), said("abc")]
    failed = answer(0.0, 0.0, 1.0, 2.0, text="", error="timeout")
    check = compare(alone, [said("abc"), said("abd"), said("abc"), failed])
    assert (check.asked, check.compared) == (4, 3)
    assert [(m["prompt"], m["at"]) for m in check.mismatches] == [(1, 2), (2, 2)]
