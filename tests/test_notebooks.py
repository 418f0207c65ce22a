"""The notebook runs from top to bottom, finds what it says, and is committed as it ran."""

import base64
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import traitlets
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "notebooks" / "model_tour.ipynb"

# Runs in the notebook's own kernel, after its last cell.
FACTS = """
import sys

print(json.dumps({
    "python": sys.executable,
    "module": dskjax.__file__,
    "shares": share,
    "bits_per_byte": float(per_byte),
    "groups_used": groups_used,
    "load": both.sum(axis=1).tolist(),
    "shift": shift.tolist(),
    "latent_against_heads": difference,
    "reach": reach.tolist(),
    "absorbed_against_expanded": float(jnp.abs(absorbed - expanded).max()) / scale,
    "cache_against_none": float(jnp.abs(expanded - out.hidden[0]).max()) / scale,
    "times": times,
    "teacher_forced": float(teacher_forced),
    "agree_by_third": [float(agree[part].mean()) for part in thirds],
    "steps": [plain.stats.steps, stats.steps],
    "per_position": list(stats.per_position),
    "cost": {name: float(value) for name, value in cost.items()},
}))
"""


class OwnKernel(AsyncKernelManager):
    """The kernel of this interpreter, whatever kernels are installed elsewhere."""

    @traitlets.default("kernel_spec_manager")
    def _without_folders(self):
        return KernelSpecManager(parent=self, kernel_dirs=[])


def read() -> nbformat.NotebookNode:
    return nbformat.read(TOUR, as_version=4)


def text_of(cell) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def kinds(cell) -> list[tuple[str, ...]]:
    """What a cell shows, in order. How many pieces a stream comes in depends on the clock alone."""
    shown: list[tuple[str, ...]] = []
    for out in cell.outputs:
        kind = (out.output_type, out.get("name", ""), *sorted(out.get("data", ())))
        if kind[0] != "stream" or kind not in shown[-1:]:
            shown.append(kind)
    return shown


def words(text: str) -> list[str]:
    """A text without numbers, which differ in their last digits between machines, and marks."""
    return re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?|[«»]", "", text).split()


@pytest.fixture(scope="module")
def ran():
    """The notebook, executed by this Python on the CPU, with the facts as one more cell."""
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    client = NotebookClient(
        notebook,
        kernel_manager_class=OwnKernel,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(TOUR.parent)}},
    )
    client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return notebook


@pytest.fixture(scope="module")
def facts(ran):
    return json.loads(text_of(ran.cells[-1]))


def test_it_runs_this_source_tree(facts):
    assert facts["python"] == sys.executable
    assert Path(facts["module"]) == ROOT / "dskjax" / "__init__.py"


def test_routing(facts):
    assert facts["groups_used"] == 2  # topk_group
    assert facts["load"] == pytest.approx([1.0] * 4)
    assert all(0.1 < shift < 0.9 for shift in facts["shift"])  # experts tell code from prose


def test_latent_attention_is_attention(facts):
    assert 0 < facts["latent_against_heads"] < 1e-5
    assert 0 < facts["absorbed_against_expanded"] < 1e-5
    assert facts["cache_against_none"] < 1e-5
    assert facts["times"] == pytest.approx(128 * (192 + 128) / 576)  # DeepSeek-V3
    assert max(facts["reach"]) > 3 * min(facts["reach"])


def test_drafts(facts):
    unsure, _, sure = facts["agree_by_third"]
    assert 0.5 < facts["teacher_forced"] < 1 and unsure < sure
    plain, drafted = facts["steps"]
    assert plain == 16 * 48 and drafted < plain / 2
    kept = facts["per_position"]
    assert len(kept) == 4 and sorted(kept, reverse=True) == kept and kept[0] > 0.6


def test_quantisation_costs_little_and_int4_more(facts):
    assert 0 < facts["cost"]["fp8"] < facts["cost"]["w4afp8"] < 0.05


def test_shares_add_up_to_the_model(facts):
    assert sum(facts["shares"].values()) == 5_163_936 + 670_832
    assert 0.5 < facts["bits_per_byte"] < 1.5


def test_the_committed_outputs_are_of_one_run(ran):
    """Executed in order, without errors, small; the same words as a fresh run prints."""
    kept = [cell for cell in read().cells if cell.cell_type == "code"]
    fresh = [cell for cell in ran.cells if cell.cell_type == "code"][:-1]
    assert [cell.execution_count for cell in kept] == list(range(1, len(kept) + 1))
    size = 0
    for old, new in zip(kept, fresh, strict=True):
        assert kinds(old) == kinds(new)
        for out in old.outputs:
            assert out.output_type in ("stream", "display_data") and out.get("name") != "stderr"
            size += len(base64.b64decode(out.get("data", {}).get("image/png", "")))
        assert words(text_of(old)) == words(text_of(new))
    assert 20_000 < size <= 300_000
