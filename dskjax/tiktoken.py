"""`tiktoken.model`, the vocabulary of Kimi-K2 and Moonlight, as a byte-level BPE tokenizer.

Each line holds the bytes of a token in base64 and its rank, which is its id. BPE joins the two
neighbours whose bytes together have the lowest rank, until no two are a token. The rest is said by
Python files beside it (`tokenization_kimi.py`, `tokenization_moonshot.py`), which are never run:
the pattern that splits a text first, and the 256 ids after the last rank, those of special tokens.
Here they are written down, so that ids equal those of these files, with one exception: the files
first cut a text into pieces of 400,000 characters, and after 25,000 without a change between white
space and other characters.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dskjax.byte_alphabet import ALPHABET, spell

FILE = "tiktoken.model"
RESERVED = 256
"""Ids of special tokens after the last rank; those without a name are `<|reserved_token_ID|>`."""
NAMES = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
"""What tokenizer_config.json need not say."""

_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # may stand before a word
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Kimi's: runs of Chinese characters, words of other letters by case, up to three digits, others
with the line ends after them, white space; the last blank of a run goes with the word after it.
"""

_MODULES = ("tokenization_kimi", "tokenization_moonshot")
_MARK = "<|im_middle|>"  # a special token of all of them and of nobody else


def is_moonshot(config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer_config.json is that of a Kimi or a Moonlight."""
    named = str(config.get("auto_map"))
    added = config.get("added_tokens_decoder")
    tokens = added.values() if isinstance(added, Mapping) else ()
    return any(module in named for module in _MODULES) or any(
        isinstance(token, Mapping) and token.get("content") == _MARK for token in tokens
    )


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a `tiktoken.model`; special tokens are those of `config`.

    Args:
        path: of the file.
        config: tokenizer_config.json beside it.

    Raises:
        ValueError: the vocabulary is not a Kimi's or a Moonlight's, or a file is malformed.
    """
    if not is_moonshot(config):
        raise ValueError(
            f"{path}: nothing says how this vocabulary splits a text: tokenizer_config.json has "
            f"auto_map {config.get('auto_map')!r} and no token {_MARK}, expected those of a Kimi "
            "or a Moonlight; convert the file to a tokenizer.json beside it, for example with "
            "TikTokenConverter of transformers.convert_slow_tokenizer and the model's own pattern"
        )
    vocabulary = {spell(token): i for i, token in enumerate(_tokens(path))}
    _check_bytes(path, vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(vocabulary), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_special(path.parent / "tokenizer_config.json", config, vocabulary))
    return backend


def _tokens(path: Path) -> list[bytes]:
    """The tokens in the order of their ranks."""
    line_of: dict[int, int] = {}
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token = base64.b64decode(encoded, validate=True)
            rank = int(digits)
        except (ValueError, binascii.Error) as error:
            raise _malformed(path, number, line) from error
        if not token or not digits.isdigit():
            raise _malformed(path, number, line)
        first = line_of.get(rank) or line_of.get(tokens.get(token, -1))
        if first is not None:
            raise ValueError(
                f"{path} line {number}: token {token!r} or its rank {rank} is that of line {first} "
                "too: tokens and ranks must differ"
            )
        tokens[token] = rank
        line_of[rank] = number
    missing = next((rank for rank in range(len(tokens)) if rank not in line_of), None)
    if missing is not None:
        raise ValueError(
            f"{path}: no token has rank {missing}: {len(tokens)} tokens must have the ranks "
            f"0..{len(tokens) - 1}, the largest is {max(line_of)}"
        )
    return sorted(tokens, key=tokens.__getitem__)


def _malformed(path: Path, number: int, line: bytes) -> ValueError:
    return ValueError(
        f"{path} line {number}: expected a token in base64, a blank and its rank, "
        f"found {line[:60]!r}"
    )


def _check_bytes(path: Path, vocabulary: Mapping[str, int]) -> None:
    missing = [byte for byte, character in enumerate(ALPHABET) if character not in vocabulary]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of the 256 bytes are no tokens, the first is "
            f"{missing[0]:#04x}: a text with it could not be encoded; is the file whole?"
        )


def _merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every two tokens that together are one, in the order of the rank of that one.

    A token may be split in several ways. BPE gets to one of them only, the same wherever the token
    stands, since no pair that crosses its ends was joined; so the order among them does not matter.
    """
    return [
        (left, right)
        for token in vocabulary
        for at in range(1, len(token))
        if (left := token[:at]) in vocabulary and (right := token[at:]) in vocabulary
    ]


def _special(
    path: Path, config: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> list[tokenizers.AddedToken]:
    """The tokens of the ids after the vocabulary, in their order."""
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping):
        raise ValueError(f"{path}: added_tokens_decoder must be an object, found {added!r}")
    first = len(vocabulary)
    found: dict[str, tokenizers.AddedToken] = {}
    ids = [str(i) for i in range(first, first + RESERVED)]
    for key in added:
        if key not in ids:
            raise ValueError(
                f"{path}: added_tokens_decoder has the id {key!r}: {FILE} has {first} tokens, "
                f"so those of special tokens are {ids[0]}..{ids[-1]}"
            )
    for key in ids:
        given = added.get(key, {"content": f"<|reserved_token_{key}|>"})
        text = given.get("content") if isinstance(given, Mapping) else given
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"{path}: added_tokens_decoder {key}: expected the text of a token, found {given!r}"
            )
        if text in found or text in vocabulary:
            raise ValueError(f"{path}: added_tokens_decoder {key}: {text!r} is a token already")
        special = not isinstance(given, Mapping) or bool(given.get("special", True))
        found[text] = tokenizers.AddedToken(text, special=special, normalized=False)
    return list(found.values())
