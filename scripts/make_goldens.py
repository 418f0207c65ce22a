# ruff: noqa: E402
"""Writes the checkpoints and golden outputs of tests/goldens from Hugging Face transformers (CPU).

It needs its own environment, because transformers pins what dskjax does not want:

    python3.11 -m venv /tmp/goldens
    /tmp/goldens/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    /tmp/goldens/bin/python scripts/make_goldens.py --out tests/goldens          # write
    /tmp/goldens/bin/python scripts/make_goldens.py --out tests/goldens --check  # compare

For fuzzing, one more checkpoint with a random tiny config of a family, never committed:

    /tmp/goldens/bin/python scripts/make_goldens.py --random 7 --family v3 --out /tmp/fuzz/v3-7

Each case (tests/goldens/cases.py) is a checkpoint folder in hub format (config.json, safetensors
with one tensor per expert) plus golden.npz: what `DeepseekV3ForCausalLM`, `DeepseekV2ForCausalLM`
and `MtpModel` give, eager, in float32; from FP8 checkpoints (tests/goldens/fp8.py), what they give
on the dequantised weights. The script refuses to write a case unless all weights
arrived in the Hugging Face model, the float64 oracle (tests/goldens/oracle.py) agrees, and no
choice (expert or greedy token) is near a tie; every mistake of `oracle.MISTAKES` must be seen by
some case. What the arrays mean: tests/goldens/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.goldens import fp8, oracle
from tests.goldens.cases import CASES, Case, Config, hub_config, random_case
from tests.goldens.huggingface import (
    Tensors,
    check_drafting,
    load_model,
    load_mtp,
    run_greedy,
    run_mtp,
    run_trunk,
)
from tests.goldens.weights import draw_weights

Arrays = dict[str, np.ndarray]

NOISE_LIMIT = 5e-6  # HF fp32 against the fp64 oracle, worst row: leaves dskjax 3/4 of its 2e-5
DISAGREE = 1e-4  # beyond this it is no rounding error
VISIBLE = 2e-4  # a mistake must move the logits by 10x dskjax's tolerance (relative, 2-norm)
MARGIN_LIMIT, GAP_LIMIT = 2e-5, 1e-3  # smallest routing margin and top-2 logit gap in a case
CHECK_TOLERANCE = 5e-6  # --check on another CPU: other BLAS kernels round differently


class UnusableDraw(Exception):
    """Correct implementations may differ on these weights: a near tie, or amplified rounding."""


def config_json(case: Case) -> Config:
    """config.json in the case's style; "v5" is what transformers itself saves."""
    if case.style == "hub":
        quantised = {"quantization_config": fp8.quantisation_config(case.ue8m0 is not None)}
        return hub_config(case) | (quantised if case.fp8 else {})
    name = "DeepseekV2" if case.base["model_type"] == "deepseek_v2" else "DeepseekV3"
    known = {k: v for k, v in case.base.items() if k != "model_type"}
    rope = {"rope_type": "yarn" if "factor" in case.rope else "default", **case.rope}
    config = getattr(transformers, name + "Config")(**known, rope_parameters=rope)
    config.architectures, config.dtype = [name + "ForCausalLM"], case.dtype
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def cast(weights: Arrays, dtype: str) -> Tensors:
    """The drawn weights in the checkpoint's dtype; the router bias stays float32, as published."""
    return {
        name: torch.from_numpy(w).to(
            torch.float32 if name.endswith("e_score_correction_bias") else getattr(torch, dtype)
        )
        for name, w in weights.items()
    }


def write_checkpoint(folder: Path, case: Case, cfg: Config, weights: Tensors) -> None:
    """One file, or shards over which the tensors of every layer are scattered, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        stale.unlink()
    (folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    if case.shards == 1:
        save_shard(weights, folder / "model.safetensors")
        return
    names = sorted(weights)
    order = np.random.default_rng(case.seed).permutation(len(names))
    where = {
        names[j]: f"model-{i % case.shards + 1:05}-of-{case.shards:05}.safetensors"
        for i, j in enumerate(order)
    }
    for file in sorted(set(where.values())):
        save_shard({n: weights[n] for n in names if where[n] == file}, folder / file)
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def save_shard(weights: Tensors, path: Path) -> None:
    """One safetensors file, readable by everyone (save_file makes it private)."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def read_checkpoint(folder: Path) -> Tensors:
    """All weights of a checkpoint as float32, dequantised."""
    files = sorted(folder.glob("*.safetensors"))
    return fp8.dequantise({name: w for file in files for name, w in load_file(file).items()})


@contextlib.contextmanager
def readable(
    folder: Path, case: Case, cfg: Config, weights: Tensors
) -> Iterator[tuple[Path, Config]]:
    """The checkpoint and its config, or a copy for the while that transformers can read:
    dequantised, and with the model type of V3 for Kimi-K2, as Moonshot's deployment guide says.
    """
    known = {name: value for name, value in cfg.items() if name != "quantization_config"}
    if known["model_type"] == "kimi_k2":
        known["model_type"] = "deepseek_v3"
    if known == cfg:
        yield folder, cfg
        return
    with tempfile.TemporaryDirectory() as copy:
        write_checkpoint(Path(copy), dataclasses.replace(case, shards=1), known, weights)
        yield Path(copy), known


def depth_of(golden: Arrays) -> int:
    """The number of MTP depths in a golden."""
    return sum(key.startswith("mtp_logits_") for key in golden)


def run_huggingface(
    folder: Path, case: Case, cfg: Config, weights: Tensors, ids: np.ndarray
) -> Arrays:
    """What transformers computes on a checkpoint it can read."""
    model = load_model(folder, cfg, weights)
    torch_ids = torch.from_numpy(ids).long()
    golden: Arrays = {"ids": ids, **run_trunk(model, cfg, torch_ids)}
    golden |= run_greedy(model, torch_ids, case.prompt_len, case.new_tokens)
    if cfg.get("num_nextn_predict_layers"):
        mtp, final = load_mtp(model, cfg, weights), torch.from_numpy(golden["final"])
        golden |= run_mtp(mtp, final, torch_ids, hf_positions=False)
        shifted = run_mtp(mtp, final, torch_ids, hf_positions=True)
        for k in range(1, depth_of(golden) + 1):
            if (
                oracle.worst_row(shifted[f"mtp_logits_{k}"], golden[f"mtp_logits_{k}"])
                > NOISE_LIMIT
            ):
                raise AssertionError("a constant rope offset changed the MTP logits")
        if depth_of(golden) > 1 and case.prompt_len > depth_of(golden):
            check_drafting(model, golden, NOISE_LIMIT)
    return golden


def compute_golden(folder: Path, case: Case, cfg: Config, ids: np.ndarray) -> Arrays:
    """Everything in golden.npz for a checkpoint already on disk.

    Raises `UnusableDraw`, or AssertionError when Hugging Face and the oracle disagree.
    """
    weights = read_checkpoint(folder)
    truth = oracle.Oracle({n: w.numpy() for n, w in weights.items()}, cfg).run(ids)
    margins = {key: value.astype(np.float32) for key, value in truth.items() if "margin_" in key}
    if min((value.min() for value in margins.values()), default=1.0) < MARGIN_LIMIT:
        raise UnusableDraw
    with readable(folder, case, cfg, weights) as (source, known):
        golden = run_huggingface(source, case, known, weights, ids)

    noise = {
        key: oracle.worst_row(golden[key], value)
        for key, value in truth.items()
        if key in golden and value.dtype != int
    }
    wrong = [
        key
        for key, value in truth.items()
        if "experts_" in key and not np.array_equal(value, golden[key])
    ]
    if max(noise.values()) > DISAGREE or wrong:
        raise AssertionError(f"{case.name}: oracle and Hugging Face differ: {noise} {wrong=}")
    if (
        oracle.worst_row(golden["inv_freq"][:, None], oracle.inverse_frequencies(cfg)[:, None])
        > 1e-6
    ):
        raise AssertionError(f"{case.name}: inv_freq differs from the oracle's")
    varied = len(np.unique(golden["greedy"])) > golden["greedy"].shape[1] // 4
    noisy = max(noise.values()) > NOISE_LIMIT
    if golden["greedy_gap"].min() < GAP_LIMIT or noisy or not varied:
        raise UnusableDraw
    return golden | margins | {"fp32_noise": np.float64(max(noise.values()))}


def build(case: Case, folder: Path) -> tuple[Config, Arrays]:
    """Draws weights and ids until they are usable, and writes the folder."""
    cfg = config_json(case)
    for attempt in range(100):
        rng = np.random.default_rng([case.seed, attempt])
        weights = cast(draw_weights(case, cfg, rng), case.dtype)
        stored = fp8.quantise(weights, case.ue8m0) if case.fp8 else weights
        write_checkpoint(folder, case, cfg, stored)
        ids = rng.integers(0, cfg["vocab_size"], case.shape).astype(np.int32)
        try:
            golden = compute_golden(folder, case, cfg, ids)
        except UnusableDraw:
            continue
        np.savez_compressed(folder / "golden.npz", **dict(sorted(golden.items())))
        return cfg, golden
    raise AssertionError(f"{case.name}: no draw is usable")


def sensitivity(folder: Path, cfg: Config, golden: Arrays) -> dict[str, float]:
    """How far each applicable mistake moves the logits (or the MTP logits), relative."""
    weights = {n: w.numpy() for n, w in read_checkpoint(folder).items()}
    out = {}
    for mistake in oracle.applicable(cfg):
        wrong = oracle.Oracle(weights, cfg, mistake).run(golden["ids"])
        keys = [key for key in wrong if key.startswith(("logits", "mtp_logits"))]
        out[mistake] = max(oracle.relative(wrong[key], golden[key]) for key in keys)
    return out


def report(name: str, folder: Path, golden: Arrays) -> None:
    """Prints one line about a case."""
    size = sum(f.stat().st_size for f in folder.iterdir())
    margin = min((v.min() for k, v in golden.items() if "margin_" in k), default=math.inf)
    gap, noise = golden["greedy_gap"].min(), float(golden["fp32_noise"])
    facts = f"fp32 noise {noise:.1e}  margin {margin:.1e}  greedy gap {gap:.1e}"
    print(f"{name:16} {size / 1e3:6.0f} kB  {facts}")


def build_all(out: Path) -> None:
    """All committed cases and sensitivity.json."""
    table: dict[str, dict[str, float]] = {}
    for case in CASES:
        cfg, golden = build(case, out / case.name)
        seen = sensitivity(out / case.name, cfg, golden)
        table[case.name] = {k: float(f"{v:.2g}") for k, v in seen.items()}
        report(case.name, out / case.name, golden)
    blind = [m for m in oracle.MISTAKES if max(row.get(m, 0.0) for row in table.values()) < VISIBLE]
    if blind:
        raise AssertionError(f"no case sees {blind}")
    (out / "sensitivity.json").write_text(json.dumps(table, indent=1) + "\n")


def compare(made: Path, committed: Path) -> list[str]:
    """What differs: files by bytes, goldens exactly for integers, else within CHECK_TOLERANCE."""
    problems = []
    names = {str(f.relative_to(made)) for f in made.rglob("*") if f.is_file()}
    for case in CASES:
        extra = {
            str(f.relative_to(committed)) for f in (committed / case.name).rglob("*") if f.is_file()
        } - names
        problems += [f"{name}: nothing makes this file" for name in sorted(extra)]
    for name in sorted(names):
        new, old = made / name, committed / name
        if not old.exists():
            problems.append(f"{name}: missing")
        elif name.endswith(".npz"):
            a, b = np.load(new), np.load(old)
            if set(a) != set(b):
                problems.append(f"{name}: keys {sorted(set(a) ^ set(b))}")
            for key in set(a) & set(b) - {"fp32_noise"}:
                exact = a[key].dtype.kind in "iu" and np.array_equal(a[key], b[key])
                loose = (
                    1e-2 if key.endswith(("greedy_gap",)) or "margin_" in key else CHECK_TOLERANCE
                )
                same = a[key].shape == b[key].shape and a[key].dtype == b[key].dtype
                if not same or not (exact or oracle.relative(a[key], b[key]) < loose):
                    problems.append(f"{name}: {key}")
        elif name != "sensitivity.json" and new.read_bytes() != old.read_bytes():
            problems.append(f"{name}: bytes differ")
    return problems


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--check",
        action="store_true",
        help="recompute in a temporary folder and compare with --out",
    )
    parser.add_argument(
        "--random", type=int, metavar="SEED", help="one random case, written to --out itself"
    )
    parser.add_argument("--family", choices=["v3", "v2"], default="v3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.random is not None:
        case = random_case(args.random, args.family)
        _, golden = build(case, args.out)
        report(case.name, args.out, golden)
    elif args.check:
        with tempfile.TemporaryDirectory() as folder:
            build_all(Path(folder))
            problems = compare(Path(folder), args.out)
        print("\n".join(problems) or f"{args.out} is what this script makes")
        sys.exit(bool(problems))
    else:
        build_all(args.out)


if __name__ == "__main__":
    main()
