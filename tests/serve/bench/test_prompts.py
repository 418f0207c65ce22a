"""Files of prompts: what is read, and what is said about the rest."""

import pytest

from serve.bench.prompts import load_prompts, load_text

TURN = [{"role": "user", "content": "hi"}]


def test_json_lines(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "one", "id": 3}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n'
        '{"prompt": [1, 2]}\n{"text": "long text"}\n'
    )
    assert load_prompts(file, chars=4) == [
        {"prompt": "one"},
        {"messages": TURN},
        {"prompt": [1, 2]},
        {"prompt": "long"},
    ]


def test_documents_of_text(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("first document\x1e\nsecond\none\x1e\n\n\x1e\n")
    assert load_prompts(file, chars=8) == [{"prompt": "first do"}, {"prompt": "second\no"}]
    assert load_text(file) == "first document\n\nsecond\none"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("3", "line 2: expected"),
        ('{"prompt": ""}', "line 2: expected"),
        ('{"prompt": [1, true]}', "line 2: expected"),
        ('{"messages": []}', "line 2: expected"),
        ('{"question": "?"}', "line 2: expected"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, said):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        load_prompts(file, chars=100)


def test_files_without_prompts(tmp_path):
    file = tmp_path / "p.txt"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_prompts(file, chars=1)
    file.write_text(" \n\x1e\n")
    with pytest.raises(ValueError, match="no prompt"):
        load_prompts(file, chars=1)
    with pytest.raises(ValueError, match="no text"):
        load_text(file)
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="byte 2 is no UTF-8"):
        load_text(file)
    turns = tmp_path / "p.jsonl"
    turns.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(ValueError, match="a text is needed"):
        load_text(turns)
