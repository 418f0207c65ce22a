"""Reading documents from files, and the script that lays out the public corpus."""

import dataclasses
import importlib.util
import json
import lzma
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax import documents
from dskjax.documents import iter_documents, iter_records, list_files
from dskjax.extras import require
from dskjax.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-deepseek"
tiny = Tokenizer.load(TINY)


def texts(*paths, tokenizer=tiny):
    return [d.text for d in iter_documents(paths, tokenizer=tokenizer)]


def write_lines(path: Path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# ------------------------------------------------------------------ documents


def test_text_file_is_one_document_or_many(tmp_path):
    one, many, packed = tmp_path / "one.txt", tmp_path / "many.txt", tmp_path / "packed.txt.xz"
    one.write_text("a\n\x1e b\n")  # the separator is \x1e and a newline
    many.write_text("a\n\x1e\n\x1e\n  \n\x1e\nb\n\x1e\nlast")  # blank ones are left out
    packed.write_bytes(lzma.compress("é\n\x1e\nü\n\x1e\n".encode()))
    assert texts(one) == ["a\n\x1e b\n"]
    assert texts(many) == ["a\n", "b\n", "last"]
    assert texts(packed, one) == ["é\n", "ü\n", "a\n\x1e b\n"]


@given(
    st.lists(st.text(alphabet="ab\n\x1eé", max_size=12), max_size=6),
    st.integers(1, 9),
    st.booleans(),
)
def test_chunk_borders_do_not_show(tmp_path_factory, pieces, chunk, ended):
    content = "\x1e\n".join(pieces) + ("\x1e\n" if ended else "")
    path = tmp_path_factory.mktemp("chunks") / "a.txt"
    path.write_bytes(content.encode())
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_CHUNK", chunk)
        found = [d.text for d in documents.iter_file(path, on_read=read.append)]
    assert found == [p for p in content.split("\x1e\n") if p.strip()]
    assert sum(read) == len(content.encode())


def test_json_lines(tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", {"text": "x", "id": 3}, {"text": " "}, {"text": "y"})
    packed = tmp_path / "b.jsonl.xz"
    packed.write_bytes(lzma.compress(b'\n{"text": "z"}\n\n'))
    assert texts(plain, packed, tokenizer=None) == ["x", "y", "z"]
    assert [n for n, _ in iter_records(packed)] == [2]


def test_questions_are_rendered_with_their_thinking(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"question": "q", "thinking": "hm", "answer": "a", "task": "gcd"},
        {"question": "q", "answer": "a"},
    )
    found = list(iter_documents([path], tokenizer=tiny))
    assert found[0].text == f"{BOS}{USER}q{ASSISTANT}{THINK}hm{END_THINK}a"
    assert found[1].text == f"{BOS}{USER}q{ASSISTANT}{END_THINK}a{EOS}"
    assert all(d.rendered for d in found) and found[1].source == f"{path}:2"


def test_messages_are_rendered_and_only_the_last_answer_thinks(tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": f"{THINK}old{END_THINK}a"},
        {"role": "user", "content": "r"},
    ]
    by_content = [*turns, {"role": "assistant", "content": f"{THINK}new{END_THINK}b"}]
    by_field = [*turns, {"role": "assistant", "content": "b", "reasoning_content": "new"}]
    path = write_lines(
        tmp_path / "a.jsonl", *({"messages": m} for m in (by_content, by_field, turns))
    )
    head = f"{BOS}{USER}q{ASSISTANT}{END_THINK}a{EOS}{USER}r"
    whole = f"{head}{ASSISTANT}{THINK}new{END_THINK}b"
    assert texts(path) == [whole, whole, head]


def test_a_template_that_leaves_the_think_tag_to_the_model(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}:")
    row = {"question": "q", "thinking": "hm", "answer": "a"}
    path = write_lines(tmp_path / "a.jsonl", row)
    assert texts(path, tokenizer=Tokenizer.load(tmp_path)) == [f"q:{THINK}hm{END_THINK}a"]


def test_folders_are_walked_in_sorted_order(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "c.txt", "a/readme.md", "a/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "json"}' if name.endswith("jsonl") else name)
    assert texts(tmp_path) == ["json", "b/a.txt", "b/z.txt", "c.txt"]
    assert texts(tmp_path / "c.txt", tmp_path / "b") == ["c.txt", "b/a.txt", "b/z.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\x1e\nde\xfff", r"a\.txt: not UTF-8 at byte 7 \(invalid start byte\)"),
        ("a.txt", b" \n\x1e\n", "all documents are blank in .*a.txt"),
        ("a.txt", b"", "all documents are blank"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz: damaged or truncated xz"),
        ("a.txt.xz", lzma.compress(b"abc" * 99)[:-20], r"a\.txt\.xz: damaged or truncated xz"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: expected a JSON object a line"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: text must be text, found int"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: not valid Unicode"),
        ("a.jsonl", b'\n{"kind": 1, "body": 2}', r":2: expected the fields .*; found body, kind"),
        ("a.jsonl", b'{"question": "q", "answer": 4}', r":1: answer must be text, found int"),
        ("a.jsonl", b'{"messages": ["q"]}', r":1: messages must be a list of objects"),
        ("a.jsonl", b'{"messages": []}', r":1: a conversation needs at least one message"),
        ("a.jsonl", b'{"messages": [{"role": "elf", "content": ""}]}', r":1: .*unknown role elf"),
        ("a.csv", b"a", r"a\.csv: expected a name ending in \.txt"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="list of files and folders is empty"):
        list_files([])
    with pytest.raises(ValueError, match="no file in this folder ends in"):
        list_files([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list_files([tmp_path / "x.txt"])
    path = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a conversation needs a tokenizer"):
        texts(path, tokenizer=None)


# ------------------------------------------------------------------ Parquet


@pytest.fixture
def write_parquet(tmp_path):
    """Writes rows, two a row group."""
    why = "pyarrow is not installed (pip install 'dskjax[parquet]')"
    pa = pytest.importorskip("pyarrow", reason=why)
    pq = pytest.importorskip("pyarrow.parquet", reason=why)

    def write(name, rows, schema=None):
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
        return path

    return write


ROWS = [
    {"text": "x", "kind": "code", "id": 3},
    {"text": " "},
    {"prompt": "a", "completion": "b"},
    {"question": "q", "thinking": "hm", "answer": "a"},
    {"question": "q", "answer": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "b", "reasoning_content": "new"},
        ]
    },
]


def test_parquet_holds_what_json_lines_hold(tmp_path, write_parquet):
    """One table of all kinds of records: what a row lacks is null, in its messages too."""
    columns = {name: None for row in ROWS for name in row}
    table = write_parquet("a.parquet", [{**columns, **row} for row in ROWS])
    lines = write_lines(tmp_path / "a.jsonl", *ROWS)
    read: list[int] = []
    found = list(documents.iter_file(table, tokenizer=tiny, on_read=read.append))
    expected = list(iter_documents([lines], tokenizer=tiny))
    assert len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.source == other.source.replace(".jsonl", ".parquet")
        assert dataclasses.replace(one, source="") == dataclasses.replace(other, source="")
    assert sum(read) == table.stat().st_size and len(read) == 4 + 1  # row groups, the rest
    assert texts(tmp_path) == 2 * [d.text for d in expected]  # a folder with both


def test_row_groups_are_read_one_at_a_time(write_parquet):
    path = write_parquet("a.parquet", [{"text": letter * 99} for letter in "abcd"])
    parquet = pytest.importorskip("pyarrow.parquet")
    second = parquet.read_metadata(path).row_group(1).column(0)
    broken = bytearray(path.read_bytes())
    start = second.dictionary_page_offset
    broken[start : start + 8] = b"\xff" * 8
    path.write_bytes(broken)
    read: list[int] = []
    found = documents.iter_file(path, on_read=read.append)
    assert next(found).text == "a" * 99 and read == []
    assert next(found).text == "b" * 99
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as Parquet after row 2"):
        next(found)
    assert len(read) == 1


def test_other_columns_are_not_read(write_parquet):
    path = write_parquet("a.parquet", [{"text": f"t{n}", "vector": "v" * 99} for n in range(3)])
    path.write_bytes(path.read_bytes().replace(b"v" * 99, b"\xff" * 99))
    assert [row for _, row in iter_records(path)] == [{"text": f"t{n}"} for n in range(3)]


def test_bad_parquet_is_named(tmp_path, write_parquet):
    import pyarrow as pa

    bare = pa.schema([("text", pa.binary())])
    for rows, schema, message in (
        (
            [{"title": "a", "body": "b"}],
            None,
            r"\.parquet:1: expected the fields .*; found body, title",
        ),
        ([{"text": "a"}, {"text": None}], None, r"\.parquet:2: expected the fields"),
        (
            [{"text": "a"}, {"text": "b"}, {"text": b"c"}],
            bare,
            r":1: text must be text, found bytes",
        ),
        ([{"text": " "}], None, r"all documents are blank in .*a\.parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            texts(write_parquet("a.parquet", rows, schema))
    (tmp_path / "b.parquet").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as Parquet after row 0"):
        texts(tmp_path / "b.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    """Before anything is read: the files in front may be large."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.parquet").write_bytes(b"")
    message = r"b\.parquet: pyarrow is not installed.*pip install 'dskjax\[parquet\]'"
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)
    with pytest.raises(ValueError, match=message):
        next(iter_records(tmp_path / "b.parquet"))


def test_a_broken_package_is_not_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        require("pyarrow", "a.parquet")


# ------------------------------------------------------------------ the corpus script


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "prepare_corpus.py"
    spec = importlib.util.spec_from_file_location("prepare_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def raw(tmp_path):
    """A corpus of the public layout."""
    folder = tmp_path / "raw"
    (folder / "reasoning").mkdir(parents=True)
    index = []
    for split, kinds in (
        ("train", ["prose"]),
        ("valid", ["math", "prose", "math"]),
        ("test", ["code-python"]),
    ):
        content = b""
        for n, kind in enumerate(kinds):
            text = f"{split} {kind} é {n}\n".encode()
            row = {"split": split, "kind": kind, "path": f"p{n}"}
            index.append({**row, "offset": len(content), "bytes": len(text)})
            content += text + b"\x1e\n"
        name = "train-00.txt.xz" if split == "train" else f"{split}.txt.xz"
        (folder / name).write_bytes(lzma.compress(content))
        rows = [
            {"task": task, "question": "q", "thinking": "t", "answer": "a"}
            for task in ("gsm_symbolic", "gcd", "lcm")
        ]
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / "reasoning" / f"{split}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    lines = "".join(json.dumps(r) + "\n" for r in index)
    (folder / "docs.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


def test_corpus_is_split_by_kind_and_loses_gsm(script, raw, tmp_path):
    out = tmp_path / "out"
    files = script.prepare(raw, out)
    assert sorted(str(f.relative_to(out)) for f in files) == [
        "test/test-code-python.txt.xz",
        "test/test-reasoning.jsonl.xz",
        "train/reasoning.jsonl.xz",
        "train/train-00.txt.xz",
        "valid/valid-math.txt.xz",
        "valid/valid-prose.txt.xz",
        "valid/valid-reasoning.jsonl.xz",
    ]
    assert texts(out / "valid" / "valid-math.txt.xz") == ["valid math é 0\n", "valid math é 2\n"]
    for path in list_files([out]):
        if path.name.endswith("reasoning.jsonl.xz"):
            assert [row["task"] for _, row in iter_records(path)] == ["gcd", "lcm"]
    assert len(texts(out / "train")) == 3
    assert script.count(out / "valid" / "valid-math.txt.xz", None) == {"documents": 2, "bytes": 32}
    counted = script.count(out / "train" / "reasoning.jsonl.xz", tiny)
    assert counted["documents"] == 2 and counted["tokens"] == 2 * 9


def test_an_index_that_does_not_fit_is_refused(script, raw, tmp_path):
    with lzma.open(raw / "valid.txt.xz") as file:
        content = file.read()
    (raw / "valid.txt.xz").write_bytes(lzma.compress(b"x" + content))
    with pytest.raises(ValueError, match=r"valid\.txt\.xz: p0: the index says bytes 0\.\.16"):
        script.prepare(raw, tmp_path / "out")
    (raw / "valid.txt.xz").write_bytes(lzma.compress(content + b"more"))
    with pytest.raises(ValueError, match="4 bytes are not in the index"):
        script.prepare(raw, tmp_path / "out")
