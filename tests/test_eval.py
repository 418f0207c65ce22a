"""Bits per byte: what is predicted, what is counted, and the command around it."""

import functools
import json
import lzma
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax import evaluation, model
from dskjax.checkpoint import load_hf
from dskjax.documents import Document
from dskjax.evaluation import logprobs, text, token_logprobs
from dskjax.evaluation.windows import batches, pack, windows
from dskjax.quantise import quantise
from dskjax.tokenizer import BOS, EOS, THINK, Tokenizer
from tests.train_mtp import toy

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-deepseek"
CFG = toy.model(vocab_size=6144)
TEXTS = [
    "def f(x):\n    return x + 1\n" * 4,
    "ça",
    f"special tokens spelled out: {BOS} {THINK} {EOS}",
    "It was the best of times, it was the worst of times.\n" * 2,
]
DOCUMENTS = [Document(text, f"test {n}") for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EXAMPLE)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: model.init(CFG, key, std=0.3))(jax.random.key(0))


# ------------------------------------------------------------------ windows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(2, 12), st.integers(1, 11))
def test_every_token_but_the_first_is_predicted_once_with_enough_before_it(lengths, context, step):
    stride = min(step, context - 1)
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    pieces = list(windows(documents, context=context, stride=stride))
    assert max(len(piece.ids) for piece in pieces) <= context
    predicted = []
    for piece in pieces:
        assert np.array_equal(piece.ids, piece.ids[0] + np.arange(len(piece.ids)))  # no gaps
        assert set(piece.ids // 100) == {piece.document}
        first = len(piece.ids) - piece.fresh
        begins = piece.ids[0] % 100 == 0
        assert first >= (1 if begins else context - stride)
        predicted += piece.ids[first:].tolist()
    assert predicted == [int(t) for ids in documents for t in ids[1:]]


def test_a_stride_of_all_but_one_token_shares_one_token():
    pieces = list(windows([np.arange(10)], context=4, stride=3))
    assert [piece.ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [piece.fresh for piece in pieces] == [3, 3, 3]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(2, 9), st.integers(1, 3))
def test_rows_hold_all_windows_and_nothing_else(lengths, context, batch_size):
    documents = [np.arange(n) + 100 * i + 1 for i, n in enumerate(lengths)]
    pieces = list(windows(documents, context=context, stride=max(context // 2, 1)))
    placed = list(pack(pieces, context))
    assert [piece for row in placed for piece in row] == pieces
    found = []
    for rows in batches(pieces, context=context, batch_size=batch_size):
        assert all(part.shape == (batch_size, context) for part in rows)
        padding = rows.segment_ids == 0
        assert not rows.tokens[padding].any() and (rows.documents[padding] == -1).all()
        for row in range(batch_size):
            for segment in range(1, rows.segment_ids[row].max() + 1):
                cells = rows.segment_ids[row] == segment
                assert rows.positions[row][cells].tolist() == list(range(cells.sum()))
                owner = rows.documents[row][cells]
                found.append((rows.tokens[row][cells].tolist(), owner.tolist()))
    expected = [
        (p.ids.tolist(), [-1] * (len(p.ids) - p.fresh) + [p.document] * p.fresh) for p in pieces
    ]
    assert found == expected


@pytest.mark.parametrize(("context", "stride", "what"), [(1, 1, "context=1"), (8, 8, "stride=8")])
def test_impossible_windows_are_refused(context, stride, what):
    with pytest.raises(ValueError, match=what):
        list(windows([np.arange(3)], context=context, stride=stride))


# ------------------------------------------------------------------ log-probabilities


whole = jax.jit(functools.partial(model.apply, cfg=CFG))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("at_once", [1, 4 * 2 * 6144 * 3, 1 << 28])
def test_logprobs_are_those_of_the_next_token(params, monkeypatch, at_once):
    """Whatever number of columns has its logits at one time."""
    monkeypatch.setattr(logprobs, "_LOGIT_BYTES", at_once)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 6144, (2, 8)), jnp.int32)
    heat = jnp.asarray([0.5, 2.0])
    got = token_logprobs(params, ids, cfg=CFG, temperature=heat)
    logp = log_softmax(whole(params, ids) / heat[:, None, None])
    want = np.take_along_axis(logp[:, :-1], np.asarray(ids)[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_packed_windows_score_like_windows_alone(params, tokenizer):
    """An independent sum: every window by itself through the whole model."""
    context, stride = 16, 6
    scored = evaluation.score_text(
        params, CFG, DOCUMENTS, tokenizer, context=context, stride=stride, batch_size=3
    )
    for n, document in enumerate(TEXTS):
        ids = [0, *tokenizer.encode(document, parse_special=False)]
        nats, done = 0.0, 1
        while done < len(ids):
            start = 0 if done == 1 else done - (context - stride)
            window = ids[start : start + context]
            padded = jnp.asarray([window + [0] * (context - len(window))])
            logp = log_softmax(whole(params, padded)[0])
            for at in range(done - start, len(window)):
                nats -= logp[at - 1, window[at]]
            done = start + len(window)
        assert scored.nats[n] == pytest.approx(nats, rel=1e-5)
        assert scored.tokens[n] == len(ids) - 1
        assert scored.bytes[n] == len(document.encode())


def test_quantised_weights_are_scored_as_they_are(params, tokenizer):
    plain, rounded = (
        evaluation.score_text(
            values, CFG, DOCUMENTS, tokenizer, context=16, stride=6, batch_size=3
        ).nats
        for values in (params, quantise(params, "fp8"))
    )
    assert (plain != rounded).all()
    assert rounded == pytest.approx(plain, rel=0.1)


def one_bit(params, tokens, segment_ids, positions, **_):
    """A model that spends one bit a token, and infinitely many where none should be read."""
    inside = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return np.where(inside, -math.log(2), -np.inf)


def test_bits_per_byte_are_tokens_over_bytes_at_one_bit_a_token(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_logprobs", one_bit)
    steps = []
    scored = evaluation.score_text(
        {}, CFG, DOCUMENTS, tokenizer, context=8, stride=5, batch_size=2, on_bytes=steps.append
    )
    tokens = [len(ids) for ids in tokenizer.encode_batch(TEXTS, parse_special=False)]
    sizes = [len(document.encode()) for document in TEXTS]
    assert scored.tokens.tolist() == tokens and scored.bytes.tolist() == sizes
    assert scored.bits_per_byte == pytest.approx(sum(tokens) / sum(sizes))
    assert scored.nats == pytest.approx(np.array(tokens) * math.log(2))
    assert sum(steps) == sum(sizes)
    low, high = scored.interval
    rates = [t / n for t, n in zip(tokens, sizes, strict=True)]
    assert min(rates) <= low < scored.bits_per_byte < high <= max(rates)
    both = text.joined([scored, scored])
    assert both.bits_per_byte == pytest.approx(scored.bits_per_byte) and len(both.nats) == 8
    figures = scored.figures()
    assert figures["nats_per_token"] == pytest.approx(math.log(2))
    assert (figures["documents"], figures["bytes"]) == (4, sum(sizes))


def test_special_tokens_of_a_conversation_are_bits_but_not_bytes(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_logprobs", one_bit)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "four"}])
    document = Document(rendered, "chat", rendered=True)
    scored = evaluation.score_text({}, CFG, [document], tokenizer, context=8, stride=5)
    ids = tokenizer.encode(rendered)
    assert scored.bytes.tolist() == [4] and scored.tokens.tolist() == [len(ids) - 1]


def test_a_tokenizer_of_another_model_is_refused(params, tokenizer):
    small = toy.model(vocab_size=300)
    with pytest.raises(ValueError, match=r"test 0: token id \d+ is outside 0..299 .*another model"):
        evaluation.score_text(params, small, DOCUMENTS, tokenizer, context=8, stride=4)
    with pytest.raises(ValueError, match="context=128 is more than .*max_position_embeddings=64"):
        evaluation.score_text(params, CFG, DOCUMENTS, tokenizer, context=128, stride=4)
    with pytest.raises(ValueError, match="no documents"):
        evaluation.score_text(params, CFG, [], tokenizer)


# ------------------------------------------------------------------ intervals


def test_bootstrap_is_the_interval_of_a_ratio_of_sums():
    rng = np.random.default_rng(1)
    wholes = rng.integers(50, 150, 400)
    parts = wholes * 0.8 + rng.normal(0, 5, 400)
    low, high = evaluation.bootstrap(parts, wholes)
    error = 1.96 * np.std(parts - 0.8 * wholes) / (wholes.mean() * 20)
    assert low < parts.sum() / wholes.sum() < high
    assert high - low == pytest.approx(2 * error, rel=0.15)
    assert evaluation.bootstrap(np.array([3.0]), np.array([4])) == [0.75, 0.75]


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),  # Newcombe 1998, table I, method 3
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(share, count, low, high):
    assert evaluation.wilson(share, count) == pytest.approx([low, high], abs=6e-5)
    mirrored = evaluation.wilson(1 - share, count)
    assert mirrored == pytest.approx([1 - high, 1 - low], abs=6e-5)


def test_wilson_interval_of_all_and_of_none_ends_exactly_there():
    assert evaluation.wilson(0.0, 50)[0] == 0.0 and evaluation.wilson(1.0, 50)[1] == 1.0


# ------------------------------------------------------------------ kinds


def write_lines(path: Path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kinds_come_from_labels_records_or_names(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "mixed.jsonl", {"text": "a", "kind": "code"}, {"text": "b"})
    prose = tmp_path / "prose.txt.xz"
    prose.write_bytes(lzma.compress(b"one\n\x1e\ntwo\n\x1e\n"))
    group = lambda *paths: {  # noqa: E731
        kind: [d.text for d in found]
        for kind, found in evaluation.documents_by_kind(paths, tokenizer=tokenizer).items()
    }
    assert group(lines, prose) == {"code": ["a"], "mixed": ["b"], "prose": ["one\n", "two\n"]}
    assert group(f"code={lines}", f"code={prose}") == {"code": ["a", "b", "one\n", "two\n"]}
    write_lines(lines, {"text": "a", "kind": 3})
    with pytest.raises(ValueError, match=r"mixed.jsonl:1: kind must be text, found int"):
        group(lines)


# ------------------------------------------------------------------ the command


@pytest.fixture
def files(tmp_path):
    (tmp_path / "code.txt").write_text("import os\n\x1e\ndef main():\n    pass\n\x1e\n")
    write_lines(tmp_path / "notes.jsonl", {"text": "He went home.", "kind": "prose"})
    write_lines(
        tmp_path / "sums.jsonl",
        {"task": "add", "question": "2 + 2 =", "thinking": "", "answer": "4"},
        {"task": "add", "question": "1 + 1 =", "answer": "2"},
        {"task": "name", "question": "Who?", "answer": "nobody at all"},
    )
    return tmp_path


def test_the_report(dskjax, files, tokenizer):
    code, out, err = dskjax(
        *("eval", EXAMPLE, "--text", files / "code.txt", "--text", f"{files / 'notes.jsonl'}"),
        *("--context", 32, "--stride", 16, "--batch", 2, "--dtype", "float32"),
        *("--reasoning", files / "sums.jsonl", "--max-tokens", 12),
        *("--json", files / "out" / "eval.json", "--plot", files / "eval.png"),
        *("--failures", files / "wrong.jsonl"),
    )
    assert code == 0, err
    report = json.loads((files / "out" / "eval.json").read_text())
    assert list(report["text"]) == ["code", "prose", "all"]
    assert list(report["reasoning"]) == ["add", "name", "all"]
    assert report["model"]["name"] == "tiny-deepseek" and report["model"]["dtype"] == "float32"
    assert report["model"]["weights"] == ["float32"]
    assert report["settings"]["text"] == {"context": 32, "stride": 16}
    assert report["settings"]["reasoning"]["thinking"] is True
    assert report["settings"]["reasoning"]["rule"] == "strict"
    assert [file["file"] for file in report["data"]] == ["code.txt", "notes.jsonl", "sums.jsonl"]
    assert report["data"][0]["bytes"] == (files / "code.txt").stat().st_size
    assert {"jax", "python"} <= report["versions"].keys() and report["device"]

    weights, cfg = load_hf(EXAMPLE, dtype="float32")
    lines = ("import os\n", "def main():\n    pass\n", "He went home.")
    rows = [tokenizer.encode(line, bos=True) for line in lines]
    padded = jnp.asarray([ids + [0] * (16 - len(ids)) for ids in rows])
    logp = log_softmax(jax.jit(lambda ids: model.apply(weights, ids, cfg=cfg))(padded))
    bits = [
        -sum(logp[n, i, token] for i, token in enumerate(ids[1:])) / math.log(2)
        for n, ids in enumerate(rows)
    ]
    found = {kind: row["bits_per_byte"] for kind, row in report["text"].items()}
    want = {"code": sum(bits[:2]) / 31, "prose": bits[2] / 13, "all": sum(bits) / 44}
    assert found == pytest.approx(want, rel=1e-4)

    wrong = [json.loads(line) for line in (files / "wrong.jsonl").read_text().splitlines()]
    total = report["reasoning"]["all"]
    assert total["questions"] == 3 == total["right"] + len(wrong)
    assert total["tokens"] <= 36 and 0 <= total["cut_off"] <= 1
    assert wrong[-1]["task"] == "name" and wrong[-1]["source"].endswith("sums.jsonl:3")
    assert f"{found['all']:.3f}" in out and "right answers, T = 0" in out
    assert (files / "eval.png").stat().st_size > 1000


BAD = [
    ([], "nothing to measure"),
    (["--text", "missing.txt"], "missing.txt: no such file"),
    (["--text", "all=code.txt"], "the name 'all' is kept for all kinds and tasks together"),
    (["--text", "empty.txt"], "no text: all documents are blank in .*empty.txt"),
    (["--text", "latin1.txt"], r"latin1.txt: not UTF-8 at byte 1 .*convert the file"),
    (["--text", "code.txt", "--context", "4096"], "context=4096 is more than .*=2048"),
    (["--text", "code.txt", "--stride", "1024"], "stride=1024 must be 1..1023, below context=1024"),
    (["--text", "code.txt", "--failures", "f.jsonl"], "--failures needs --reasoning"),
    (["--reasoning", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--reasoning", "blank.jsonl"], "blank.jsonl: no questions: the file is empty"),
    (["--reasoning", "partly.jsonl"], r"partly.jsonl:2: expected a field named answer; .*question"),
    (["--reasoning", "number.jsonl"], r"number.jsonl:1: answer must be text, found int"),
    (["--reasoning", "nothing.jsonl"], r"nothing.jsonl:1: question is blank"),
    (["--reasoning", "text.jsonl"], r"text.jsonl:1: expected a JSON object a line"),
    (
        ["--reasoning", "sums.jsonl", "--max-tokens", "2045"],
        r"sums.jsonl:1: a prompt of \d+ tokens and max_tokens=2045 exceed .*=2048; ask for fewer",
    ),
    (["--reasoning", "sums.jsonl", "--samples", "2"], "samples=2 greedy answers would be the same"),
    (["--reasoning", "sums.jsonl", "--questions", "0"], "questions=0 must be at least 1"),
    (["--reasoning", "sums.jsonl", "--batch", "0"], "batch_size=0 must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_ends_with_one_line(dskjax, files, monkeypatch, arguments, message):
    (files / "empty.txt").write_text("\x1e\n \n\x1e\n")
    (files / "latin1.txt").write_bytes("dÉjà".encode("latin1"))
    (files / "blank.jsonl").write_text("\n\n")
    good = {"question": "2 + 2 =", "answer": "4"}
    write_lines(files / "partly.jsonl", good, {"question": "1 + 1 ="})
    write_lines(files / "number.jsonl", {**good, "answer": 4})
    write_lines(files / "nothing.jsonl", {**good, "question": " "})
    (files / "text.jsonl").write_text("2 + 2 = 4\n")
    monkeypatch.chdir(files)
    code, out, err = dskjax("eval", EXAMPLE, *arguments)
    assert code == 2 and not out
    (line,) = err.splitlines()
    assert re.search(message, line), line
