"""`tiktoken.model`: ids against a slow oracle, the split pattern by hand, and broken files."""

import base64
import json
import shutil

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dskjax import tiktoken
from dskjax.byte_alphabet import ALPHABET, spell, unspell
from dskjax.tokenizer import Tokenizer
from tests.chat_families import (
    CORPUS,
    KIMI,
    KIMI_THINKING,
    TINY,
    corpus_tokens,
    family,
    write_tiktoken,
)
from tests.oracles import byte_pairs

TOKENS = corpus_tokens()
RANKS = {token: i for i, token in enumerate(TOKENS)}
BASE = len(TOKENS)
kimi = family("kimi_k2")


@pytest.fixture
def folder(tmp_path):
    write_tiktoken(tmp_path, TOKENS)
    return tmp_path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """What a text is split into before byte pairs are joined."""
    folder = tmp_path_factory.mktemp("pieces")
    write_tiktoken(folder, TOKENS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    backend = tiktoken.read_tiktoken(folder / "tiktoken.model", config)
    splitter = backend.pre_tokenizer
    assert splitter is not None
    return lambda text: [unspell(p).decode() for p, _ in splitter.pre_tokenize_str(text)]


def lines(folder) -> list[bytes]:
    return (folder / "tiktoken.model").read_bytes().splitlines()


# ------------------------------------------------------------------ byte pairs

# Texts that are one piece whatever stands beside them: no two of a kind follow each other.
words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12)
hans = st.text("你好世界今天气很公园步的真", min_size=1, max_size=8)
marks = st.text("#$%&*+,./:;<=>?@[]^_{|}~😀", min_size=2, max_size=6)
numbers = st.text("0123456789", min_size=1, max_size=3)
mixed = st.lists(st.tuples(numbers, hans, words, numbers, hans), max_size=4)


@given(mixed, marks)
def test_ids_are_those_of_the_oracle(groups, end):
    parts = [part for group in groups for part in group]
    expected = [i for part in [*parts, end] for i in byte_pairs.encode(part.encode(), RANKS)]
    assert kimi.encode("".join([*parts, end]), parse_special=False) == expected


def test_the_corpus_uses_long_tokens(pieces):
    ids = kimi.encode(CORPUS)
    assert ids == [i for p in pieces(CORPUS) for i in byte_pairs.encode(p.encode(), RANKS)]
    assert len(ids) < len(CORPUS.encode()) / 3 and max(ids) > BASE - 100


tables = st.lists(
    st.text("abc", min_size=2, max_size=6), unique=True, min_size=1, max_size=40
).flatmap(st.permutations)


def small_tokenizer(tmp_path_factory, table) -> tuple[Tokenizer, dict[bytes, int]]:
    tokens = [*(bytes([b]) for b in range(256)), *(text.encode() for text in table)]
    folder = tmp_path_factory.mktemp("table")
    write_tiktoken(folder, tokens)
    return Tokenizer.load(folder), {token: i for i, token in enumerate(tokens)}


@given(table=tables, text=st.text("abc", max_size=40))
def test_any_order_of_ranks(tmp_path_factory, table, text):
    """Tokens that can be split in many ways, that byte pairs never reach, or by worse ranks."""
    tokenizer, ranks = small_tokenizer(tmp_path_factory, table)
    expected = byte_pairs.encode(text.encode(), ranks) if text else []
    assert tokenizer.encode(text) == expected


def test_a_piece_that_is_a_token_is_that_token(tmp_path_factory):
    # No two tokens make "abc", so only the lookup of the whole piece finds it.
    tokenizer, ranks = small_tokenizer(tmp_path_factory, ["abc"])
    assert tokenizer.encode("abc") == [ranks[b"abc"]]
    assert tokenizer.encode("xabc") == [ord(c) for c in "xabc"]


@pytest.mark.parametrize("broken", [sorted, lambda merges: merges[::-1], lambda merges: merges[1:]])
def test_suite_sees_wrong_merges(tmp_path_factory, monkeypatch, broken):
    table, right = ["bc", "ab"], tiktoken._merges
    tokenizer, ranks = small_tokenizer(tmp_path_factory, table)
    assert tokenizer.encode("abc") == byte_pairs.encode(b"abc", ranks) == [ord("a"), 256]
    monkeypatch.setattr(tiktoken, "_merges", lambda vocabulary: broken(right(vocabulary)))
    wrong, _ = small_tokenizer(tmp_path_factory, table)
    assert wrong.encode("abc") == [257, ord("c")]


@given(st.text(), st.booleans())
def test_round_trip(text, parse_special):
    assert kimi.decode(kimi.encode(text, parse_special=parse_special)) == text


def test_byte_alphabet_is_the_librarys():
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert sorted(ALPHABET) == sorted(level.alphabet())
    text = "".join(map(chr, range(0x800))) + "日😀"
    assert spell(text.encode()) == "".join(p for p, _ in level.pre_tokenize_str(text))
    assert unspell(ALPHABET) == bytes(range(256))


# ------------------------------------------------------------------ the split pattern


@pytest.mark.parametrize(
    "expected",
    [
        # Chinese characters, 々 and 〇 among them, are apart from all other letters.
        ["中文", "English", "混合"],
        ["北京市", " Pascal"],
        ["人々", "は", "〇", "い"],
        ["今天", "，", "好", "。"],
        ["中", "é", "文"],
        ["日本語", "のテキスト"],
        # One character other than a letter, a digit or a line end goes with the word after it.
        ["Hello", ",", " world", "!"],
        ["(word", ")"],
        ["_name", "_"],
        ["...", "word"],
        # Case: capitals, then small letters.
        ["camel", "Case", "HTTPServer"],
        ["ABC", " Def", " g"],
        ["ǅabcﬁn", "ÉTÉ"],
        ["e\u0301a", " Ñandú"],
        # Contractions.
        ["it's", " we'LL", " I'm", " they'd", "'ve"],
        ["don't", "'x"],
        ["don", "’t"],
        # Up to three digits.
        ["123", "456", "7"],
        [" ", "123"],
        ["v", "2", ".", "0"],
        ["٣٤½", "Ⅳ"],
        # White space: the last blank goes with the word, line ends together.
        ["a", "  ", " b"],
        ["a", "   "],
        ["a", "\tb"],
        ["x", "\n\n", "y"],
        ["x", " \n \n", "  ", " y"],
        ["x", ";\r\n\n", " y"],
        ["a", "\u3000\u3000", "\u3000b"],
        ["a", "\u00a0b"],
        # Emoji and other symbols.
        [" 😀👨\u200d👩\u200d👧!", "a"],
        ["🇫🇷❤\ufe0f"],
    ],
    ids=repr,
)
def test_pieces(pieces, expected):
    assert pieces("".join(expected)) == expected


@given(st.text())
def test_pieces_lose_nothing(text):
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tiktoken.PATTERN), "removed")
    # What no alternative of the pattern matches would be left over.
    assert splitter.pre_tokenize_str(text) == []


# ------------------------------------------------------------------ special tokens


def test_special_ids_follow_the_vocabulary():
    assert kimi.vocab_size == BASE + tiktoken.RESERVED
    assert (kimi.bos_id, kimi.pad_id) == (BASE, BASE + 255)
    assert kimi.eos_ids == (BASE + 1, BASE + 2)  # [EOS] and the end of a turn
    assert kimi.think_id is None and kimi.end_think_id is None
    thinking = family("kimi_k2_thinking")
    assert (thinking.think_id, thinking.end_think_id) == (BASE + 22, BASE + 23)


def test_every_reserved_id_has_a_token():
    names = {place: KIMI.get(place, f"<|reserved_token_{BASE + place}|>") for place in range(256)}
    assert kimi.encode("".join(names.values())) == [BASE + place for place in names]
    for place, text in names.items():
        assert kimi.decode([BASE + place]) == text
    assert not {i for i in kimi.encode("".join(names.values()), parse_special=False) if i >= BASE}


def test_only_special_tokens_are_skipped():
    ids = kimi.encode("[BOS]a<|im_end|><|tool_calls_section_begin|>")
    assert kimi.decode(ids, skip_special=True) == "a<|tool_calls_section_begin|>"
    assert kimi.token_lengths()[ids].tolist() == [0, 1, 0, 0]


def test_names_need_not_be_given(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token"):
        del config[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bare = Tokenizer.load(folder)
    assert (bare.bos_id, bare.eos_ids, bare.pad_id) == (BASE, (BASE + 1, BASE + 2), None)


def test_generation_config_adds_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [BASE + 9]}))
    assert Tokenizer.load(folder).eos_ids == (BASE + 1, BASE + 2, BASE + 9)


# ------------------------------------------------------------------ which folders


def test_a_moonlight_is_known_by_its_module_or_its_tokens(tmp_path):
    module = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    write_tiktoken(tmp_path, TOKENS, {0: "[BOS]", 1: "[EOS]"}, auto_map=module, pad_token=None)
    assert Tokenizer.load(tmp_path).eos_ids == (BASE + 1,)
    write_tiktoken(tmp_path, TOKENS, KIMI_THINKING, auto_map=None)
    assert Tokenizer.load(tmp_path).encode("ab") == kimi.encode("ab")


def test_other_vocabularies_are_refused(tmp_path):
    module = {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}
    write_tiktoken(tmp_path, TOKENS, {0: "[BOS]", 1: "[EOS]"}, auto_map=module)
    message = r"tiktoken\.model: nothing says how .*tokenization_other.*TikTokenConverter"
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_tokenizer_json_wins(folder):
    shutil.copy(TINY / "tokenizer.json", folder)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    assert Tokenizer.load(folder).vocab_size == 6144


def test_nothing_is_written(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Tokenizer.load(folder).encode("a")  # the Python file of the folder would raise
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_missing_config(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json: no such file; tiktoken"):
        Tokenizer.load(folder)


# ------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"QUI=", r"line 301: expected a token in base64, a blank and its rank, found b'QUI='"),
        (b"QUI= 5 6", "line 301: expected a token"),
        (b"Q*I= 300", "line 301: expected a token"),
        (b"QUI 300", "line 301: expected a token"),
        (b"QUI= x", "line 301: expected a token"),
        (b"QUI= -5", "line 301: expected a token"),
        (b"QUI= 1_0", "line 301: expected a token"),
        (b"= 300", "line 301: expected a token"),
        (b"\xff\xfe 300", "line 301: expected a token"),
        (b"enp6eno= 0", r"line 301: token b'zzzzz' or its rank 0 is that of line 1 too"),
        (base64.b64encode(TOKENS[7]) + b" 300", r"line 301: .* is that of line 8 too"),
        (b"enp6eno= 9999", rf"no token has rank 300: {BASE} tokens .* the largest is 9999"),
        (b"", rf"no token has rank 300: {BASE - 1} tokens .*\.\.{BASE - 2}, the largest"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    changed = [*lines(folder)[:300], line, *lines(folder)[301:]]
    (folder / "tiktoken.model").write_bytes(b"\n".join(changed))
    with pytest.raises(ValueError, match=rf"tiktoken\.model.*{message}"):
        Tokenizer.load(folder)


def test_bytes_that_are_no_tokens(tmp_path):
    write_tiktoken(tmp_path, TOKENS[1:])
    first = TOKENS[0][0]
    with pytest.raises(ValueError, match=rf"1 of the 256 bytes .* the first is {first:#04x}"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"")
    with pytest.raises(ValueError, match="256 of the 256 bytes are no tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"5": {"content": "x"}}, rf"has the id '5': .* {BASE} tokens, .*{BASE}\.\.{BASE + 255}"),
        ({str(BASE + 256): {"content": "x"}}, rf"has the id '{BASE + 256}'"),
        ({"x": {"content": "x"}}, "has the id 'x'"),
        ({str(BASE): {"content": 3}}, rf"{BASE}: expected the text of a token"),
        ({str(BASE): {"content": ""}}, rf"{BASE}: expected the text of a token"),
        ({str(BASE + i): {"content": "[X]"} for i in (0, 4)}, rf"{BASE + 4}: '\[X\]' is a token"),
        ({str(BASE): {"content": "q"}}, rf"{BASE}: 'q' is a token already"),
        ([1], r"must be an object, found \[1\]"),
    ],
)
def test_broken_special_tokens_are_named(folder, added, message):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))
    with pytest.raises(
        ValueError, match=rf"tokenizer_config\.json: added_tokens_decoder.*{message}"
    ):
        Tokenizer.load(folder)
