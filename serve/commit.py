"""Which state of the source a result was measured with."""

import shutil
import subprocess
from pathlib import Path


def source_commit() -> str | None:
    """Commit of this source tree, with "+" if it had changes; None outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str | None:
        done = subprocess.run(
            [git, *words], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")
