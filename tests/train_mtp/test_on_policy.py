"""Answers of the trunk itself: records that training reads back, and files that go on."""

import json
import shutil
from pathlib import Path

import pytest

from dskjax.checkpoint import load
from dskjax.decode import SamplingParams, generate
from dskjax.document_tokens import tokenise
from dskjax.documents import iter_documents
from dskjax.tokenizer import END_THINK, Tokenizer
from train_mtp import on_policy
from train_mtp.on_policy import read_prompts, write_answers

MODEL = Path(__file__).parents[2] / "examples" / "tiny-deepseek"
TOKENS = 12


@pytest.fixture(scope="module")
def model():
    params, cfg = load(MODEL, dtype="float32")
    return params, cfg, Tokenizer.load(MODEL)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    rows = [
        {"question": "What is the gcd of 12 and 18?", "answer": "left out"},
        {
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "3"},
            ]
        },
        {"text": "import os\nimport sys\n\n\ndef main():\n    return os.path.join('a', 'b')\n"},
        {"text": "short"},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.txt").write_text(
        "def read(path):\n    with open(path) as file:\n        return 1\n"
    )
    return folder


def write(model, prompts, out, **changes):
    params, cfg, tokenizer = model
    given = {"batch": 2, "max_tokens": TOKENS, "temperature": 0.7, "seed": 5}
    source = read_prompts([prompts], tokenizer, prefix=8)
    return write_answers(params, cfg, tokenizer, source, out, **{**given, **changes})


@pytest.fixture(scope="module")
def answers(model, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "deep" / "out.jsonl"
    assert write(model, prompts, out) == 4  # the short text has no prompt of 8 tokens
    return out


def test_prompts_end_where_the_model_is_to_go_on(model, prompts):
    tokenizer = model[2]
    found = list(read_prompts([prompts], tokenizer, prefix=8))
    assert [p.messages is None for p in found] == [False, False, True, True]
    assert found[0].thinking and tokenizer.is_thinking(found[0].ids)
    assert "left out" not in tokenizer.decode(found[0].ids)
    assert "3" not in tokenizer.decode(found[1].ids)
    assert all(len(p.ids) == 8 and p.ids[0] == tokenizer.bos_id for p in found[2:])
    assert found[1].source.endswith("a.jsonl:2")
    plain = next(read_prompts([prompts], tokenizer, prefix=8, thinking=False))
    assert not plain.thinking and END_THINK in tokenizer.decode(plain.ids)


def test_records_are_what_the_model_says_and_training_reads_them_back(model, prompts, answers):
    params, cfg, tokenizer = model
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    found = list(read_prompts([prompts], tokenizer, prefix=8))
    for n, (row, prompt) in enumerate(zip(rows, found, strict=True)):
        sampling = SamplingParams.make(1, temperature=0.7, seed=[5 + n])
        [ids] = generate(params, cfg, [prompt.ids], max_tokens=TOKENS, sampling=sampling).tokens
        said = tokenizer.decode(ids, skip_special=prompt.messages is None)
        if prompt.messages is None:
            assert row == {"prompt": tokenizer.decode(prompt.ids[1:]), "completion": said}
        else:
            last = row["messages"][-1]
            assert row["messages"][:-1] == prompt.messages
            assert said.startswith(last["reasoning_content"]) and last["reasoning_content"]
    for row, document in zip(rows, iter_documents([answers], tokenizer=tokenizer), strict=True):
        assert 0 < document.prompt < len(document.text)
        [(_, ids, answer)] = tokenise([document], tokenizer)
        said = row.get("completion") or row["messages"][-1]["reasoning_content"]
        assert tokenizer.decode(ids[answer:].tolist()).startswith(said)


def test_a_killed_run_goes_on_where_its_file_ends(model, prompts, answers, tmp_path):
    out = tmp_path / "out.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:15])  # as if killed while writing
    assert write(model, prompts, out) == 4
    assert out.read_text() == answers.read_text()
    assert write(model, prompts, out) == 4 and out.read_text() == answers.read_text()


def test_another_file_is_not_written_over(model, prompts, tmp_path):
    for text in ("not JSON\n", '{"text": "a corpus"}\n'):
        out = tmp_path / "out.jsonl"
        out.write_text(text)
        with pytest.raises(ValueError, match=r"out\.jsonl:1: not a record of an earlier run"):
            write(model, prompts, out)
        assert out.read_text() == text


def test_a_prompt_without_room_is_named(model, prompts, tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a prompt of \d+ tokens and max_tokens="):
        write(model, prompts, tmp_path / "out.jsonl", max_tokens=10**6)


def test_messages_must_be_messages(model, tmp_path):
    for row, why in (({"messages": "hi"}, "a list"), ({"messages": []}, "no message to answer")):
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"x\.jsonl:1: .*{why}"):
            list(read_prompts([path], model[2], prefix=8))


def test_command_writes_and_says_how_many(dskjax, model, prompts, tmp_path, monkeypatch):
    shutil.copyfile(prompts / "b.txt", tmp_path / "b.txt")
    seen = {}

    def fake(params, cfg, tokenizer, source, out, **options):
        seen.update(options, prompts=[p.ids for p in source])
        options["on_batch"](1, 7)
        return 1

    monkeypatch.setattr(on_policy, "write_answers", fake)
    files = ("--prompts", tmp_path / "b.txt", "--out", tmp_path / "o.jsonl")
    code, _, err = dskjax("train-mtp", "generate-data", MODEL, *files, "--prefix", 5, "--batch", 3)
    assert code == 0 and "1 records in" in err
    assert seen["batch"] == 3 and [len(ids) for ids in seen["prompts"]] == [5]
