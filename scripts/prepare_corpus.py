#!/usr/bin/env python3
"""Lay out the public corpus as training and validation inputs.

    python scripts/prepare_corpus.py --data CORPUS --out PREPARED --tokenizer examples/tiny-deepseek

CORPUS holds `train-*.txt.xz`, `valid.txt.xz` and `test.txt.xz` (documents, each ended by
"\\x1e\\n"), `docs.jsonl.xz` (split, kind, byte offset and length of each document) and
`reasoning/{train,valid,test}.jsonl.xz`. PREPARED gets

    train/train-*.txt.xz, train/reasoning.jsonl.xz
    valid/valid-<kind>.txt.xz, valid/valid-reasoning.jsonl.xz     and the same for test
    corpus.json                                                   counts per file

where a kind is one of code-python, code-other, tech-prose, prose, math, so that bits per byte can
be told by kind. Reasoning rows of the task gsm_symbolic are left out: the licence of its templates
is not clear. With --tokenizer, tokens are counted too, bos and eos included.
"""

import argparse
import json
import lzma
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dskjax.document_tokens import tokenise
from dskjax.documents import SEPARATOR, iter_file, iter_records
from dskjax.tokenizer import Tokenizer

KINDS = ("code-python", "code-other", "tech-prose", "prose", "math")
DROPPED_TASKS = {"gsm_symbolic"}


def split_by_kind(text: bytes, index: Iterable[dict[str, Any]], where: str) -> dict[str, bytes]:
    """The documents of each kind, with their separators; raises unless the index fits the text."""
    parts: dict[str, list[bytes]] = defaultdict(list)
    expected = 0
    for row in index:
        start, end = row["offset"], row["offset"] + row["bytes"]
        if row["kind"] not in KINDS:
            raise ValueError(
                f"{where}: {row['path']}: unknown kind {row['kind']!r}, not in {KINDS}"
            )
        if start != expected or text[end : end + len(SEPARATOR)] != SEPARATOR:
            raise ValueError(
                f"{where}: {row['path']}: the index says bytes {start}..{end}, but no document "
                f"starts and ends there (the one before ended at {expected})"
            )
        expected = end + len(SEPARATOR)
        parts[row["kind"]].append(text[start:expected])
    if expected != len(text):
        raise ValueError(f"{where}: {len(text) - expected} bytes are not in the index")
    return {kind: b"".join(documents) for kind, documents in parts.items()}


def keep_reasoning(source: Path, target: Path) -> int:
    """Copies the rows whose task may be used; returns how many were left out."""
    dropped = 0
    with lzma.open(target, "wt", encoding="utf-8") as file:
        for number, row in iter_records(source):
            if "task" not in row:
                raise ValueError(f"{source}:{number}: expected a field named task")
            if row["task"] in DROPPED_TASKS:
                dropped += 1
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return dropped


def count(path: Path, tokenizer: Tokenizer | None) -> dict[str, int]:
    """Documents, bytes of text and, with a tokenizer, tokens of one file."""
    if tokenizer is None:
        if path.suffixes[-2] == ".jsonl":
            return {"documents": sum(1 for _ in iter_records(path))}
        sizes = [len(d.text.encode()) for d in iter_file(path)]
        return {"documents": len(sizes), "bytes": sum(sizes)}
    documents = n_bytes = tokens = 0
    for document, ids, _ in tokenise(iter_file(path, tokenizer=tokenizer), tokenizer):
        documents += 1
        n_bytes += len(document.text.encode())
        tokens += len(ids)
    return {"documents": documents, "bytes": n_bytes, "tokens": tokens}


def prepare(data: Path, out: Path) -> list[Path]:
    """Writes everything but the counts; returns the files."""
    index: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, row in iter_records(data / "docs.jsonl.xz"):
        index[row["split"]].append(row)
    sources = sorted(data.glob("train-*.txt.xz"))
    if not sources:
        raise FileNotFoundError(f"{data}: expected files named train-*.txt.xz")
    for split in ("train", "valid", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
    files = [Path(shutil.copyfile(s, out / "train" / s.name)) for s in sources]
    for split in ("valid", "test"):
        source = data / f"{split}.txt.xz"
        with lzma.open(source) as file:
            kinds = split_by_kind(file.read(), index[split], str(source))
        for kind in filter(kinds.__contains__, KINDS):
            files.append(out / split / f"{split}-{kind}.txt.xz")
            files[-1].write_bytes(lzma.compress(kinds[kind]))
    for split, name in (("train", ""), ("valid", "valid-"), ("test", "test-")):
        files.append(out / split / f"{name}reasoning.jsonl.xz")
        dropped = keep_reasoning(data / "reasoning" / f"{split}.jsonl.xz", files[-1])
        print(f"{files[-1]}: left out {dropped} rows of {', '.join(sorted(DROPPED_TASKS))}")
    return files


def main() -> None:
    """Parses the command line, writes the files, prints the counts."""
    parser = argparse.ArgumentParser(description="Lay out the public corpus for training.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, help="checkpoint folder: also count tokens")
    args = parser.parse_args()
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    files = prepare(args.data, args.out)
    counts = {str(f.relative_to(args.out)): count(f, tokenizer) for f in files}
    (args.out / "corpus.json").write_text(json.dumps(counts, indent=2) + "\n")
    table = Table("file", "documents", "bytes", "tokens", "bytes/token")
    table.columns[0].no_wrap = True
    for name, c in counts.items():
        rate = f"{c['bytes'] / c['tokens']:.3f}" if "tokens" in c else ""
        numbers = (f"{c[k]:,}" if k in c else "" for k in ("documents", "bytes", "tokens"))
        table.add_row(name, *numbers, rate)
    Console().print(table)


if __name__ == "__main__":
    main()
