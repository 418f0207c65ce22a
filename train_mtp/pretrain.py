"""Pre-training of a model with its MTP modules: from text files to a checkpoint in HF layout.

out/run.json            what makes the run this one
out/metrics.jsonl       a line per logged step and per evaluation
out/metrics.png         the same as curves
out/tensorboard/        the same for TensorBoard, if asked for
out/checkpoints/N/      states by step; a run that finds one goes on from it, bit for bit
out/model/              config.json, model.safetensors (bf16), tokenizer, training.json
"""

import contextlib
import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dskjax import presets
from dskjax.checkpoint import load_config
from dskjax.checkpoint.store import Store
from dskjax.config import ModelConfig
from dskjax.documents import list_files
from dskjax.mesh import sharding_of
from dskjax.model import param_specs
from dskjax.params import cast, count
from dskjax.tokenizer import Tokenizer
from train_mtp import flops, plot, runs
from train_mtp.config import PretrainConfig
from train_mtp.evaluation import HeldOut, evaluate
from train_mtp.export import export
from train_mtp.loop import Run
from train_mtp.step import Recipe, init_state, place_batch, train_step
from train_mtp.token_store import build_store, store_key


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
    runs.check_extras(config)
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
        fresh = functools.partial(init_state, recipe, config.seed)
        state, seconds = runs.begin(out, store, identity, recipe, fresh)
        start, specs = int(state.step), param_specs(cfg)
        corpus = build_store(files, tokenizer, cache, progress=config.progress)
        dataset = runs.dataset_of(
            corpus, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
        )
        held_out = runs.held_out(config, tokenizer, config.eval_max_tokens)
        log = open_.enter_context(runs.log_of(config, start))
        what = f"{count(specs) / 1e6:.2f}M parameters"
        run = Run(
            step=functools.partial(train_step, recipe=recipe),
            place=functools.partial(place_batch, sharding=recipe.sharding),
            plan=runs.plan_of(config, started),
            dataset=dataset,
            store=store,
            log=log,
            progress=runs.progress_of(config, dataset, start, what),
            out=out,
            extra=identity,
            seconds=seconds,
            evaluate=lambda params: _evaluation(params, held_out, recipe),
            speed=flops.pretraining(cfg, config.seq_len, config.precision),
            on_step=on_step,
        )
        state = run.train(state)
        done = int(state.step)
        weights = cast(state.params, specs, jnp.bfloat16)
        del state
        if config.eval_max_tokens is not None:
            held_out = runs.held_out(config, tokenizer, None)
        # What is shipped is scored: rounded, and fp32 again only to use the compiled step again.
        scores = _evaluation(cast(weights, specs, jnp.float32), held_out, recipe)
        if log is not None and held_out and done == config.steps:
            log.write("eval", done, scores)
    if runs.is_first():
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
        sharding=sharding_of(config.mesh, config.sharding),
    )


def _evaluation(params: Any, held_out: Mapping[str, HeldOut], recipe: Recipe) -> dict[str, Any]:
    scores = evaluate(params, held_out, recipe)
    return {"kinds": {kind: dataclasses.asdict(score) for kind, score in scores.items()}}
