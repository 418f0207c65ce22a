"""Questions with one exact answer: read, asked in batches, and counted."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskjax.config import ModelConfig
from dskjax.decode import SamplingParams, generate
from dskjax.documents import iter_records, text_field
from dskjax.evaluation.answers import extract_answer, is_right
from dskjax.evaluation.intervals import wilson
from dskjax.params import Params
from dskjax.tokenizer import THINK, Tokenizer

PLAIN_PROMPT = "Question: {question}\nAnswer:"
"""What a model without a chat template is asked; its text ends before another "Question:"."""

ALL = "all"
"""Name of all tasks together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question.

    Attributes:
        task: what it is counted under.
        text: what is asked.
        answer: the right answer.
        source: file and line.
    """

    task: str
    text: str
    answer: str
    source: str


class Prompt(NamedTuple):
    """A question as a model is asked it.

    Attributes:
        question: what is asked.
        ids: token ids.
        inside_thinking: whether the ids end with an open `<think>`.
    """

    question: Question
    ids: list[int]
    inside_thinking: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A sampled answer.

    Attributes:
        question: what was asked.
        text: all that the model wrote, its eos left out.
        found: the answer in it, None if there is none.
        right: whether that is the expected one.
        tokens: how many tokens were generated, the eos included.
        finished: False if `max_tokens` cut it off.
    """

    question: Question
    text: str
    found: str | None
    right: bool
    tokens: int
    finished: bool


def read_questions(path: Path, *, most: int | None = None) -> list[Question]:
    """Questions of a `.jsonl` or `.jsonl.xz` file of {"task", "question", "answer"}, in order.

    Without "task" the file's name up to the first dot is the task; other fields are not looked at.

    Args:
        path: the file.
        most: so many at most.

    Raises:
        FileNotFoundError, ValueError: naming file, line and what was expected there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = []
    for number, row in itertools.islice(iter_records(path), most):
        where = f"{path}:{number}"
        values = {name: text_field(row, name, where) for name in ("question", "answer")}
        for name, value in values.items():
            if not value.strip():
                raise ValueError(f"{where}: {name} is blank")
        task = text_field(row, "task", where) if "task" in row else path.name.partition(".")[0]
        question, answer = values.values()
        found.append(Question(task=task, text=question, answer=answer, source=where))
    if not found:
        raise ValueError(f"{path}: no questions: the file is empty")
    return found


def make_prompts(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    cfg: ModelConfig,
    max_tokens: int,
    thinking: bool | None = None,
) -> list[Prompt]:
    """Questions through the chat template, or as `PLAIN_PROMPT` if there is none.

    Args:
        questions: what to ask.
        tokenizer: of the model.
        cfg: the model.
        max_tokens: how many tokens an answer may have.
        thinking: the chat template's switch; None turns it on where there is one.

    Raises:
        ValueError: thinking is wanted of a template without such a switch, or a prompt and its
            answer do not fit the model's context; that names the question's file and line.
    """
    if thinking and not tokenizer.supports_thinking:
        raise ValueError(
            f"{tokenizer.source}: no chat template with a thinking switch; leave out --thinking"
        )
    if thinking is None and tokenizer.supports_thinking:
        thinking = True
    elif not tokenizer.supports_thinking:
        thinking = None  # nothing to set
    prompts = [_make_prompt(question, tokenizer, thinking) for question in questions]
    for question, ids, _ in prompts:
        if len(ids) + max_tokens > cfg.max_position_embeddings:
            raise ValueError(
                f"{question.source}: a prompt of {len(ids)} tokens and {max_tokens=} exceed "
                f"{cfg.max_position_embeddings=}; ask for fewer tokens or leave the question out"
            )
    return prompts


def ask(
    params: Params,
    cfg: ModelConfig,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    on_answers: Callable[[int], object] = lambda _: None,
    **options: Any,
) -> list[Answer]:
    """Lets a model answer every question `samples` times.

    Args:
        params: weights.
        cfg: the model.
        prompts: what is asked; at least one.
        tokenizer: of the model.
        max_tokens: most tokens an answer.
        samples: answers a question; more than one only at a temperature above 0.
        temperature: 0 is greedy.
        seed: of the first answer; each has its own.
        batch_size: answers that are generated at once.
        on_answers: told after each batch how many more answers there are.
        **options: further ones of `dskjax.generate`: drafts, accept, impl.

    Returns:
        Answers in the order of the questions, those of one question together.

    Raises:
        ValueError: see `check_sampling`.
    """
    check_sampling(samples=samples, temperature=temperature, batch_size=batch_size)
    # Prompts of like length together: batches whose caches have the same size share a program.
    order = sorted(range(len(prompts) * samples), key=lambda n: len(prompts[n // samples].ids))
    answers: dict[int, Answer] = {}
    for batch in itertools.batched(order, batch_size):
        rows = [*batch, *batch[:1] * (min(batch_size, len(order)) - len(batch))]
        result = generate(
            params,
            cfg,
            [prompts[n // samples].ids for n in rows],
            max_tokens=max_tokens,
            sampling=SamplingParams.make(
                len(rows), temperature=temperature, seed=[(seed + n) % 2**32 for n in rows]
            ),
            **options,
        )
        for row, n in enumerate(batch):
            finished = result.finish_reasons[row] == "stop"
            ids = result.tokens[row]
            answers[n] = _judge(prompts[n // samples], ids, tokenizer, finished=finished)
        on_answers(len(batch))
    return [answers[n] for n in range(len(order))]


def check_sampling(*, samples: int, temperature: float, batch_size: int) -> None:
    """Refuses settings of `ask` that make no sense.

    Raises:
        ValueError: a number below 1, or several greedy samples, which would all be the same.
    """
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if samples > 1 and temperature == 0:
        raise ValueError(f"{samples=} greedy answers would be the same: raise the temperature")


def figures(answers: Sequence[Answer], samples: int) -> dict[str, dict[str, Any]]:
    """Figures by task, and of all tasks together, as JSON values.

    `ci95` is Wilson's interval over questions: several answers to one question count as one trial,
    which is too careful rather than too sure. `any_right` (only with several samples) is the share
    of questions with at least one right answer.
    """
    tasks: dict[str, list[Answer]] = collections.defaultdict(list)
    for answer in answers:
        tasks[answer.question.task].append(answer)
    out = {task: _figures(tasks[task], samples) for task in sorted(tasks)}
    return {**out, ALL: _figures(answers, samples)}


def failure(answer: Answer) -> Mapping[str, Any]:
    """A wrong answer as a record of JSON values."""
    return {
        "task": answer.question.task,
        "question": answer.question.text,
        "expected": answer.question.answer,
        "found": answer.found,
        "text": answer.text,
        "tokens": answer.tokens,
        "finished": answer.finished,
        "source": answer.question.source,
    }


def _make_prompt(question: Question, tokenizer: Tokenizer, thinking: bool | None) -> Prompt:
    if tokenizer.chat_template is None:
        text = PLAIN_PROMPT.format(question=question.text)
        ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None, parse_special=False)
        return Prompt(question, ids, False)
    messages = [{"role": "user", "content": question.text}]
    text = tokenizer.apply_chat_template(messages, thinking=thinking)
    return Prompt(question, tokenizer.encode(text), text.rstrip().endswith(THINK))


def _judge(prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer, *, finished: bool) -> Answer:
    text = tokenizer.decode(ids[:-1] if finished else ids)
    if tokenizer.chat_template is None:
        text = text.partition("\nQuestion:")[0]
    found = extract_answer(text, inside_thinking=prompt.inside_thinking)
    return Answer(
        question=prompt.question,
        text=text,
        found=found,
        right=is_right(found, prompt.question.answer),
        tokens=len(ids),
        finished=finished,
    )


def _figures(answers: Sequence[Answer], samples: int) -> dict[str, Any]:
    count = len(answers)
    right = sum(answer.right for answer in answers)
    out: dict[str, Any] = {
        "accuracy": right / count,
        "ci95": wilson(right / count, count // samples),
        "right": right,
        "questions": count // samples,
        "answers": count,
        "tokens": sum(answer.tokens for answer in answers),
        "tokens_per_answer": sum(answer.tokens for answer in answers) / count,
        "cut_off": sum(not answer.finished for answer in answers) / count,
        "no_answer": sum(answer.found is None for answer in answers) / count,
    }
    if samples > 1:
        groups = itertools.batched(answers, samples)
        out["any_right"] = sum(any(a.right for a in group) for group in groups) / (count // samples)
    return out
