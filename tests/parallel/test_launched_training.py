"""`dskjax launch -n 2 -- train-mtp run`: two processes train, save, resume and export as one."""

import json
import re
import shutil

import numpy as np
import pytest

from dskjax.checkpoint import load_hf
from dskjax.params import named_leaves
from tests.train_mtp import toy

STEPS = 5


def losses(out) -> dict[int, list[float]]:
    """By step, what metrics.jsonl says last."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        row["step"]: [row["total_loss"], row["grad_norm"], *row["mtp_loss"]]
        for row in rows
        if "total_loss" in row
    }


@pytest.mark.full
def test_two_processes_train_and_go_on_like_one(dskjax, tmp_path):
    toy.write_trunk(tmp_path)
    sizes = {"--layers": 2, "--batch-size": 8, "--seq-len": 32, "--warmup": 2, "--steps": STEPS}
    often = {"--log-every": 1, "--save-every": 2, "--precision": "float32", "--mesh": "dp=4"}
    given = [x for pair in (sizes | often).items() for x in pair]

    def run(name: str, *before: object) -> str:
        """Trains into a folder; what it told."""
        options = [tmp_path / "trunk", "--data", tmp_path / "train.txt", "--out", tmp_path / name]
        code, _, told = dskjax(*before, "train-mtp", "run", *options, *given)
        assert code == 0, told
        return told

    launch = ("launch", "-n", 2, "--cpu-devices", 2, "--")
    run("one")
    want = losses(tmp_path / "one")
    assert sorted(want) == list(range(1, STEPS + 1))
    run("two", *launch)
    np.testing.assert_allclose(list(losses(tmp_path / "two").values()), list(want.values()), 1e-5)

    shutil.rmtree(tmp_path / "two" / "checkpoints" / str(STEPS))
    shutil.rmtree(tmp_path / "two" / "model")
    assert re.search("resumed at step 4", run("two", *launch))
    np.testing.assert_allclose(losses(tmp_path / "two")[STEPS], want[STEPS], 1e-5)
    one, two = (load_hf(tmp_path / name / "model")[0] for name in ("one", "two"))
    for (name, got), (_, wanted) in zip(named_leaves(two), named_leaves(one), strict=True):
        np.testing.assert_allclose(
            np.float32(got), np.float32(wanted), rtol=1e-2, atol=1e-5, err_msg=name
        )
