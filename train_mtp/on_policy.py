"""Text that the trunk writes itself, for heads to learn from (on-policy data).

Heads draft for what the trunk says, which is not quite what people wrote. Prompts are read from
text or conversations, the trunk goes on at the temperature it will be served with, and every line
of the output is a record that `dskjax.documents` reads back, with its prompt kept apart:

    {"prompt": .., "completion": ..}       of plain text
    {"messages": [.., {"role": "assistant", "content": .., "reasoning_content": ..}]}

Lines appear in the order of the prompts, a batch at a time, and a line says all about itself, so a
killed run goes on where its file ends.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskjax.config import ModelConfig
from dskjax.decode import SamplingParams, generate
from dskjax.documents import form, iter_documents, iter_records, list_files, text_field
from dskjax.params import Params
from dskjax.tokenizer import END_THINK, Tokenizer

_CHARS_PER_TOKEN = 16  # of ordinary text no so many are needed
_CUT = "\ufffd"  # what is decoded of a part of a character


class Prompt(NamedTuple):
    """What the trunk is to go on from.

    Attributes:
        ids: token ids, bos in front.
        messages: the conversation that they render; None for plain text.
        thinking: whether the rendered prompt ends inside a thinking section.
        source: file and line or byte.
    """

    ids: list[int]
    messages: list[dict[str, Any]] | None
    thinking: bool
    source: str


def read_prompts(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    prefix: int,
    per_text: int = 1,
    thinking: bool | None = None,
) -> Iterator[Prompt]:
    """Prompts of files and folders, in order.

    Args:
        paths: `.jsonl` or `.parquet` with {"question"} or {"messages"} (a last answer in them is
            left out), or {"text"}; or text files.
        tokenizer: of the trunk.
        prefix: tokens of a plain text that are its prompt, bos included; shorter texts are skipped.
            A prompt is shorter by the tokens of a character that it would cut in two.
        per_text: prompts of a plain text: its beginning, and beginnings of lines spread over it.
        thinking: the chat template's switch; None turns it on where there is one.

    Raises:
        FileNotFoundError, ValueError: naming file, line and what was expected there.
    """
    if thinking is None and tokenizer.supports_thinking:
        thinking = True
    for path in list_files(paths):
        if form(path) == "text":
            for document in iter_documents([path], tokenizer=tokenizer):
                yield from _of_text(document.text, document.source, tokenizer, prefix, per_text)
            continue
        for number, row in iter_records(path):
            where = f"{path}:{number}"
            if "text" in row:
                text = text_field(row, "text", where)
                yield from _of_text(text, where, tokenizer, prefix, per_text)
            else:
                yield _of_messages(_messages(row, where), where, tokenizer, thinking)


def _of_text(
    text: str, where: str, tokenizer: Tokenizer, prefix: int, per_text: int
) -> Iterator[Prompt]:
    for start in _starts(text, per_text):
        # The whole of a long text is not worth encoding for its first tokens.
        part = text[start : start + prefix * _CHARS_PER_TOKEN]
        ids = tokenizer.encode(part, bos=True, parse_special=False)
        if len(ids) <= prefix:
            ids = tokenizer.encode(text[start:], bos=True, parse_special=False)
        if len(ids) <= prefix:
            continue
        ids = ids[:prefix]
        while tokenizer.decode(ids).endswith(_CUT):
            ids.pop()
        yield Prompt(ids, None, False, where)


def _starts(text: str, count: int) -> list[int]:
    """Where prompts of a text begin: at its beginning, and at lines about equally far apart."""
    lines = (text.find("\n", len(text) * n // count) + 1 for n in range(1, count))
    return [0, *dict.fromkeys(line for line in lines if line)]


def _messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" not in row:
        return [{"role": "user", "content": text_field(row, "question", where)}]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: messages must be a list of objects")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{where}: no message to answer")
    return messages


def _of_messages(
    messages: list[dict[str, Any]], where: str, tokenizer: Tokenizer, thinking: bool | None
) -> Prompt:
    try:
        text = tokenizer.apply_chat_template(messages, thinking=thinking)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    ids = tokenizer.encode(text, bos=False)
    return Prompt(ids, messages, tokenizer.is_thinking(ids), where)


def write_answers(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Iterator[Prompt],
    out: Path,
    *,
    batch: int,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
    drafts: int = 0,
    impl: str = "auto",
    on_batch: Callable[[int, int], Any] = lambda lines, tokens: None,
) -> int:
    """Lets the trunk answer and appends a line for each prompt.

    Args:
        params: weights.
        cfg: the model.
        tokenizer: its.
        prompts: in the order of the lines; as many as `out` has lines already are skipped.
        out: `.jsonl` to write or to go on with.
        batch: prompts at a time; fewer after a whole batch are filled up, as another shape would
            have to be compiled for them.
        max_tokens: most tokens of an answer.
        temperature: as it will be served; prompt n draws with seed + n.
        top_p: likewise.
        seed: of the sampling.
        drafts: tokens drafted a step by modules that the trunk has; the text stays the trunk's.
        impl: implementation of every op.
        on_batch: told lines and tokens so far.

    Returns:
        Lines that the file has now.

    Raises:
        ValueError: a prompt leaves no room for its answer, or `out` holds something else.
    """
    done = _whole_lines(out)
    prompts = itertools.islice(prompts, done, None)
    tokens = size = 0
    with out.open("a", encoding="utf-8") as file:
        for part in itertools.batched(prompts, batch):
            for prompt in part:
                if len(prompt.ids) + max_tokens > cfg.max_position_embeddings:
                    raise ValueError(
                        f"{prompt.source}: a prompt of {len(prompt.ids)} tokens and {max_tokens=} "
                        f"exceed {cfg.max_position_embeddings=}; ask for fewer tokens"
                    )
            size = max(size, len(part))
            rows = list(itertools.islice(itertools.cycle(range(len(part))), size))
            seeds = [(seed + done + n) % 2**32 for n in rows]
            result = generate(
                params,
                cfg,
                [part[n].ids for n in rows],
                max_tokens=max_tokens,
                sampling=SamplingParams.make(
                    size, temperature=temperature, top_p=top_p, seed=seeds
                ),
                accept="rejection" if temperature else "strict",
                drafts=drafts,
                impl=impl,
            )
            answers = result.tokens[: len(part)]
            for prompt, ids in zip(part, answers, strict=True):
                file.write(json.dumps(_record(prompt, ids, tokenizer)) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done += len(part)
            tokens += sum(map(len, answers))
            on_batch(done, tokens)
    return done


def _record(prompt: Prompt, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode(ids, skip_special=prompt.messages is None)
    if prompt.messages is None:
        begun = tokenizer.decode(prompt.ids, skip_special=True)
        return {"prompt": begun, "completion": text}
    for end in (tokenizer.decode([i]) for i in tokenizer.eos_ids):
        text = text.removesuffix(end)
    answer = {"role": "assistant", "content": text}
    if prompt.thinking:
        thought, _, rest = text.partition(END_THINK)
        answer |= {"content": rest, "reasoning_content": thought}
    return {"messages": [*prompt.messages, answer]}


def _whole_lines(path: Path) -> int:
    """Lines of a file; a last one that a killed run left unfinished is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a record of an earlier run: {error}") from error
        if not isinstance(row, dict) or not ({"messages", "completion"} & set(row)):
            raise ValueError(
                f"{path}:{number}: not a record of an earlier run; choose another file"
            )
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")
