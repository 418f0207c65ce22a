"""Answers of the trunk itself: records that training reads back, and files that go on."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from dskjax.checkpoint import load
from dskjax.decode import Generation, SamplingParams, generate
from dskjax.document_tokens import tokenise
from dskjax.documents import iter_documents
from dskjax.tokenizer import END_THINK, Tokenizer
from train_mtp import on_policy
from train_mtp.data import PackedDataset, build_store
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
    given = {"batch": 3, "max_tokens": TOKENS, "temperature": 0.7, "seed": 5}
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


def test_prompts_of_a_text_are_spread_over_it(model, tmp_path):
    lines = [f"value_{n} = function_{n}({n}, {n + 1})\n" for n in range(40)]
    (tmp_path / "a.txt").write_text("".join(lines) + "\x1e\n" + "x = 1\n" * 3)
    found = list(read_prompts([tmp_path], model[2], prefix=12, per_text=4))
    texts = [model[2].decode(prompt.ids[1:]) for prompt in found]
    assert all(len(p.ids) == 12 and p.ids[0] == model[2].bos_id for p in found)
    starts = [next(n for n, line in enumerate(lines) if line.startswith(t[:12])) for t in texts[:4]]
    assert starts[0] == 0 and all(8 < b - a < 13 for a, b in itertools.pairwise(starts))
    assert len(found) == 5 and texts[4].startswith("x = 1\n")  # later lines leave no room


def test_a_prompt_is_that_of_the_whole_text(model, tmp_path):
    """However few characters its tokens have, or many."""
    tokenizer = model[2]
    for text in ("import os\n" * 500, " NotImplementedError" * 50, "\U0001f600" * 300):
        (tmp_path / "a.txt").write_text(text)
        [prompt] = read_prompts([tmp_path], tokenizer, prefix=20)
        whole = tokenizer.encode(text, bos=True, parse_special=False)
        assert prompt.ids == whole[: len(prompt.ids)] and len(prompt.ids) > 16


def test_a_prompt_does_not_end_inside_a_character(model, tmp_path):
    text = "été: \U0001f600\U0001f601 – 漢字" * 20
    (tmp_path / "a.txt").write_text(text)
    for prefix in range(2, 40):
        [prompt] = read_prompts([tmp_path], model[2], prefix=prefix)
        assert text.startswith(model[2].decode(prompt.ids[1:]))
        assert prefix - 4 < len(prompt.ids) <= prefix


def test_every_batch_has_the_shape_of_the_first(model, prompts, tmp_path, monkeypatch):
    """Another one would be compiled for."""
    rows = []

    def fake(params, cfg, ids, *, max_tokens, sampling, **options):
        rows.append((len(ids), sampling.seed.tolist()))
        return Generation([[7, n] for n in range(len(ids))], [], [], 0, 0.0, 0.0)

    monkeypatch.setattr(on_policy, "generate", fake)
    out = tmp_path / "out.jsonl"
    assert write(model, prompts, out, on_batch=lambda *so_far: rows.append(so_far)) == 4
    assert rows == [(3, [5, 6, 7]), (3, 6), (3, [8, 8, 8]), (4, 8)]
    assert len(out.read_text().splitlines()) == 4
    rows.clear()
    write(model, prompts, tmp_path / "few.jsonl", batch=64)
    assert rows == [(4, [5, 6, 7, 8])]


def test_training_learns_what_the_trunk_wrote(model, answers, tmp_path):
    """Of each record all tokens but the prompt's are scored, wherever rows cut it."""
    tokenizer = model[2]
    store = build_store([answers], tokenizer, tmp_path, progress=False)
    rows = -(-store.n_tokens // 16)
    data = PackedDataset(store, seq_len=16, batch_size=rows, shuffle=False, answers_only=True)
    batch = data.batch(0)
    assert batch.scored is not None
    scored = batch.tokens[batch.scored == 1].tolist()
    said = []
    for row in map(json.loads, answers.read_text().splitlines()):
        last = row["messages"][-1] if "messages" in row else {}
        thought = last.get("reasoning_content")
        said.append(row.get("completion") or f"{thought}{END_THINK}{last['content']}")
    end = tokenizer.decode([tokenizer.eos_ids[0]])
    assert tokenizer.decode(scored) == "".join(text + end for text in said)


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
    asked = ("train-mtp", "generate-data", MODEL, *files, "--prefix", 5, "--batch", 3)
    code, _, err = dskjax(*asked, "--per-text", 2)
    assert code == 0 and "1 records in" in err
    assert seen["batch"] == 3 and [len(ids) for ids in seen["prompts"]] == [5, 5]
    first, second = seen["prompts"]
    assert first != second
    assert dskjax(*asked, "--per-text", 2, "--limit", 1)[0] == 0
    assert seen["prompts"] == [first]
