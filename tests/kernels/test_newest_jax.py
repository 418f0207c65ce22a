"""Every kernel lowers for CUDA with the newest JAX that pyproject.toml allows, at every benchmarked
shape; `requirements/` pins an older one.
"""

import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


def newest(folder):
    """A Python with that JAX, and this environment's packages for all else."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = (need for need in project["dependencies"] if need.startswith("jax>"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own
    return python


@pytest.mark.full
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="lowers on a CPU")
def test_kernels_lower(tmp_path):
    python = newest(tmp_path / "venv")
    asked = "import jax; print(jax.__file__, jax.__version_info__ >= (0, 12))"
    told = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True)
    assert told.stdout.startswith(str(tmp_path)) and told.stdout.endswith("True\n")
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--full", "-k", "lower"]
    here = ["--ignore", __file__, "tests/kernels"]
    done = subprocess.run(tests + here, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "lowers_for_cuda" in done.stdout
