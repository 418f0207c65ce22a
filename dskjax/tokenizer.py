"""Text to ids and back, the chat template, and streaming detokenisation.

A thin layer over `tokenizers.Tokenizer` for the byte-level BPE files of the DeepSeek family:
`tokenizer.json`, or the `tiktoken.model` of Kimi-K2 and Moonlight. Ids of special tokens are looked
up by their text, never written down: `</think>` is 128799 in V3 and something else in other members
of the family. The chat format is whatever the checkpoint's own Jinja template says.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dskjax import tiktoken
from dskjax.byte_alphabet import unspell
from dskjax.chat_template import ChatTemplate, no_template, python_encoder, read_template

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
IM_END = "<|im_end|>"  # of every turn in the conversations of Kimi-K2 and Moonlight


class Tokenizer:
    """Encoder, decoder and chat template of one checkpoint directory.

    Attributes:
        vocab_size: one more than the largest token id (a model's `vocab_size` may be larger).
        bos_id, pad_id: None where the tokenizer has no such token.
        eos_ids: every id that ends a generation: the eos of `tokenizer_config.json`, the end of a
            turn where that is a token of its own, and those of `generation_config.json`; never
            empty.
        user_id, assistant_id, think_id, end_think_id: None where the token does not exist.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_ids: Sequence[int] = (),
        encoder: str | None = None,
        source: str = "tokenizer",
    ):
        """`encoder` names the Python file that a checkpoint without a template renders with."""
        config = config or {}
        if "ByteLevel" not in _decoder_types(backend):
            raise ValueError(
                f"{source}: expected a byte-level BPE tokenizer (decoder ByteLevel), found decoder "
                f"{sorted(_decoder_types(backend)) or None}; the DeepSeek family has no other kind"
            )
        self.source = source
        self.chat_template = chat_template
        self._encoder = encoder
        self._sort_tools = tiktoken.is_moonshot(config)
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._bytes: list[bytes | None] = [None] * self.vocab_size  # filled when first asked for

        self._named = {
            name: _token_text(config[name], f"{source}: {name}")
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(name) is not None
        }
        for name, default in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
            if name in self._named:
                if self.token_id(self._named[name]) is None:
                    raise ValueError(
                        f"{source}: {name} {self._named[name]!r} is not in the vocabulary"
                    )
            elif self.token_id(default) is not None:
                self._named[name] = default
        self.bos_id = self._named_id("bos_token")
        self.pad_id = self._named_id("pad_token")
        ends = [i for i in (self._named_id("eos_token"), self.token_id(IM_END)) if i is not None]
        self.eos_ids = tuple(dict.fromkeys([*ends, *eos_ids]))
        if not self.eos_ids:
            raise ValueError(f"{source}: no end token: name eos_token in tokenizer_config.json")
        for i in self.eos_ids:
            self._check_id(i)
        self.user_id = self.token_id(USER)
        self.assistant_id = self.token_id(ASSISTANT)
        self.think_id = self.token_id(THINK)
        self.end_think_id = self.token_id(END_THINK)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` or `tiktoken.model`, and the config and template files beside it.

        Nothing is written, and no Python file of the folder is run.

        Raises:
            FileNotFoundError: neither file is there, or what a `tiktoken.model` needs is not.
            ValueError: a file is malformed, or of a kind that is not supported.
        """
        directory = Path(directory)
        config_path = directory / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        path = directory / "tokenizer.json"
        if path.is_file():
            backend = _read_backend(path)
        elif (directory / tiktoken.FILE).is_file():
            path = directory / tiktoken.FILE
            if not config_path.is_file():
                raise FileNotFoundError(
                    f"{config_path}: no such file; {path.name} holds no special tokens, they are "
                    "named there"
                )
            backend = tiktoken.read_tiktoken(path, config)
            config = {**tiktoken.NAMES, **config}
        else:
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint directory must hold tokenizer.json or "
                f"{tiktoken.FILE}"
            )
        return cls(
            backend,
            config=config,
            chat_template=read_template(directory, config),
            eos_ids=_generation_eos(directory / "generation_config.json"),
            encoder=python_encoder(directory),
            source=str(path),
        )

    def token_id(self, text: str) -> int | None:
        """Id of the token spelled exactly `text`, or None."""
        return self._backend.token_to_id(text)

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of `text`, with bos in front only if asked for.

        With `parse_special=False`, special tokens spelled out in `text` are ordinary characters:
        what a document of a corpus, or any text that nobody vouches for, should get.
        """
        ids = self.encode_batch([text], parse_special=parse_special)[0]
        if not bos:
            return ids
        if self.bos_id is None:
            raise ValueError(f"{self.source} has no bos token")
        return [self.bos_id, *ids]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Ids of many texts, spread over the cores of the machine."""
        backend = self._backend if parse_special else self._plain_backend
        for text in texts:
            if not text.isascii():  # a lone surrogate cannot be UTF-8, and the library aborts on it
                _check_encodable(text)
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Unknown ids raise."""
        return b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes that a token stands for; none for a special token if those are skipped."""
        token_id = self._check_id(token_id)
        added = self._added.get(token_id)
        if skip_special and added is not None and added.special:
            return b""
        cached = self._bytes[token_id]
        if cached is None:
            cached = added.content.encode() if added is not None else self._bpe_bytes(token_id)
            self._bytes[token_id] = cached
        return cached

    def token_lengths(self) -> np.ndarray:
        """Bytes of text per id, int32 [vocab_size]; 0 for added tokens and unused ids.

        Loss in bits divided by the sum of these over the predicted tokens is bits per byte.
        """
        used = self._backend.get_vocab(with_added_tokens=True).values()
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in used:
            lengths[i] = 0 if i in self._added else len(self.token_bytes(i))
        return lengths

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation to the text that `encode` takes (most templates begin with bos).

        Args:
            messages: `{"role": ..., "content": ...}`; content is text or OpenAI text parts.
            thinking: for the template's switch, `thinking` or `enable_thinking`, which is left
                undefined if None. A template without one (see `supports_thinking`) ignores it.
            add_generation_prompt: end with what makes the model answer.
            tools: tool schemas, for templates that use them.
            **variables: further variables of the template.

        Raises:
            ValueError: there is no template, it refuses, or a message is malformed.
        """
        if self._template is None:
            raise ValueError(no_template(self.source, self._encoder))
        given = {"add_generation_prompt": add_generation_prompt, **self._named, **variables}
        return self._template.render(messages, thinking=thinking, tools=tools, variables=given)

    @property
    def supports_thinking(self) -> bool:
        """Whether the chat template has a switch for thinking."""
        return self._template is not None and bool(self._template.switches)

    def is_thinking(self, ids: Sequence[int]) -> bool:
        """Whether what follows these ids is inside a thinking section.

        So it is if their last thinking tag opens one, and no end of an answer came after it.
        """
        marks = {self.think_id, self.end_think_id, *self.eos_ids}
        last = next((i for i in reversed(ids) if i in marks), None)
        return last is not None and last == self.think_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a document gets."""
        parts = [self._backend.to_str(), self._named, self.eos_ids, self.chat_template]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def _template(self) -> ChatTemplate | None:
        if self.chat_template is None:
            return None
        return ChatTemplate(self.chat_template, source=self.source, sort_tools=self._sort_tools)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The backend without its added tokens."""
        plain = tokenizers.Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (value := getattr(self._backend, part)) is not None:
                setattr(plain, part, value)
        return plain

    def _named_id(self, name: str) -> int | None:
        return self.token_id(self._named[name]) if name in self._named else None

    def _check_id(self, token_id: int) -> int:
        token_id = int(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is out of range: "
                f"{self.source} has ids 0..{self.vocab_size - 1}"
            )
        return token_id

    def _bpe_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id} is not used by {self.source}")
        try:
            return unspell(token)
        except KeyError:
            return token.encode()  # not spelled in the byte alphabet: stands for itself


class IncrementalDecoder:
    """Turns a stream of ids into a stream of text, never splitting a character.

    A character's bytes may be spread over several tokens: `push` holds them back until the last one
    has come. The pieces joined (with `finish`) equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """Text completed by these ids; may be empty. Unknown ids raise before anything is taken."""
        pieces = [self._tokenizer.token_bytes(i, skip_special=self._skip_special) for i in ids]
        return self._utf8.decode(b"".join(pieces))

    def finish(self) -> str:
        """U+FFFD for a character that never got its last byte, else nothing; resets the stream."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    _read_json(path)  # for an error that names line and column
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    backend.no_truncation()  # a file may hold what its last user had set
    backend.no_padding()
    return backend


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {d["type"] for d in decoder.get("decoders", [decoder]) if "type" in d}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _token_text(value: Any, where: str) -> str:
    """A token named in tokenizer_config.json: plain text or a serialised AddedToken."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected the text of a token, found {value!r}")
    return value


def _generation_eos(path: Path) -> list[int]:
    eos = _read_json(path).get("eos_token_id") if path.is_file() else None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(
            f"{path}: eos_token_id must be an integer or a list of them, found {eos!r}"
        )
    return ids


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: {error}") from error
