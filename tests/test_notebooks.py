"""The notebooks run from top to bottom, find what they say, and are committed as they ran."""

import base64
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
import traitlets
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]

# Each runs in the notebook's own kernel, after its last cell.
TOUR = """
print(json.dumps({
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
HEADS = """
from train_mtp.heads.run import fingerprint

again = export_heads(out / "shared", out / "again", step=24)
redrafted = dskjax.generate(*dskjax.load(again, dtype="float32"), prompts, drafts=2, **options)
print(json.dumps({
    "differs": differs,
    "losses": {kind: [row["loss"] for row in rows[kind]] for kind in KINDS},
    "random": {kind: rows[kind][0]["mtp_agree"] for kind in KINDS},
    "trained": {kind: means[kind]["mtp_agree"].tolist() for kind in KINDS},
    "shipped": shipped["mtp_agree"],
    "modules": {kind: loaded[kind][1].mtp.num_nextn_predict_layers for kind in KINDS},
    "trunks": [fingerprint(weights) for weights in (params, *(loaded[kind][0] for kind in KINDS))],
    "same_tokens": [result.tokens == plain.tokens for result in (*drafted.values(), redrafted)],
    "steps": {"none": plain.stats.steps, **{n: r.stats.steps for n, r in drafted.items()}},
    "kept": {name: list(result.stats.per_position) for name, result in drafted.items()},
    "kept_again": list(redrafted.stats.per_position),
}))
"""
FACTS = {"model_tour": TOUR, "mtp_heads": HEADS}
WHERE = """
import json, sys, dskjax

print(json.dumps({"python": sys.executable, "module": dskjax.__file__}))
"""

every = pytest.mark.parametrize("ran", FACTS, indirect=True)
tour = pytest.mark.parametrize("ran", ["model_tour"], indirect=True)
heads = pytest.mark.parametrize("ran", ["mtp_heads"], indirect=True)


class OwnKernel(AsyncKernelManager):
    """The kernel of this interpreter, whatever kernels are installed elsewhere."""

    @traitlets.default("kernel_spec_manager")
    def _without_folders(self):
        return KernelSpecManager(parent=self, kernel_dirs=[])


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


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


class Ran(NamedTuple):
    """A notebook's code cells as committed and as executed here, and what the added cells found."""

    kept: list[nbformat.NotebookNode]
    fresh: list[nbformat.NotebookNode]
    where: dict[str, Any]
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def ran(request) -> Ran:
    """The notebook, executed by this Python on the CPU, with two cells more."""
    notebook = read(request.param)
    added = [nbformat.v4.new_code_cell(text) for text in (WHERE, FACTS[request.param])]
    kept = [cell for cell in read(request.param).cells if cell.cell_type == "code"]
    notebook.cells += added
    client = NotebookClient(
        notebook,
        kernel_manager_class=OwnKernel,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    where, facts = (json.loads(text_of(cell)) for cell in fresh[-2:])
    return Ran(kept, fresh[:-2], where, facts)


@pytest.fixture
def facts(ran):
    return ran.facts


@every
def test_it_runs_this_source_tree(ran):
    assert ran.where["python"] == sys.executable
    assert Path(ran.where["module"]) == ROOT / "dskjax" / "__init__.py"


@every
def test_the_committed_outputs_are_of_one_run(ran):
    """Executed in order, without errors, small; the same words as a fresh run prints."""
    assert [cell.execution_count for cell in ran.kept] == list(range(1, len(ran.kept) + 1))
    size = 0
    for old, new in zip(ran.kept, ran.fresh, strict=True):
        assert kinds(old) == kinds(new)
        for out in old.outputs:
            assert out.output_type in ("stream", "display_data") and out.get("name") != "stderr"
            size += len(base64.b64decode(out.get("data", {}).get("image/png", "")))
        assert words(text_of(old)) == words(text_of(new))
    assert 20_000 < size <= 300_000


@tour
def test_routing(facts):
    assert facts["groups_used"] == 2  # topk_group
    assert facts["load"] == pytest.approx([1.0] * 4)
    assert all(0.1 < shift < 0.9 for shift in facts["shift"])  # experts tell code from prose


@tour
def test_latent_attention_is_attention(facts):
    assert 0 < facts["latent_against_heads"] < 1e-5
    assert 0 < facts["absorbed_against_expanded"] < 1e-5
    assert facts["cache_against_none"] < 1e-5
    assert facts["times"] == pytest.approx(128 * (192 + 128) / 576)  # DeepSeek-V3
    assert max(facts["reach"]) > 3 * min(facts["reach"])


@tour
def test_drafts(facts):
    unsure, _, sure = facts["agree_by_third"]
    assert 0.5 < facts["teacher_forced"] < 1 and unsure < sure
    plain, drafted = facts["steps"]
    assert plain == 16 * 48 and drafted < plain / 2
    kept = facts["per_position"]
    assert len(kept) == 4 and sorted(kept, reverse=True) == kept and kept[0] > 0.6


@tour
def test_quantisation_costs_little_and_int4_more(facts):
    assert 0 < facts["cost"]["fp8"] < facts["cost"]["w4afp8"] < 0.05


@tour
def test_shares_add_up_to_the_model(facts):
    assert sum(facts["shares"].values()) == 5_163_936 + 670_832
    assert 0.5 < facts["bits_per_byte"] < 1.5


@heads
def test_the_mask_drawn_is_that_of_recycling(facts):
    assert 0 < facts["differs"]["shared"] < 1e-5
    assert facts["differs"]["independent"] > 1e-3


@heads
def test_heads_learn_from_nothing_and_not_yet_what_the_shipped_one_knows(facts):
    for kind, losses in facts["losses"].items():
        assert len(losses) == 24 and sum(losses[-8:]) / 8 < 0.7 * losses[0]
        for depth in (0, 1):
            random, trained = (facts[of][kind][depth] for of in ("random", "trained"))
            assert random < 0.03 and 0.08 < trained < facts["shipped"][depth]


@heads
def test_what_is_exported_is_the_trunk_and_its_heads(facts):
    assert facts["modules"] == {"independent": 2, "shared": 1}
    assert len(set(facts["trunks"])) == 1
    assert facts["kept_again"] == facts["kept"]["shared"]


@heads
def test_drafts_save_steps_and_change_no_token(facts):
    assert all(facts["same_tokens"]) and len(facts["same_tokens"]) == 5
    steps = facts["steps"]
    assert steps["none"] == 16 * 24
    assert steps["shipped"] < steps["shared"] < steps["shared, step 8"] < steps["none"]
    assert steps["shipped"] < steps["independent"] < steps["none"]
    for first, second in facts["kept"].values():
        assert first > second
