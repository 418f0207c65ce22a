"""Pre-training of a model with its MTP modules: from text files to a checkpoint in HF layout.

out/run.json            what makes the run this one
out/metrics.jsonl       a line per logged step and per evaluation
out/metrics.png         the same as curves
out/checkpoints/N/      states by step; a run that finds one goes on from it, bit for bit
out/model/              config.json, model.safetensors (bf16), tokenizer, training.json
"""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dskjax import presets
from dskjax.axes import Sharding
from dskjax.checkpoint import load_config
from dskjax.checkpoint.store import Store
from dskjax.config import ModelConfig
from dskjax.mesh import make_mesh, parse_mesh, preset
from dskjax.model import param_specs
from dskjax.params import cast, count
from dskjax.tokenizer import Tokenizer
from train_mtp import plot
from train_mtp.config import PretrainConfig, differences
from train_mtp.data import PackedDataset
from train_mtp.documents import list_files
from train_mtp.evaluation import HeldOut, documents_by_kind, evaluate, hold_out
from train_mtp.export import describe_devices, export
from train_mtp.loop import Plan, Run
from train_mtp.metrics import METRICS, MetricsLog, Progress
from train_mtp.step import Recipe, TrainState, abstract_state, init_state
from train_mtp.token_store import TokenStore, build_store, store_key

RUN = "run.json"


def pretrain(
    config: PretrainConfig,
    *,
    command: str | None = None,
    on_step: Callable[[int, Mapping[str, Any]], Any] | None = None,
) -> Path:
    """Trains, or goes on training, and exports.

    Args:
        config: the run. If `config.out` holds a checkpoint of the same run, it is continued.
        command: how the run was started, for the record; this process's arguments when None.
        on_step: called with the number and the metrics of each finished step, one step late.

    Returns:
        The exported folder, `out/model`.

    Raises:
        ValueError: something does not fit together, or `config.out` holds another run.
        Interrupted: a signal came; the state is saved.
        NonFiniteLossError: the loss is NaN or infinite; the batch is saved.
    """
    started = time.monotonic()
    out = Path(config.out)
    tokenizer = Tokenizer.load(config.tokenizer)
    cfg = model_config(config, tokenizer)
    recipe = make_recipe(config, cfg)
    files = list_files(config.data)
    identity = {
        "run": config.trajectory,
        "model": dataclasses.asdict(cfg),
        "data": store_key(files, tokenizer),
    }
    cache = config.cache_dir or out / "tokens"
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_:
        store = open_.enter_context(Store(out / "checkpoints", keep_last=config.keep_last))
        state, seconds = _start(config, recipe, store, identity)
        dataset = _dataset(config, build_store(files, tokenizer, cache, progress=config.progress))
        held_out = _held_out(config, tokenizer, config.eval_max_tokens)
        log = open_.enter_context(_log(out, int(state.step)))
        run = Run(
            recipe=recipe,
            plan=_plan(config, started),
            dataset=dataset,
            store=store,
            log=log,
            progress=_progress(config, cfg, dataset, int(state.step)),
            out=out,
            extra=identity,
            seconds=seconds,
            evaluate=lambda params: _evaluation(params, held_out, recipe),
            on_step=on_step,
        )
        state = run.train(state)
        done, specs = int(state.step), param_specs(cfg)
        weights = cast(state.params, specs, jnp.bfloat16)
        del state
        if config.eval_max_tokens is not None:
            held_out = _held_out(config, tokenizer, None)
        # What is shipped is scored: rounded, and fp32 again only to use the compiled step again.
        scores = _evaluation(cast(weights, specs, jnp.float32), held_out, recipe)
        if log is not None and held_out and done == config.steps:
            log.write("eval", done, scores)
    if _is_first():
        plot.plot_runs([out], out / "metrics.png")
    record = {
        "command": command or shlex.join(sys.argv),
        "config": dataclasses.asdict(config),
        "parameters": count(param_specs(cfg)),
        "corpus": {
            "files": [path.name for path in files],
            "documents": dataset.store.n_documents,
            "tokens": dataset.store.n_tokens,
            "bytes": dataset.store.n_bytes,
        },
        "steps": done,
        "tokens": done * config.batch_size * config.seq_len,
        "epochs": round(dataset.epoch(done), 3),
        "train_seconds": round(run.seconds, 1),
        "validation": scores["kinds"],
    }
    return export(out / "model", weights, cfg, tokenizer=config.tokenizer, record=record)


def model_config(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model that `config.model` names, with the tokenizer's bos and eos.

    Raises:
        ValueError: no such preset or file, or the model does not fit tokenizer or rows.
    """
    path = Path(config.model)
    if path.is_dir():
        cfg = load_config(path)
    elif path.is_file():
        cfg = ModelConfig.from_hf(json.loads(path.read_text()))
    elif config.model in presets.PRESETS:
        cfg = presets.PRESETS[config.model]()
    else:
        raise ValueError(
            f"model={config.model!r} is neither a preset ({', '.join(presets.PRESETS)}) nor a "
            "config.json or a folder with one"
        )
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{tokenizer.source} has ids up to {tokenizer.vocab_size - 1}, but {config.model} has "
            f"vocab_size={cfg.vocab_size}; use a config.json with vocab_size of at least "
            f"{tokenizer.vocab_size}"
        )
    if config.seq_len > cfg.max_position_embeddings:
        raise ValueError(
            f"seq_len={config.seq_len} is longer than the max_position_embeddings="
            f"{cfg.max_position_embeddings} of {config.model}; lower the one or raise the other"
        )
    return dataclasses.replace(
        cfg, bos_token_id=tokenizer.bos_id, eos_token_id=tuple(tokenizer.eos_ids)
    )


def make_recipe(config: PretrainConfig, cfg: ModelConfig) -> Recipe:
    """The step that a run takes, on the devices of its mesh (one device: no sharding at all)."""
    return Recipe(
        cfg=cfg,
        optimizer=config.optimizer,
        mtp_weight=config.mtp_weight,
        z_loss=config.z_loss,
        bias_update_rate=config.bias_update_rate,
        precision=config.precision,
        remat=config.remat,
        impl=config.impl,
        sharding=_sharding(config),
    )


def _sharding(config: PretrainConfig) -> Sharding | None:
    devices = jax.devices()
    sizes = parse_mesh(config.mesh)
    if sizes:
        devices = devices[: math.prod(sizes.values())]
        mesh = make_mesh(**sizes, devices=devices)
    else:
        mesh = make_mesh(dp=len(devices))
    return None if len(devices) == 1 else preset(config.sharding, mesh)


def _dataset(config: PretrainConfig, corpus: TokenStore) -> PackedDataset:
    return PackedDataset(
        corpus,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _log(out: Path, start: int) -> contextlib.AbstractContextManager[MetricsLog | None]:
    return MetricsLog(out / METRICS, steps=start) if _is_first() else contextlib.nullcontext()


def _plan(config: PretrainConfig, started: float) -> Plan:
    return Plan(
        steps=config.steps,
        save_every=config.save_every,
        log_every=config.log_every,
        eval_every=config.eval_every,
        deadline=None if config.max_minutes is None else started + 60 * config.max_minutes,
    )


def _progress(
    config: PretrainConfig, cfg: ModelConfig, dataset: PackedDataset, start: int
) -> Progress:
    progress = Progress(config.steps, start, shown=config.progress and _is_first())
    progress.say(
        f"{count(param_specs(cfg)) / 1e6:.2f}M parameters, "
        f"{dataset.store.n_tokens / 1e6:.1f}M tokens of text, {describe_devices()}, "
        + (f"resumed at step {start}" if start else "from scratch")
    )
    return progress


def _start(
    config: PretrainConfig, recipe: Recipe, store: Store, identity: Mapping[str, Any]
) -> tuple[TrainState, float]:
    """The state to begin with, and the wall time already spent on it."""
    step, note = store.latest(), Path(config.out) / RUN
    if step is None:
        if _is_first():
            note.write_text(_json(identity))
        return init_state(recipe, config.seed), 0.0

    def refuse_another(saved: Mapping[str, Any]) -> None:
        if changed := differences(saved, json.loads(json.dumps(identity))):
            raise ValueError(
                f"{config.out} holds another run, at step {step}: {'; '.join(changed)} "
                "(saved -> now). Give the same values to go on, or another out to start anew"
            )

    if note.is_file():  # says it better than a misshapen leaf
        refuse_another(json.loads(note.read_text()))
    state, extra = store.restore(step, abstract_state(recipe))
    seconds = extra.pop("seconds")
    refuse_another(extra)
    return state, seconds


def _held_out(
    config: PretrainConfig, tokenizer: Tokenizer, max_tokens: int | None
) -> dict[str, HeldOut]:
    if not config.eval_data:
        return {}
    kinds = documents_by_kind(config.eval_data, index=config.eval_index, tokenizer=tokenizer)
    return {
        kind: hold_out(
            documents,
            tokenizer,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            max_tokens=max_tokens,
        )
        for kind, documents in kinds.items()
    }


def _evaluation(params: Any, held_out: Mapping[str, HeldOut], recipe: Recipe) -> dict[str, Any]:
    scores = evaluate(params, held_out, recipe)
    return {"kinds": {kind: dataclasses.asdict(score) for kind, score in scores.items()}}


def _is_first() -> bool:
    return jax.process_index() == 0


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"
