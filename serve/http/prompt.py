"""Prompts to token ids, so that no text of a request can become a special token.

A conversation is rendered by the checkpoint's template and encoded with special tokens understood,
since the template writes its structure with them. Where a message itself spells a special token,
the template sees a placeholder instead, and the spelling is encoded as ordinary characters in its
place. A conversation without such spellings gets exactly the ids of `encode(rendered)`.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from dskjax.tokenizer import END_THINK, THINK, Tokenizer

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no template changes, trims or splits at them


class PromptEncoder:
    """Texts and conversations of requests to ids.

    Attributes:
        tokenizer: of the model.
        specials: the texts of all added tokens, longest first.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.specials = sorted(_added_tokens(tokenizer), key=len, reverse=True)
        self._any = _pattern(self.specials)
        self._any_but_tags = _pattern([s for s in self.specials if s not in (THINK, END_THINK)])
        self._beginnings = {s[:n] for s in self.specials for n in range(1, len(s))}
        self._longest = max(map(len, self._beginnings), default=0)

    def text(self, prompts: Sequence[str], *, bos: bool = True) -> list[list[int]]:
        """Ids of plain texts, after bos if the model has one and it is wanted.

        Raises:
            ValueError: nothing is left to continue.
        """
        front = [] if self.tokenizer.bos_id is None or not bos else [self.tokenizer.bos_id]
        found = self.tokenizer.encode_batch(prompts, parse_special=False)
        return [[*front, *ids] for ids in found]

    def chat(self, messages: Sequence[Mapping[str, Any]], thinking: bool | None) -> list[int]:
        """Ids of a rendered conversation.

        In assistant messages <think> and </think> keep their meaning: that is how an earlier
        answer's reasoning is written, and templates look for it.

        Raises:
            ValueError: the template refuses the conversation, has no `thinking` switch to set, or
                changes the placeholders.
        """
        if thinking is not None and not self.tokenizer.supports_thinking:
            raise ValueError("this model's chat template has no thinking switch: leave it out")
        hidden = _Hidden()
        masked = [
            {
                key: value if key == "role" else self._mask(value, message["role"], hidden)
                for key, value in message.items()
            }
            for message in messages
        ]
        rendered = self.tokenizer.apply_chat_template(masked, thinking=thinking)
        parts = hidden.split(rendered)
        ordinary = self.tokenizer.encode_batch(parts[1::2], parse_special=False)
        template = self.tokenizer.encode_batch(parts[::2], parse_special=True)
        ids = template[0]
        for left, right in zip(ordinary, template[1:], strict=True):
            ids += left
            ids += right
        return ids

    def thinking(self, ids: Sequence[int]) -> bool:
        """Whether what follows these ids is inside a thinking section."""
        return self.tokenizer.is_thinking(ids)

    @property
    def splits_reasoning(self) -> bool:
        """Whether the model marks its reasoning with the two tags."""
        return None not in (self.tokenizer.think_id, self.tokenizer.end_think_id)

    def _mask(self, text: str, role: str, hidden: "_Hidden") -> str:
        pattern = self._any_but_tags if role == "assistant" else self._any
        masked = pattern.sub(lambda match: hidden.put(match[0]), text)
        # "<｜Us" before a message or a template's text that goes on with "er｜>"
        longest = min(self._longest, len(text))
        if any(text[-n:] in self._beginnings for n in range(1, longest + 1)):
            masked += hidden.put("")
        return masked


class _Hidden:
    """Placeholders of texts, unguessable so that no message can hold one."""

    def __init__(self):
        self._nonce = f"{secrets.randbits(64):020d}"
        self._texts: list[str] = []

    def put(self, text: str) -> str:
        self._texts.append(text)
        return f"{_OPEN}{self._nonce}{len(self._texts) - 1}{_CLOSE}"

    def split(self, rendered: str) -> list[str]:
        """The rendered text at even places, what was put away at odd ones."""
        parts = re.split(f"{_OPEN}{self._nonce}([0-9]+){_CLOSE}", rendered)
        if any(self._nonce in part for part in parts):
            raise ValueError(
                "a message spells a special token where the chat template rewrites its text: "
                "take the token out of the message"
            )
        parts[1::2] = [self._texts[int(number)] for number in parts[1::2]]
        return parts


def _pattern(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Added tokens stand for no text of a corpus: their length is 0, and so is an unused id's."""
    found = []
    for i in (tokenizer.token_lengths() == 0).nonzero()[0]:
        try:
            found.append(tokenizer.token_bytes(int(i)).decode())
        except ValueError:  # an id between the used ones
            continue
    return [text for text in found if text]
