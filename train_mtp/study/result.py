"""What a study measured, as one JSON file that is written anew after each variant.

{"command": .., "seconds": .., "commit": .., "device": .., "versions": ..,
 "trunk": {"sha256": .., "parameters": .., "validation": ..}, "baseline": NAME,
 "settings": {..}, "evaluation": {.., "prompts": {KIND: COUNT}},
 "data_sets": {NAME: {"files": [..], "documents": .., "tokens": .., "scored": ..}},
 "skipped": [NAME, ..],
 "rows": [{"variant": NAME, "seed": .., "data": NAME, "acceptance": [..], ..}, ..]}

`scored` counts the tokens that are learnt: all of a text, of a record with a prompt the rest.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskjax.params import Params, count
from dskjax.provenance import describe_devices, source_commit, versions
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.run import fingerprint
from train_mtp.metrics import finite
from train_mtp.study.evaluate import Evaluation, Prompts
from train_mtp.study.train import Trainee
from train_mtp.study.variants import FIELDS, Table, Variant

RESULT = "study.json"
_SHARED = ("data", "steps", "batch_size", "seq_len", "answers_only", "temperature", "top_k")
_CHUNK = 1 << 24


class Result:
    """The file `study.json` of a study.

    Args:
        out: folder of the study.
        head: what is known before the first variant is measured (`head_of`).
    """

    def __init__(self, out: Path, head: Mapping[str, Any]):
        self.path = out / RESULT
        self._begun = time.monotonic()
        self._head, self._skipped, self._rows = dict(head), [], []
        self._write()

    def add(self, trainee: Trainee, acceptance: list[dict[str, Any]], seconds: float) -> None:
        """Adds a variant that was measured, or could not be because it diverged."""
        config = trainee.variant.config
        row = {
            "variant": trainee.variant.name,
            "seed": config.seed,
            "trained": trainee.variant.trained,
            "data": trainee.variant.data,
            **{name: getattr(config, name) for name in FIELDS},
            "parameters": count(trainee.recipe.specs()),
            "steps": trainee.steps,
            "tokens": trainee.steps * config.batch_size * config.seq_len,
            "diverged": trainee.diverged,
            "last_step": trainee.metrics,
            "seconds": {
                "training_beside_others": round(trainee.seconds, 1),
                "evaluation": round(seconds, 1),
            },
            "acceptance": acceptance,
        }
        self._rows.append(row)
        self._write()

    def skip(self, variants: list[Variant]) -> None:
        """Notes variants for which there was no time."""
        self._skipped += [variant.slug for variant in variants]
        self._write()

    def _write(self) -> None:
        head = {
            **self._head,
            "seconds": round(time.monotonic() - self._begun, 1),
            "skipped": self._skipped,
        }
        lines = ",\n".join(json.dumps(finite(row), allow_nan=False) for row in self._rows)
        text = json.dumps(head, indent=1, default=str)[:-2] + f',\n "rows": [\n{lines}\n]}}\n'
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(text)
        os.replace(fresh, self.path)


def head_of(
    config: HeadsConfig,
    table: Table,
    evaluation: Evaluation,
    prompts: Prompts,
    folder: Path,
    params: Params,
    command: str,
) -> dict[str, Any]:
    """What holds for all rows of a study.

    Args:
        config: what the variants share.
        table: the variants.
        evaluation: how they are measured.
        prompts: what they continue.
        folder: of the trunk.
        params: of the trunk.
        command: how the study was started.
    """
    return {
        "command": command,
        "commit": source_commit(),
        "device": describe_devices(),
        "versions": versions(),
        "trunk": {**_about(folder), "fingerprint": fingerprint(params)},
        "baseline": table.baseline,
        "settings": {name: getattr(config, name) for name in (*_SHARED, "precision")},
        "evaluation": {
            **dataclasses.asdict(evaluation),
            "prompts": {kind: len(rows) for kind, rows in prompts.items()},
        },
    }


def _about(folder: Path) -> dict[str, Any]:
    """SHA-256 of the trunk's weights, and what its training record says of it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    note = folder / "training.json"
    record = json.loads(note.read_text()) if note.is_file() else {}
    names = (
        *("command", "parameters", "corpus", "steps", "tokens", "epochs"),
        *("train_seconds", "validation", "devices"),
    )
    return {"sha256": digest.hexdigest(), **{n: record[n] for n in names if n in record}}
