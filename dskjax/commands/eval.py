"""`dskjax eval`: bits per byte by kind of text, and right answers by task, as one report."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.progress
from rich.console import Console

from dskjax.commands.info import parameter_counts
from dskjax.config import ModelConfig
from dskjax.documents import Document, list_files
from dskjax.evaluation import (
    documents_by_kind,
    make_prompts,
    questions,
    read_questions,
    score_text,
)
from dskjax.evaluation.questions import Answer, Prompt, check_sampling
from dskjax.evaluation.text import Scored, joined
from dskjax.params import Params, is_weight
from dskjax.provenance import describe_devices, source_commit, versions
from dskjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is measured.

    Attributes:
        text: held-out files or folders, "KIND=PATH" or plain; may be empty.
        index: see `dskjax.evaluation.documents_by_kind`.
        context, stride: of the sliding windows over documents, in tokens.
        reasoning: file of questions, or None.
        questions: most questions of it; None is all.
        samples: answers a question.
        max_tokens: most tokens an answer.
        temperature: 0 is greedy.
        seed: of the sampling.
        thinking: the chat template's switch; None turns it on where there is one.
        drafts: tokens drafted a step.
        batch_size: rows of text, or answers, at once.
        impl: implementation of every op.
    """

    text: Sequence[str] = ()
    index: Path | None = None
    context: int = 1024
    stride: int = 512
    reasoning: Path | None = None
    questions: int | None = None
    samples: int = 1
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    thinking: bool | None = None
    drafts: int = 0
    batch_size: int = 16
    impl: str = "auto"

    def __post_init__(self):
        if not self.text and self.reasoning is None:
            raise ValueError("nothing to measure: give --text, --reasoning or both")
        if self.questions is not None and self.questions < 1:
            raise ValueError(f"questions={self.questions} must be at least 1")
        check_sampling(
            samples=self.samples, temperature=self.temperature, batch_size=self.batch_size
        )

    @property
    def rule(self) -> str:
        """Acceptance rule of the drafts; lossless."""
        return "strict" if self.temperature == 0 else "rejection"

    def settings(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the figures depend on, as JSON values."""
        out: dict[str, Any] = {"batch_size": self.batch_size, "impl": self.impl}
        if self.text:
            out["text"] = {"context": self.context, "stride": self.stride}
        if self.reasoning is not None:
            thinks = tokenizer.supports_thinking if self.thinking is None else self.thinking
            names = ("questions", "samples", "max_tokens", "temperature", "seed", "drafts")
            out["reasoning"] = {
                **{name: getattr(self, name) for name in names},
                "rule": self.rule,
                "thinking": thinks,
                "chat_template": tokenizer.chat_template is not None,
            }
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalInput:
    """What the options name, read and checked: so that nothing is loaded or run in vain.

    Attributes:
        documents: by kind.
        prompts: of the questions.
        files: name, SHA-256 and size of every file, as JSON values.
    """

    documents: Mapping[str, Sequence[Document]]
    prompts: Sequence[Prompt]
    files: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, options: EvalOptions, cfg: ModelConfig, tokenizer: Tokenizer) -> "EvalInput":
        """Reads all files.

        Raises:
            ValueError, FileNotFoundError: naming file, place, found and expected.
        """
        documents = documents_by_kind(options.text, index=options.index, tokenizer=tokenizer)
        prompts: list[Prompt] = []
        if options.reasoning is not None:
            prompts = make_prompts(
                read_questions(options.reasoning, most=options.questions),
                tokenizer,
                cfg=cfg,
                max_tokens=options.max_tokens,
                thinking=options.thinking,
            )
        for name in (*documents, *(prompt.question.task for prompt in prompts)):
            if name == questions.ALL:
                raise ValueError(f"the name {name!r} is kept for all kinds and tasks together")
        files = [_file(path) for path in _files(options)]
        return cls(documents=documents, prompts=prompts, files=files)


def evaluate(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    given: EvalInput,
    options: EvalOptions,
    *,
    name: str,
    folder: Path,
    console: Console,
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Measures what the options ask for.

    Args:
        params: weights; their dtype is the compute dtype.
        cfg: the model.
        tokenizer: of the model.
        given: what the options name.
        options: what to measure.
        name: of the model, for the record.
        folder: of the checkpoint, likewise.
        console: where progress is shown, if it is a terminal.

    Returns:
        The report as JSON values, and a record of every wrong answer.

    Raises:
        ValueError: see `dskjax.evaluation.score_text`.
    """
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_devices(),
        "versions": versions(),
        "commit": source_commit(),
        "model": {"name": name, **_model(params, cfg, tokenizer, folder)},
        "settings": options.settings(tokenizer),
        "data": list(given.files),
    }
    failures: list[Mapping[str, Any]] = []
    if given.documents:
        report["text"] = _score(params, cfg, tokenizer, given, options, console)
    if given.prompts:
        answers = _ask(params, cfg, tokenizer, given, options, console)
        report["reasoning"] = questions.figures(answers, options.samples)
        failures = [questions.failure(answer) for answer in answers if not answer.right]
    return report, failures


def _score(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    given: EvalInput,
    options: EvalOptions,
    console: Console,
) -> dict[str, Any]:
    scored: dict[str, Scored] = {}
    total = sum(len(d.text.encode()) for found in given.documents.values() for d in found)
    with _bar(console, "scoring text", total) as advance:
        for kind, documents in given.documents.items():
            scored[kind] = score_text(
                params,
                cfg,
                documents,
                tokenizer,
                context=options.context,
                stride=options.stride,
                batch_size=options.batch_size,
                impl=options.impl,
                on_bytes=advance,
            )
    if len(scored) > 1:
        scored[questions.ALL] = joined(list(scored.values()))
    return {kind: one.figures() for kind, one in scored.items()}


def _ask(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    given: EvalInput,
    options: EvalOptions,
    console: Console,
) -> list[Answer]:
    with _bar(console, "answering", len(given.prompts) * options.samples) as advance:
        return questions.ask(
            params,
            cfg,
            given.prompts,
            tokenizer,
            max_tokens=options.max_tokens,
            samples=options.samples,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
            on_answers=advance,
            drafts=options.drafts,
            accept=options.rule,
            impl=options.impl,
        )


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Any]:
    """A progress bar; yields what moves it on."""
    with rich.progress.Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def _model(params: Params, cfg: ModelConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    weights = jax.tree.leaves(params, is_leaf=is_weight)
    forms = {weight.format if is_weight(weight) else str(weight.dtype) for weight in weights}
    return {
        "config_sha256": _file(folder / "config.json")["sha256"],
        "tokenizer": tokenizer.fingerprint,
        "parameters": parameter_counts(cfg).total,
        "dtype": str(params["embed_tokens"]["weight"].dtype),
        "weights": sorted(forms),
    }


def _files(options: EvalOptions) -> list[Path]:
    paths = [text.rpartition("=")[2] for text in options.text]
    files = list_files(paths) if paths else []
    rest = (path for path in (options.index, options.reasoning) if path is not None)
    return list(dict.fromkeys([*files, *rest]))


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
