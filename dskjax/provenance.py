"""Where a result comes from: the state of the source, the versions and the device."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


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

    if ask("rev-parse", "--show-prefix") != f"{Path(__file__).parent.name}/":
        return None  # an installed copy, inside a repository of something else
    commit = ask("rev-parse", "HEAD")
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**found, "python": platform.python_version()}


def describe_devices() -> str:
    """Number and kind, for example "1 x NVIDIA H100 80GB HBM3" or "2 CPU cores, x86_64"."""
    if jax.default_backend() == "cpu":
        return f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
