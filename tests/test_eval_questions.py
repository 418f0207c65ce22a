"""Questions and answers: what is asked, what counts as the answer, and how it is counted."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dskjax import evaluation, presets
from dskjax.decode.generate import Generation
from dskjax.evaluation import extract_answer, is_right, questions
from dskjax.evaluation.questions import Question
from dskjax.tokenizer import ASSISTANT, BOS, END_THINK, THINK, USER, Tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-deepseek"
CFG = presets.preset("tiny-v3")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EXAMPLE)


@pytest.fixture
def plain(tmp_path):
    """The same tokenizer without a chat template."""
    folder = tmp_path / "plain"
    folder.mkdir()
    shutil.copy(EXAMPLE / "tokenizer.json", folder)
    return Tokenizer.load(folder)


def question(text="2 + 2 =", answer="4", task="add", line=1):
    return Question(task=task, text=text, answer=answer, source=f"sums.jsonl:{line}")


# ------------------------------------------------------------------ extraction

SAID = [
    ("2 + 2 = 4.</think>4", "4"),
    ("</think> 1a56 \n", "1a56"),
    ("5 so far.</think>I said </think>6", "6"),  # the last tag ends thinking
    ("</think>823/952", "823/952"),
    ("</think>-170.", "-170."),
    ("</think>", None),
    ("</think>which makes 212 + 46 = 258 insects.", "258"),
    ("</think>So it is \\boxed{12}, or 13.", "12"),
    (r"</think>\boxed{3} then \boxed{\frac{1}{2}} then \boxed{4", r"\frac{1}{2}"),
    ("</think>Answer: 7\nThe 9 was wrong.", "7"),
    ("</think>Answer: 1\nFinal answer: 42 apples", "42 apples"),
    ("</think>**Answer:** 5", "5"),
    ("</think>**Final Answer**: `x`", "x"),
    ("</think>The answer is: $-3/4$", "-3/4"),
    ("</think>Answer:\n\n8", "8"),
    ("</think>first line\nno digits here", "no digits here"),
    ("</think>in all (1,234).", "1,234"),
]


@pytest.mark.parametrize(("text", "found"), SAID, ids=[text[8:40] for text, _ in SAID])
def test_the_answer_in_a_text(text, found):
    assert extract_answer(text, inside_thinking=True) == found


def test_thinking_that_never_ends_has_no_answer():
    assert extract_answer("2 + 2 = 4. Answer: 4", inside_thinking=True) is None
    assert extract_answer("2 + 2 = 4. Answer: 4") == "4"
    assert extract_answer("") is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("258", "258"),
        (" 258. ", "258"),
        ("$1,234$", "1234"),
        ("1234.50", "1234.5"),
        ("7.0", "7"),
        ("+3", "3"),
        ("1A56", "1a56"),
        ("**yes**", "Yes"),
        ("'-170'", "-170"),
    ],
)
def test_right_answers(found, expected):
    assert is_right(found, expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "4"),
        ("", "4"),
        ("-4", "4"),
        ("40", "4"),
        ("4/8", "1/2"),  # not in its lowest terms
        ("0.5", "1/2"),
        ("12,34", "1234"),
        ("100", "1"),
        ("4 apples", "4"),
    ],
)
def test_wrong_answers(found, expected):
    assert not is_right(found, expected)


# ------------------------------------------------------------------ prompts


def test_questions_file(tmp_path):
    path = tmp_path / "sums.first.jsonl"
    rows = [{"question": "a", "answer": "1"}, {"task": "t", "question": "b", "answer": "2"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = evaluation.read_questions(path)
    assert [(q.task, q.text, q.answer) for q in found] == [("sums", "a", "1"), ("t", "b", "2")]
    assert found[1].source == f"{path}:2"
    assert evaluation.read_questions(path, most=1) == found[:1]


def prompts(tokenizer, *asked, max_tokens=8, **options):
    return evaluation.make_prompts(asked, tokenizer, cfg=CFG, max_tokens=max_tokens, **options)


def test_questions_go_through_the_chat_template(tokenizer):
    for thinking, tag in ((None, THINK), (True, THINK), (False, END_THINK)):
        (prompt,) = prompts(tokenizer, question(), thinking=thinking)
        assert tokenizer.decode(prompt.ids) == f"{BOS}{USER}2 + 2 ={ASSISTANT}{tag}"
        assert prompt.inside_thinking == (tag == THINK)


def test_without_a_template_there_is_a_plain_prompt(plain):
    (prompt,) = prompts(plain, question(f"2 {THINK} 2 ="))
    text = f"Question: 2 {THINK} 2 =\nAnswer:"
    assert prompt.ids == [plain.bos_id, *plain.encode(text, parse_special=False)]
    assert plain.think_id not in prompt.ids and not prompt.inside_thinking
    with pytest.raises(ValueError, match="no chat template with a thinking switch"):
        prompts(plain, question(), thinking=True)


def test_a_template_that_always_thinks_is_seen(tmp_path):
    shutil.copy(EXAMPLE / "tokenizer.json", tmp_path)
    template = "{{ messages[0].content }}<｜Assistant｜><think>\n"
    (tmp_path / "chat_template.jinja").write_text(template)
    (prompt,) = prompts(Tokenizer.load(tmp_path), question())
    assert prompt.inside_thinking


def test_a_prompt_that_does_not_fit_is_named(tokenizer):
    long = question("1 + " * CFG.max_position_embeddings, line=7)
    with pytest.raises(ValueError, match=r"sums.jsonl:7: a prompt of \d+ tokens and max_tokens=8"):
        prompts(tokenizer, question(), long)


# ------------------------------------------------------------------ asking


class Oracle:
    """Stands in for `generate`: says what was agreed for a prompt, and remembers how it was asked.

    Attributes:
        texts: what to say to the prompt that holds each key.
        calls: (prompts, options) of each call.
    """

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.calls = tokenizer, texts, []

    def __call__(self, params, cfg, prompts, *, max_tokens, **options):
        self.calls.append((prompts, options))
        tokens, reasons = [], []
        for ids in prompts:
            asked = self.tokenizer.decode(ids)
            said = next(said for key, said in self.texts.items() if key in asked)
            new = [*self.tokenizer.encode(said), self.tokenizer.eos_ids[0]]
            tokens.append(new[:max_tokens])
            reasons.append("stop" if len(new) <= max_tokens else "length")
        return Generation(
            tokens=tokens,
            finish_reasons=reasons,
            per_prompt=[],
            ties=0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
        )


def asked(tokenizer, monkeypatch, texts, questions_, *, max_tokens=8, **options):
    oracle = Oracle(tokenizer, texts)
    monkeypatch.setattr(questions, "generate", oracle)
    made = prompts(tokenizer, *questions_, max_tokens=max_tokens)
    answers = evaluation.ask({}, CFG, made, tokenizer, max_tokens=max_tokens, **options)
    return answers, oracle.calls


QUESTIONS = [
    question("a much longer question than the others, asked first: 3 + 3 =", "6", "long"),
    question("2 + 2 =", "4", line=2),
    question("5 + 5 =", "10", line=3),
]
TEXTS = {"3 + 3": "6.</think>6", "2 + 2": "</think>5", "5 + 5": ". . . . . . . . . . ."}


def test_answers_come_in_the_order_of_the_questions(tokenizer, monkeypatch):
    steps = []
    answers, calls = asked(
        tokenizer, monkeypatch, TEXTS, QUESTIONS, batch_size=2, on_answers=steps.append, drafts=2
    )
    assert [answer.question for answer in answers] == QUESTIONS
    assert [answer.found for answer in answers] == ["6", "5", None]
    assert [answer.right for answer in answers] == [True, False, False]
    assert [answer.finished for answer in answers] == [True, True, False]
    assert answers[0].text == "6.</think>6" and answers[2].tokens == 8
    assert steps == [2, 1]
    # Short ones first, and the last batch is filled up to the same shape.
    assert [len(ids) for ids, _ in calls] == [2, 2]
    assert calls[1][0][0] == calls[1][0][1] and len(calls[1][0][0]) > len(calls[0][0][0])
    assert all(options["drafts"] == 2 for _, options in calls)


def test_every_answer_has_a_seed_of_its_own(tokenizer, monkeypatch):
    answers, calls = asked(
        tokenizer, monkeypatch, TEXTS, QUESTIONS, samples=3, temperature=0.7, seed=5, batch_size=9
    )
    ((ids, options),) = calls
    assert sorted(options["sampling"].seed.tolist()) == list(range(5, 14))
    assert options["sampling"].temperature.tolist() == pytest.approx([0.7] * 9)
    by_seed = dict(zip(options["sampling"].seed.tolist(), ids, strict=True))
    assert by_seed[5] == by_seed[6] == by_seed[7] != by_seed[8]
    assert [answer.question.text for answer in answers] == [
        q.text for q in QUESTIONS for _ in range(3)
    ]


def test_plain_answers_end_before_the_next_question(plain, monkeypatch):
    said = {"2 + 2": " 4\n\nQuestion: 7 + 7 =\nAnswer: 14"}
    (answer,), _ = asked(plain, monkeypatch, said, [question()], max_tokens=64)
    assert answer.right and answer.text == " 4\n"


def test_figures(tokenizer, monkeypatch):
    answers, _ = asked(tokenizer, monkeypatch, TEXTS, QUESTIONS)
    figures = questions.figures(answers, 1)
    assert list(figures) == ["add", "long", "all"]
    assert figures["long"]["accuracy"] == 1.0 and figures["add"]["accuracy"] == 0.0
    total = figures["all"]
    assert total["accuracy"] == pytest.approx(1 / 3) and total["right"] == 1
    assert total["ci95"] == evaluation.wilson(1 / 3, 3)
    assert total["cut_off"] == total["no_answer"] == pytest.approx(1 / 3)
    assert total["tokens"] == sum(answer.tokens for answer in answers)
    assert total["tokens_per_answer"] == pytest.approx(total["tokens"] / 3)
    assert "any_right" not in total
    record = questions.failure(answers[1])
    assert record == {
        "task": "add",
        "question": "2 + 2 =",
        "expected": "4",
        "found": "5",
        "text": "</think>5",
        "tokens": 3,
        "finished": True,
        "source": "sums.jsonl:2",
    }


def test_several_answers_to_a_question_are_one_trial(tokenizer, monkeypatch):
    answers, _ = asked(
        tokenizer, monkeypatch, TEXTS, QUESTIONS, samples=4, temperature=1.0, batch_size=12
    )
    answers[0] = dataclasses.replace(answers[0], right=False)
    total = questions.figures(answers, 4)["all"]
    assert total["answers"] == 12 and total["questions"] == 3
    assert total["accuracy"] == pytest.approx(3 / 12)
    assert total["ci95"] == evaluation.wilson(3 / 12, 3)
    assert total["any_right"] == pytest.approx(1 / 3)
