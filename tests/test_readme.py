"""The README's example runs as printed and prints what the README says."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.kernel_report import tables

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "benchmarks" / "results").glob("kernels-*.json"))


def test_the_python_example_prints_what_the_readme_says(monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert found, "README.md has no python block followed by its output"
    monkeypatch.chdir(ROOT)
    exec(compile(found[1], "README.md", "exec"), {})
    assert capsys.readouterr().out == found[2]


def test_every_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:benchmarks|examples|tests|dskjax|scripts)/[\w./-]+)`", text)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_the_kernels_tables_are_those_of_the_result_files(path):
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert tables(json.loads(path.read_text())) in text
