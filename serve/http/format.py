"""The two shapes of an answer: completion and chat completion, whole and in chunks."""

import abc
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from serve.api import Output, OutputLogprob, TextLogprob, Usage
from serve.http.plan import Job

_LEAST = -9999.0
"""What OpenAI's interface writes for a probability of zero: JSON has no infinity."""


@dataclasses.dataclass(slots=True)
class Answer:
    """What has come of one choice."""

    text: list[str] = dataclasses.field(default_factory=list)
    reasoning: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[OutputLogprob] = dataclasses.field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    offset: int = 0
    begun: bool = False

    def add(self, output: Output) -> None:
        """Takes a piece in."""
        self.text.append(output.text)
        self.reasoning.append(output.reasoning)
        self.logprobs.extend(output.logprobs or ())
        self.end(output)

    def end(self, output: Output) -> None:
        """Notes how it ended, if it did."""
        if output.finish is not None:
            self.finish = output.finish.value
            self.stop_reason = output.stop_reason
            self.usage = output.usage


class Shape(abc.ABC):
    """Builds the objects of one answer; the choices' part is the subclass's.

    Attributes:
        answers: by choice; prompt p's answer i is choice p * n + i.
    """

    whole_name = ""
    chunk_name = ""

    def __init__(self, id_: str, model: str, job: Job, synthetic: bool):
        self._id = id_
        self._model = model
        self._job = job
        self._synthetic = synthetic
        self._created = int(time.time())
        self.answers = [Answer() for _ in range(len(job.prompts) * job.n)]
        self._wants_logprobs = job.prompts[0][1].sampling.logprobs is not None

    def whole(self) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = [
            {
                "index": index,
                **self._choice(answer),
                "finish_reason": answer.finish,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(self.answers)
        ]
        return {
            **self._head(self.whole_name),
            "choices": choices,
            "usage": self.usage(),
            "dskjax": self.extras(),
        }

    def chunk(self, index: int, output: Output) -> dict[str, Any] | None:
        """A piece as a chunk; None if it shows nothing."""
        answer = self.answers[index]
        answer.end(output)
        shows = output.text or output.reasoning or output.logprobs or output.finish
        if not shows and answer.begun:
            return None
        part = self._delta(answer, output)
        answer.begun = True
        finish = None if output.finish is None else output.finish.value
        choice = {"index": index, **part, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = output.stop_reason
        value = {**self._head(self.chunk_name), "choices": [choice]}
        if self._job.include_usage:
            value["usage"] = None
        if all(a.finish for a in self.answers):
            value["dskjax"] = self.extras()
        elif self._synthetic:
            value["dskjax"] = {"synthetic_acceptance": True}
        return value

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with `stream_options.include_usage`."""
        head = self._head(self.chunk_name)
        return {**head, "choices": [], "usage": self.usage(), "dskjax": self.extras()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, as its first answer found it."""
        every = self._usages()
        firsts = every[:: self._job.n]
        prompt = sum(u.prompt_tokens for u in firsts)
        completion = sum(u.completion_tokens for u in every)
        accepted = sum(u.accepted for u in every)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in firsts)},
            "completion_tokens_details": {
                "reasoning_tokens": sum(u.reasoning_tokens for u in every),
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(u.drafted for u in every) - accepted,
            },
        }

    def extras(self) -> dict[str, Any]:
        """How speculation did; `synthetic_acceptance` stands there only when it is on."""
        every = self._usages()
        value: dict[str, Any] = {
            "accept": self._job.accept.label,
            "lossless": all(u.lossless for u in every),
            "drafted": sum(u.drafted for u in every),
            "accepted": sum(u.accepted for u in every),
        }
        if self._synthetic or any(u.synthetic for u in every):
            value["synthetic_acceptance"] = True
        return value

    def _usages(self) -> list[Usage]:
        found = [answer.usage for answer in self.answers if answer.usage is not None]
        assert len(found) == len(self.answers), "a service's last piece carries its usage"
        return found

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}

    @abc.abstractmethod
    def _choice(self, answer: Answer) -> dict[str, Any]:
        """The choice's own fields, of a whole answer."""

    @abc.abstractmethod
    def _delta(self, answer: Answer, output: Output) -> dict[str, Any]:
        """The choice's own fields, of a chunk."""


class CompletionShape(Shape):
    """Of /v1/completions."""

    whole_name = chunk_name = "text_completion"

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": "".join(answer.text), "logprobs": self._logprobs(answer, answer.logprobs)}

    def _delta(self, answer: Answer, output: Output) -> dict[str, Any]:
        return {"text": output.text, "logprobs": self._logprobs(answer, output.logprobs or ())}

    def _logprobs(self, answer: Answer, found: Sequence[OutputLogprob]) -> dict[str, Any] | None:
        """Columns; an offset is where a token begins in the joined texts of all tokens, those of an
        echoed prompt included. Nothing predicts a prompt's first token: null.
        """
        if not self._wants_logprobs:
            return None
        offsets = []
        for entry in found:
            offsets.append(answer.offset)
            answer.offset += len(entry.chosen.token)
        return {
            "tokens": [entry.chosen.token for entry in found],
            "token_logprobs": [_finite(entry.chosen.logprob) for entry in found],
            "top_logprobs": [_alternatives(entry) for entry in found],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """Of /v1/chat/completions; log-probabilities list reasoning and answer as one sequence."""

    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": "".join(answer.text),
            "reasoning_content": "".join(answer.reasoning) or None,
            "refusal": None,
        }
        return {"message": message, "logprobs": self._logprobs(answer.logprobs)}

    def _delta(self, answer: Answer, output: Output) -> dict[str, Any]:
        delta = {} if answer.begun else {"role": "assistant", "content": ""}
        if output.text:
            delta["content"] = output.text
        if output.reasoning:
            delta["reasoning_content"] = output.reasoning
        return {"delta": delta, "logprobs": self._logprobs(output.logprobs or ())}

    def _logprobs(self, found: Sequence[OutputLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            {**_entry(entry.chosen), "top_logprobs": [_entry(other) for other in entry.top]}
            for entry in found
        ]
        return {"content": content, "refusal": None}


def _entry(found: TextLogprob) -> dict[str, Any]:
    return {"token": found.token, "logprob": _finite(found.logprob), "bytes": found.bytes}


def _alternatives(found: OutputLogprob) -> dict[str, float | None] | None:
    """By text. Ids that read alike (parts of characters) share an entry: the likelier one's."""
    if found.chosen.logprob is None:
        return None
    best: dict[str, float | None] = {}
    for entry in (*found.top, found.chosen):
        best.setdefault(entry.token, _finite(entry.logprob))
    return best


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(float(logprob), _LEAST)
