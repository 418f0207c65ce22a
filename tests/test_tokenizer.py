"""The tokenizer wrapper, the small model's tokenizer, chat templates and streaming text."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dskjax.tokenizer import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    THINK,
    USER,
    IncrementalDecoder,
    Tokenizer,
)

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-deepseek"
CODE = "def f(x):\n    if x:\n        return 12345\n\n    # naïve café 😀\n    return None\n"
tiny = Tokenizer.load(TINY)
library = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))  # the oracle


@pytest.fixture
def folder(tmp_path):
    """A copy of the small model's tokenizer to damage."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ ids


def test_tiny_tokenizer_has_the_deepseek_specials():
    assert (tiny.vocab_size, tiny.bos_id, tiny.eos_ids, tiny.pad_id) == (6144, 0, (1,), 2)
    assert (tiny.user_id, tiny.assistant_id) == (6140, 6141)
    assert (tiny.think_id, tiny.end_think_id) == (6142, 6143)
    assert (TINY / "tokenizer.json").stat().st_size < 450_000


def test_special_ids_follow_the_file_not_constants(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["id"] = {6142: 6143, 6143: 6142}.get(token["id"], token["id"])
    # The library numbers added tokens in the order of the list.
    spec["added_tokens"].sort(key=lambda t: t["id"])
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != USER]
    for token in spec["added_tokens"][3:]:
        token["id"] -= 1
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    moved = Tokenizer.load(folder)
    assert (moved.assistant_id, moved.end_think_id, moved.think_id) == (6140, 6141, 6142)
    assert moved.user_id is None
    assert moved.encode(f"{THINK}{END_THINK}") == [6142, 6141]


def test_names_default_to_deepseeks_without_a_config(folder):
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.load(folder)
    assert (bare.bos_id, bare.eos_ids, bare.chat_template) == (0, (1,), None)


def test_generation_config_adds_end_tokens(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 6140]}')
    assert Tokenizer.load(folder).eos_ids == (1, 6140)
    (folder / "generation_config.json").write_text('{"eos_token_id": 6140}')
    assert Tokenizer.load(folder).eos_ids == (1, 6140)


def test_serialised_added_token_in_the_config(folder):
    edit(folder / "tokenizer_config.json", eos_token={"content": ASSISTANT, "special": True})
    assert Tokenizer.load(folder).eos_ids == (6141,)


# ------------------------------------------------------------------ encode and decode


def test_bos_only_when_asked():
    assert tiny.encode("hello") == library.encode("hello", add_special_tokens=False).ids
    assert tiny.encode("hello", bos=True) == [0, *tiny.encode("hello")]
    assert tiny.encode(BOS + "hello") == [0, *tiny.encode("hello")]


@given(st.text())
def test_round_trip(text):
    assert tiny.decode(tiny.encode(text, parse_special=False)) == text


@given(st.lists(st.integers(0, tiny.vocab_size - 1)), st.booleans())
def test_decode_agrees_with_the_library(ids, skip_special):
    assert tiny.decode(ids, skip_special=skip_special) == library.decode(ids, skip_special)


def test_skipping_special_tokens_keeps_the_thinking_tags():
    text = f"{BOS}{USER}q{ASSISTANT}{THINK}hm{END_THINK}a{EOS}"
    shown = tiny.decode(tiny.encode(text), skip_special=True)
    assert shown == f"{USER}q{ASSISTANT}{THINK}hm{END_THINK}a"


def test_special_tokens_in_untrusted_text_stay_text():
    text = f"{EOS}{THINK}{USER} and {BOS}"
    ids = tiny.encode(text, parse_special=False)
    assert not set(ids) & {0, 1, 2, 6140, 6141, 6142, 6143}
    assert tiny.decode(ids) == text
    assert tiny.encode(text)[:3] == [1, 6142, 6140]


def test_python_indentation_is_one_token():
    pieces = [tiny.decode([i]) for i in tiny.encode(CODE)]
    assert pieces[:6] == ["def", " f", "(x", "):\n", "   ", " if"]  # the word takes the last space
    assert "       " in pieces
    for n in (2, 3, 4, 7, 8, 11, 12, 15, 16, 20):
        assert len(tiny.encode(" " * n)) == 1, n
    assert all(len(p.strip()) <= 3 for p in pieces if p.strip().isdigit())


def test_token_lengths_sum_to_the_bytes_of_the_text():
    lengths = tiny.token_lengths()
    assert lengths.shape == (6144,) and lengths[[0, 1, 2, 6140, 6143]].sum() == 0
    assert lengths[tiny.encode(CODE, bos=True)].sum() == len(CODE.encode())


def test_ids_out_of_range():
    for bad in (-1, 6144):
        with pytest.raises(ValueError, match=rf"token id {bad} is out of range: .* ids 0\.\.6143"):
            tiny.decode([5, bad])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="not valid Unicode"):
        tiny.encode("a\ud800")


def test_settings_of_the_last_user_cut_and_pad_nothing(folder):
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.enable_truncation(2)
    changed.enable_padding(length=9)
    changed.save(str(folder / "tokenizer.json"))
    assert len(changed.encode(CODE).ids) == 9
    for parse_special in (True, False):
        ids = Tokenizer.load(folder).encode(CODE, parse_special=parse_special)
        assert ids == tiny.encode(CODE)


# ------------------------------------------------------------------ streaming


def pieces_of(decoder, ids):
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@given(st.lists(st.integers(0, tiny.vocab_size - 1)), st.booleans())
def test_streamed_pieces_join_to_the_decoded_text(ids, skip_special):
    decoder = IncrementalDecoder(tiny, skip_special=skip_special)
    assert "".join(pieces_of(decoder, ids)) == tiny.decode(ids, skip_special=skip_special)


@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_no_broken_character_is_ever_shown(text):
    ids = tiny.encode(text, parse_special=False)
    pieces = pieces_of(IncrementalDecoder(tiny), ids)
    assert not any("\ufffd" in p for p in pieces) and "".join(pieces) == text


def test_a_character_of_many_tokens_comes_when_complete():
    ids = tiny.encode("😀")
    assert len(ids) > 1
    assert pieces_of(IncrementalDecoder(tiny), ids) == [""] * (len(ids) - 1) + ["😀", ""]
    # The test sees a decoder that does not hold back.
    assert "\ufffd" in "".join(tiny.decode([i]) for i in ids)


def test_an_unfinished_character_ends_as_a_replacement_and_the_stream_restarts():
    decoder = IncrementalDecoder(tiny)
    ids = tiny.encode("😀")
    assert decoder.push(*ids[:-1]) == "" and decoder.finish() == "\ufffd"
    assert decoder.push(*ids) == "😀"


def test_an_unknown_id_leaves_the_stream_as_it_was():
    decoder = IncrementalDecoder(tiny)
    first, *rest = tiny.encode("😀")
    decoder.push(first)
    with pytest.raises(ValueError, match="out of range"):
        decoder.push(*rest, 9999)
    assert decoder.push(*rest) == "😀"


# ------------------------------------------------------------------ chat template

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 1+1?\n"},
    {"role": "assistant", "content": f"{THINK}two{END_THINK}2"},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "3?"}]},
]
HISTORY = f"{BOS}Be brief.{USER} 1+1?\n{ASSISTANT}{END_THINK}2{EOS}{USER}and 3?"


@pytest.mark.parametrize(
    ("thinking", "end"),
    [(None, ASSISTANT + END_THINK), (False, ASSISTANT + END_THINK), (True, ASSISTANT + THINK)],
)
def test_v31_template(thinking, end):
    assert tiny.apply_chat_template(CHAT, thinking=thinking) == HISTORY + end


def test_v31_template_without_generation_prompt():
    assert tiny.apply_chat_template(CHAT, add_generation_prompt=False) == HISTORY
    done = tiny.apply_chat_template(CHAT[:3])
    assert done.endswith(f"{END_THINK}2{EOS}")  # nothing to answer
    two = [CHAT[0], {"role": "system", "content": "Really."}, CHAT[1]]
    assert tiny.apply_chat_template(two).startswith(f"{BOS}Be brief.\n\nReally.{USER}")


def test_the_prompt_encodes_to_special_ids():
    ids = tiny.encode(tiny.apply_chat_template([{"role": "user", "content": "q"}], thinking=True))
    assert ids == [0, 6140, *tiny.encode("q"), 6141, 6142]


def test_template_file_wins_and_named_default_is_found(folder):
    edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}],
    )
    assert Tokenizer.load(folder).apply_chat_template(CHAT) == "d"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages|length }}{{ tools }}")
    assert Tokenizer.load(folder).apply_chat_template(CHAT) == f"{BOS}4None"


def test_the_extras_templates_rely_on(folder):
    (folder / "chat_template.jinja").write_text(
        "{% set ns = namespace(n=0) %}\n{% for m in messages %}\n"
        "  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% set ns.n = ns.n + 1 %}{{ m.content is none }}{{ m | tojson }}{% endfor %}\n"
        "{{ ns.n }}{{ extra }}{{ strftime_now('%%') }}"
    )
    tokenizer = Tokenizer.load(folder)
    call = {"role": "assistant", "content": None, "tool_calls": ["é<"]}
    text = tokenizer.apply_chat_template([CHAT[0], call], extra="!")
    expected = '{"role": "assistant", "content": null, "tool_calls": ["é<"]}'
    assert text == f"True{expected}1!%"
    assert tiny.supports_thinking and not tokenizer.supports_thinking


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused: roles must alternate"),
        ("{% if %}", "chat template line 1"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refused: .*unsafe"),
    ],
)
def test_template_failures_are_named(folder, template, message):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder).apply_chat_template(CHAT)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], r"messages\[0\]: expected an object with a role"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\]: content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"only text parts"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
    ],
)
def test_bad_conversations_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        tiny.apply_chat_template(messages)


def test_no_chat_template(folder):
    edit(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(folder).apply_chat_template(CHAT)


# ------------------------------------------------------------------ broken files


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file.* tiktoken\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', r"tokenizer\.json: malformed JSON: .*line 1 column"),
        ("tokenizer.json", b'{"a": "\xff"}', r"tokenizer\.json: not UTF-8 at byte 7"),
        ("tokenizer.json", b"[]", "expected a JSON object, found list"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a tokenizer"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: malformed JSON"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token '<end>' is not in the voc"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token: expected the text of a token"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be text"),
        ("tokenizer_config.json", b'{"chat_template": []}', "no entry named default"),
        ("generation_config.json", b'{"eos_token_id": "a"}', "must be an integer or a list"),
        ("generation_config.json", b'{"eos_token_id": 9999}', "9999 is out of range"),
    ],
)
def test_broken_files_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder)


def test_other_kinds_of_tokenizer_are_refused(folder):
    edit(folder / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(ValueError, match="byte-level BPE .* found decoder .*WordPiece"):
        Tokenizer.load(folder)


# ------------------------------------------------------------------ the training script


def test_training_script_makes_a_tokenizer_of_the_same_shape(tmp_path):
    module = script("train_tokenizer")
    text = tmp_path / "text.txt"
    text.write_text(CODE * 50 + "\x1e\n" + "The quick brown fox.\n" * 50 + "\x1e\n")
    rows = [
        {"task": task, "question": word, "thinking": word, "answer": word}
        for task, word in (("gsm_symbolic", "puppies" * 30), ("gcd", "zebras " * 30))
    ]
    reasoning = tmp_path / "rows.jsonl"
    reasoning.write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = list(module.sample(text, 10_000, reasoning, 10_000))
    assert len(texts) == 3 and "puppies" not in "".join(texts)
    module.write(module.train(iter(texts), 300), tmp_path)
    small = Tokenizer.load(tmp_path)
    assert (small.vocab_size, small.bos_id, small.eos_ids, small.pad_id) == (300, 0, (1,), 2)
    assert (small.user_id, small.assistant_id, small.think_id, small.end_think_id) == (
        296,
        297,
        298,
        299,
    )
    assert small.decode(small.encode(CODE)) == CODE
    assert small.chat_template == tiny.chat_template
    ours, theirs = (json.loads((d / "tokenizer.json").read_text()) for d in (tmp_path, TINY))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    with pytest.raises(ValueError, match="too little text"):
        module.train(iter(["a"]), 300)
