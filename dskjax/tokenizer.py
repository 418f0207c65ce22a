"""Text to ids and back, the chat template, and streaming detokenisation.

A thin layer over `tokenizers.Tokenizer` for the byte-level BPE files of the DeepSeek family. Ids
of special tokens are looked up by their text, never written down: `</think>` is 128799 in V3 and
something else in other members of the family. The chat format is whatever the checkpoint's own
Jinja template says; nothing here knows it.
"""

import codecs
import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
import tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"


class Tokenizer:
    """Encoder, decoder and chat template of one checkpoint directory.

    Attributes:
        vocab_size: one more than the largest token id (a model's `vocab_size` may be larger).
        bos_id, pad_id: None where the tokenizer has no such token.
        eos_ids: every id that ends a generation, from `tokenizer_config.json` and
            `generation_config.json`; never empty.
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
        source: str = "tokenizer",
    ):
        config = config or {}
        if "ByteLevel" not in _decoder_types(backend):
            raise ValueError(
                f"{source}: expected a byte-level BPE tokenizer (decoder ByteLevel), found decoder "
                f"{sorted(_decoder_types(backend)) or None}; the DeepSeek family has no other kind"
            )
        self.source = source
        self.chat_template = chat_template
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
        eos = self._named_id("eos_token")
        ends: list[int] = [] if eos is None else [eos]
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
        """Reads `tokenizer.json` and, where present, the config and template files beside it."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint directory must hold tokenizer.json"
            )
        _read_json(path)  # for an error that names line and column
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        config_path = directory / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        return cls(
            backend,
            config=config,
            chat_template=_chat_template(directory, config),
            eos_ids=_generation_eos(directory / "generation_config.json"),
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
            thinking: the template's `thinking` variable, left undefined if None. A template that
                does not know it (see `supports_thinking`) ignores it.
            add_generation_prompt: end with what makes the model answer.
            tools: tool schemas, for templates that use them.
            **variables: further variables of the template.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.source}: no chat template (looked for chat_template.jinja and for "
                "chat_template in tokenizer_config.json); give a plain prompt instead"
            )
        if not messages:
            raise ValueError("a conversation needs at least one message")
        if thinking is not None:
            variables["thinking"] = thinking
        try:
            return self._template.render(
                messages=[_checked_message(m, i) for i, m in enumerate(messages)],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **{**self._named, **variables},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.source}: the chat template refused: {error}") from error

    @functools.cached_property
    def supports_thinking(self) -> bool:
        """Whether the chat template has a `thinking` switch."""
        if self.chat_template is None:
            return False
        tree = _environment().parse(self.chat_template)
        return "thinking" in jinja2.meta.find_undeclared_variables(tree)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a document gets."""
        parts = [self._backend.to_str(), self._named, self.eos_ids, self.chat_template]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        assert self.chat_template is not None
        try:
            return _environment().from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{self.source}: chat template line {error.lineno}: {error.message}"
            ) from error

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        spec = json.loads(self._backend.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))

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
            return bytes(_BYTE_OF[c] for c in token)
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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


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


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` wins over the config key, which may be a list of named templates."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        if "default" not in named:
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: chat_template has no entry named default, "
                f"found {sorted(map(str, named))}"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be text, "
            f"found {type(template).__name__}"
        )
    return template


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


def _checked_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content flattened to text (none is kept beside tool calls)."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}]: expected an object with a role, found {message!r}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"messages[{index}]: only text parts are supported, found {part!r}"
                )
        content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return dict(message)  # templates test for none
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}]: content must be text, found {content!r}")
    return {**message, "content": content}


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What Hugging Face templates are written for, sandboxed: a template is untrusted input."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda spec: datetime.datetime.now().strftime(spec)
    return env
