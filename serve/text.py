"""An answer's ids turned into text: decoding, stop strings, reasoning, log-probabilities, usage.

Stop strings are looked for in the plain text of the answer: what it would be without
`split_reasoning`, tags that are not special tokens included. So they end content and reasoning
alike, and an answer ends at the same token whether its reasoning is split off or not. A tag of
which a stop string leaves only a part is left out of split text.

The text of a stop token is left out, except that of a special one with `echo_special`.

With `echo` the prompt's text comes first; no stop string is looked for in it.
"""

from collections import deque
from collections.abc import Sequence

from dskjax.tokenizer import IncrementalDecoder, Tokenizer
from serve.api import GenerateOptions, Output, OutputLogprob, TextLogprob, Usage
from serve.plan import TokenEvent, TokenLogprob
from serve.request import FinishReason, Request
from serve.sections import Sections
from serve.stops import ROOT, stop_matcher


class AnswerText:
    """The text side of one answer. Used by one thread at a time.

    Args:
        tokenizer: of the model.
        options: of the request.
        request: the engine's side of it, read for the counters of `Usage`.
        index: which of the n answers.
        lossless, synthetic: for `Usage`.

    Attributes:
        index: which of the n answers.
        ended: the last piece has been made; nothing may be pushed any more.
    """

    __slots__ = (
        "_completion",
        "_decoder",
        "_echo",
        "_end_think",
        "_held",
        "_held_length",
        "_ignored",
        "_lossless",
        "_matcher",
        "_options",
        "_reasoning",
        "_request",
        "_sections",
        "_state",
        "_stop",
        "_synthetic",
        "_tags",
        "_think",
        "_thinking",
        "_tokenizer",
        "ended",
        "index",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: GenerateOptions,
        request: Request,
        *,
        index: int = 0,
        lossless: bool = True,
        synthetic: bool = False,
    ):
        self.index = index
        self.ended = False
        self._tokenizer = tokenizer
        self._options = options
        self._request = request
        self._lossless = lossless
        self._synthetic = synthetic
        skip = not options.echo_special
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip)
        self._think, self._end_think = tokenizer.think_id, tokenizer.end_think_id
        self._thinking = options.thinking
        self._echo = options.echo  # the prompt is still to come
        self._completion = 0
        self._reasoning = 0
        self._sections = Sections(options.thinking and options.split_reasoning)
        tags = ((self._think, True), (self._end_think, False)) if options.split_reasoning else ()
        self._tags = {token: opens for token, opens in tags if token is not None}
        self._matcher = stop_matcher(options.stop.stop) if options.stop.stop else None
        self._ignored = options.stop.min_tokens  # no match completed by one of the first so many
        self._state = ROOT
        self._stop: str | None = None
        self._held: deque[tuple[bool | None, str]] = deque()  # see `_feed`
        self._held_length = 0

    def push(self, event: TokenEvent) -> Output | None:
        """The next piece, or None if the event brings nothing.

        Tokens after the one that completes a stop string are dropped. The event's own end, if any,
        is then that of the stop string.

        Raises:
            ValueError: an id is not the tokenizer's. The answer cannot go on: `end` it.
        """
        assert not self.ended
        tokens, finish = event.tokens, event.finish
        if not tokens and finish is None:
            return None
        front = self._push_prompt(event) if self._echo else None
        shown = tokens
        if event.stop_token is not None and tokens and tokens[-1] == event.stop_token:
            shown = tokens if self._echoes(event.stop_token) else tokens[:-1]
        tagged = self._think in tokens or self._end_think in tokens
        if self._matcher is None and not (tagged and self._tags):
            self._sections.add(self._decoder.push(*shown))
        elif (kept := self._push_each(shown)) is not None:
            tokens = tokens[:kept]
        self._count(tokens, tagged)
        if self._stop is None and finish is not None:
            self._feed(None, self._decoder.finish(), self._completion)
            self._release(self._held_length)
        if self._stop is not None:
            finish = FinishReason.STOP
        self.ended = finish is not None
        if self.ended:
            self._sections.flush()
        text, reasoning = self._sections.take()
        most = self._options.sampling.logprobs
        found = None if event.logprobs is None else self._logprobs(event.logprobs, tokens, most)
        return Output(
            index=self.index,
            text=text,
            reasoning=reasoning,
            token_ids=tokens,
            logprobs=found if front is None else [*front, *(found or ())],
            finish=finish,
            stop_reason=self._stop or self._stop_token(event),
            message=event.message if self._stop is None else "",
            usage=self._usage() if self.ended else None,
        )

    def end(self, reason: FinishReason, message: str) -> Output:
        """The last piece of an answer that no event ended, with the text held back until now."""
        self.ended = True
        self._release(self._held_length)
        self._sections.add(self._decoder.finish())
        self._sections.flush()
        text, reasoning = self._sections.take()
        return Output(
            index=self.index,
            text=text,
            reasoning=reasoning,
            finish=reason,
            message=message,
            usage=self._usage(),
        )

    def _push_prompt(self, event: TokenEvent) -> list[OutputLogprob] | None:
        """Puts the prompt's text first; what is known of its tokens, if that was asked for.

        A character that the prompt leaves unfinished is shown when the answer has finished it.
        """
        self._echo = False
        prompt = self._request.tokens[: self._request.prompt_len]
        self._sections.add(self._decoder.push(*prompt))
        if event.prompt_logprobs is None:
            return None
        first = _text_logprob(self._tokenizer.token_bytes(prompt[0]), None)
        most = self._options.sampling.prompt_logprobs
        rest = self._logprobs(event.prompt_logprobs, prompt[1:], most)
        return [OutputLogprob(first, []), *rest]

    def _push_each(self, tokens: Sequence[int]) -> int | None:
        """Takes the tokens one by one; how many there are up to a stop string, None without."""
        for number, token in enumerate(tokens, 1):
            nth = self._completion + number
            opens = self._tags.get(token)
            if opens is None:
                self._feed(None, self._decoder.push(token), nth)
            else:
                self._feed(None, self._decoder.finish(), nth)  # no character spans a tag
                if self._stop is None:
                    self._feed(opens, self._decoder.push(token), nth)
            if self._stop is not None:
                return number
        return None

    def _feed(self, tag: bool | None, text: str, nth: int) -> None:
        """Looks for a stop string in text and releases what cannot become one.

        Args:
            tag: True for `<think>`, False for `</think>`, None for other text.
            text: plain text; that of a tag is empty if it is a special token that is left out.
            nth: the number of the token that completed it, from 1.
        """
        matcher = self._matcher
        if matcher is None:
            self._emit(tag, text)
            return
        seen = self._held_length
        self._held.append((tag, text))
        self._held_length += len(text)
        if self._state != ROOT or not matcher.starts.isdisjoint(text):
            state = self._state
            for position, char in enumerate(text, seen + 1):
                state = matcher.step(state, char)
                stop = matcher.found[state]
                if stop is not None and nth > self._ignored:
                    self._stop = stop
                    self._release(position - len(stop))
                    self._held.clear()
                    return
            self._state = state
        self._release(self._held_length - matcher.held[self._state])

    def _release(self, length: int) -> None:
        """Lets go of so many characters of the text held back, and of a tag without any there."""
        self._held_length -= length
        while self._held:
            tag, text = self._held[0]
            if len(text) > length:
                self._emit(None, text[:length] if tag is None else "")
                self._held[0] = tag, text[length:]
                return
            length -= len(text)
            self._held.popleft()
            self._emit(tag, text)

    def _emit(self, tag: bool | None, text: str) -> None:
        if tag is None:
            self._sections.add(text)
        else:
            self._sections.tag(tag)

    def _count(self, tokens: Sequence[int], tagged: bool) -> None:
        self._completion += len(tokens)
        if not tagged:
            self._reasoning += len(tokens) if self._thinking else 0
            return
        for token in tokens:
            if token in (self._think, self._end_think):
                self._thinking = token == self._think
            elif self._thinking:
                self._reasoning += 1

    def _echoes(self, token: int) -> bool:
        special = not self._tokenizer.token_bytes(token, skip_special=True)
        return special and self._options.echo_special

    def _stop_token(self, event: TokenEvent) -> int | None:
        """The id that ended it, unless that is what always ends an answer of this model."""
        eos = () if self._options.stop.ignore_eos else self._tokenizer.eos_ids
        return None if event.stop_token in eos or not self.ended else event.stop_token

    def _usage(self) -> Usage:
        request = self._request
        return Usage(
            prompt_tokens=request.prompt_len,
            completion_tokens=self._completion,
            cached_tokens=request.hit,
            reasoning_tokens=self._reasoning,
            drafted=request.drafted,
            accepted=request.accepted,
            lossless=self._lossless,
            synthetic=self._synthetic,
        )

    def _logprobs(
        self, entries: Sequence[TokenLogprob], tokens: Sequence[int], most: int | None
    ) -> list[OutputLogprob]:
        tokenizer = self._tokenizer
        return [
            OutputLogprob(
                _text_logprob(tokenizer.token_bytes(token), entry.logprob),
                [_text_logprob(_bytes(tokenizer, i), value) for i, value in entry.top[:most]],
            )
            for token, entry in zip(
                tokens, entries, strict=False
            )  # those after a stop string are dropped
        ]


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Nothing for an id that only the model has: such an alternative is odd, but not an error."""
    try:
        return tokenizer.token_bytes(token)
    except ValueError:
        return b""


def _text_logprob(raw: bytes, logprob: float | None) -> TextLogprob:
    return TextLogprob(raw.decode("utf-8", "replace"), list(raw), logprob)
