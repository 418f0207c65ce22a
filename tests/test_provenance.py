"""Where a result comes from."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dskjax import provenance

FILE = Path(provenance.__file__)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Puts a copy of the module where a test wants it, in a repository of its own."""

    def place(folder: str) -> Path:
        target = tmp_path / folder / FILE.name
        target.parent.mkdir(parents=True)
        shutil.copy(FILE, target)
        git(tmp_path, "init", "--quiet")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "--message", "all")
        monkeypatch.setattr(provenance, "__file__", str(target))
        return tmp_path

    return place


def test_the_commit_and_whether_it_was_changed(copied):
    root = copied("dskjax")
    commit = git(root, "rev-parse", "HEAD")
    assert provenance.source_commit() == commit
    (root / "dskjax" / FILE.name).write_text("")
    assert provenance.source_commit() == commit + "+"


def test_an_installed_copy_has_no_commit(copied):
    """The repository around a virtual environment is another project's."""
    copied(".venv/lib/site-packages/dskjax")
    assert provenance.source_commit() is None


def test_versions_and_devices():
    assert {"jax", "numpy", "python"} <= provenance.versions().keys()
    assert provenance.describe_devices()
