"""Training MTP modules over a frozen trunk: from a checkpoint and text to a checkpoint.

The folder of a run is that of pre-training (`train_mtp.runs`); the exported model holds the trunk's
tensors as they were and the modules as layers num_hidden_layers + k.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import checkpoint
from dskjax.checkpoint import hub
from dskjax.checkpoint.store import Store
from dskjax.config import ModelConfig
from dskjax.documents import list_files
from dskjax.mesh import sharding_of
from dskjax.params import Params, cast, count, is_weight, named_leaves
from dskjax.tokenizer import Tokenizer
from train_mtp import flops, plot, runs
from train_mtp.data import Batch
from train_mtp.export import export
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.evaluation import evaluate_heads
from train_mtp.heads.recipe import MODULES, HeadsRecipe
from train_mtp.heads.start import first_weights
from train_mtp.heads.step import accumulated_step, head_step, teach
from train_mtp.loop import Run
from train_mtp.state import TrainState, abstract_state, make_state
from train_mtp.step import place_batch
from train_mtp.token_store import build_store, store_key

SETTINGS = "settings.json"
"""The run as it was told; `export_heads` reads it."""
BEST = "accepted_length"
"""The metric of held-out text whose best checkpoint is kept: tokens a greedy step would emit."""


def train_heads(
    config: HeadsConfig,
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
    sharding = sharding_of(config.mesh, config.sharding)
    folder = hub.find(config.trunk, progress=config.progress and runs.is_first())
    frozen, trunk = load_trunk(config, folder, sharding)
    tokenizer = Tokenizer.load(folder)
    check_fit(config, trunk, tokenizer)
    recipe = recipe_of(config, trunk, sharding)
    files = list_files(config.data)
    identity = {
        "run": config.trajectory,
        "model": dataclasses.asdict(recipe.cfg),
        "trunk": fingerprint(frozen),
        "data": store_key(files, tokenizer),
    }
    cache = config.cache_dir or out / "tokens"
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_:
        best = BEST if config.keep_best and config.eval_data else None
        store = open_.enter_context(
            Store(out / "checkpoints", keep_last=config.keep_last, keep_best=best)
        )
        fresh = functools.partial(first_state, config, recipe, frozen, trunk)
        state, seconds = runs.begin(out, store, identity, recipe, fresh)
        start = int(state.step)
        if runs.is_first():  # not before the folder is known to be this run's
            settings = json.dumps(dataclasses.asdict(config), indent=2, default=str)
            (out / SETTINGS).write_text(settings + "\n")
        frozen = {name: group for name, group in frozen.items() if name != MODULES}
        corpus = build_store(files, tokenizer, cache, progress=config.progress)
        dataset = runs.dataset_of(
            corpus,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            answers_only=config.answers_only,
        )
        held_out = runs.held_out(config, tokenizer, config.eval_max_tokens)
        log = open_.enter_context(runs.log_of(config, start))
        trained = count(recipe.specs())
        what = f"{trained / 1e6:.2f}M parameters of {config.layers} {config.weights} heads"
        run = Run(
            step=functools.partial(_step, frozen, recipe, config.accumulate),
            place=functools.partial(_place, recipe, config.accumulate),
            plan=runs.plan_of(config, started),
            dataset=dataset,
            store=store,
            log=log,
            progress=runs.progress_of(config, dataset, start, what),
            out=out,
            extra=identity,
            seconds=seconds,
            evaluate=lambda params: {"kinds": evaluate_heads(params, frozen, held_out, recipe)},
            judge=None if best is None else _judge,
            speed=flops.heads(recipe.cfg, config.layers, config.seq_len, config.precision),
            on_step=on_step,
        )
        state = run.train(state)
        done = int(state.step)
        if config.eval_max_tokens is not None:
            held_out = runs.held_out(config, tokenizer, None)
        scores = evaluate_heads(state.params, frozen, held_out, recipe)
        if log is not None and held_out and done == config.steps:
            log.write("eval", done, {"kinds": scores})
    if runs.is_first():
        plot.plot_runs([out], out / "metrics.png")
    record = {
        "command": command or shlex.join(sys.argv),
        "config": dataclasses.asdict(config),
        "trained_parameters": trained,
        "trunk": identity["trunk"],
        "steps": done,
        "tokens": done * config.batch_size * config.seq_len,
        "epochs": round(dataset.epoch(done), 3),
        "train_seconds": round(run.seconds, 1),
        "validation": scores,
    }
    return ship(config.model_folder, state.params, frozen, recipe, folder, record)


def export_heads(run: str | Path, out: str | Path, *, step: int | None = None) -> Path:
    """Writes a checkpoint of a run as a model folder, whether or not the run has ended.

    Args:
        run: folder of the run.
        out: folder to write.
        step: which checkpoint; None takes the best one, or the last if none was judged.

    Raises:
        FileNotFoundError, ValueError: no such run or checkpoint; says which there are.
    """
    note = Path(run) / SETTINGS
    if not note.is_file():
        raise FileNotFoundError(f"{note}: no such file; expected the folder of a train-mtp run")
    given = json.loads(note.read_text())
    fields = {f.name: given[f.name] for f in dataclasses.fields(HeadsConfig) if f.name in given}
    config = HeadsConfig(**{**fields, "watch": tuple(fields["watch"])})
    sharding = sharding_of(config.mesh, config.sharding)
    folder = hub.find(config.trunk, progress=config.progress)
    frozen, trunk = load_trunk(config, folder, sharding)
    recipe = recipe_of(config, trunk, sharding)
    frozen = {name: group for name, group in frozen.items() if name != MODULES}
    with Store(Path(run) / "checkpoints", keep_last=None, keep_best=BEST) as store:
        if step is None:
            step = store.best() or store.latest()
        if step is None or step not in store.steps():
            raise ValueError(f"{run}: no checkpoint of {step=}; found {store.steps()}")
        state, extra = store.restore(step, abstract_state(recipe))
    if extra["trunk"] != fingerprint(frozen):
        raise ValueError(f"{config.trunk} is not the trunk that {run} was trained on any more")
    record = {"config": dataclasses.asdict(config), "trunk": extra["trunk"], "steps": step}
    return ship(Path(out), state.params, frozen, recipe, folder, record)


def ship(
    out: Path,
    heads: Params,
    frozen: Params,
    recipe: HeadsRecipe,
    folder: Path,
    record: Mapping[str, Any],
) -> Path:
    """Writes trunk and heads as one model folder, with the tokenizer of `folder`."""
    params = {**frozen, **shipped(heads, recipe, frozen)}
    return export(out, params, recipe.cfg, tokenizer=folder, record=record)


def recipe_of(config: HeadsConfig, trunk: ModelConfig, sharding: Any) -> HeadsRecipe:
    """The step that a run takes."""
    return HeadsRecipe(
        cfg=config.model(trunk),
        depths=config.layers,
        weights=config.weights,
        optimizer=config.optimizer,
        objective=config.objective,
        depth_decay=config.depth_decay,
        detach=config.detach,
        top_k=config.top_k,
        watch=config.watch,
        bias_update_rate=config.bias_update_rate,
        precision=config.precision,
        remat=config.remat,
        impl=config.impl,
        sharding=sharding,
    )


def fingerprint(params: Params) -> str:
    """Hash of a trunk's weights, its modules left out; the same on any mesh."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named_leaves({n: group for n, group in params.items() if n != MODULES}):
        for part in jax.tree.leaves(leaf):
            sums = np.asarray(_sums_of_bits(part))
            digest.update(f"{name} {part.dtype} {part.shape} {sums.tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _sums_of_bits(x: jax.Array) -> jax.Array:
    """Two checksums of an array's bits, modulo 2^32; the second depends on their order."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * place).sum(dtype=jnp.uint32)])


def load_trunk(config: HeadsConfig, folder: Path, sharding: Any) -> tuple[Params, ModelConfig]:
    """Params of the checkpoint in `folder`, its own modules among them, and its config."""
    return checkpoint.load(
        folder,
        dtype=config.precision,
        quantised="dequantise" if config.dequantise else "keep",
        sharding=sharding,
        progress=config.progress and runs.is_first(),
    )


def _judge(values: Mapping[str, Any]) -> dict[str, float]:
    kinds = values["kinds"]
    return {BEST: kinds.get("all", next(iter(kinds.values())))[BEST]}


def check_fit(config: HeadsConfig, trunk: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer or the rows do not fit the trunk."""
    if tokenizer.vocab_size > trunk.vocab_size:
        raise ValueError(
            f"{tokenizer.source} has ids up to {tokenizer.vocab_size - 1}, but {config.trunk} has "
            f"vocab_size={trunk.vocab_size}: this tokenizer belongs to another trunk"
        )
    if config.seq_len > trunk.max_position_embeddings:
        raise ValueError(
            f"seq_len={config.seq_len} is longer than the max_position_embeddings="
            f"{trunk.max_position_embeddings} of {config.trunk}; lower it"
        )


def first_state(
    config: HeadsConfig, recipe: HeadsRecipe, frozen: Params, trunk: ModelConfig
) -> TrainState:
    """Step 0 of a run; `frozen` with the checkpoint's own modules, from which heads may begin."""
    key = jax.random.key(config.seed)
    return make_state(
        recipe, first_weights, frozen, key, trunk=trunk, recipe=recipe, init=config.init
    )


def _place(recipe: HeadsRecipe, parts: int, batch: Batch) -> Any:
    """One batch, or `parts` of them under a leading axis."""
    if parts == 1:
        return place_batch(batch, recipe.sharding)
    cut = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    placed = [
        place_batch(jax.tree.map(lambda a, n=n: a[n], cut), recipe.sharding) for n in range(parts)
    ]
    return jax.tree.map(lambda *a: jnp.stack(a), *placed)


def _step(
    frozen: Params, recipe: HeadsRecipe, parts: int, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, Any]]:
    if parts > 1:
        return accumulated_step(state, frozen, batch, recipe=recipe)
    return head_step(state, frozen, batch, teach(frozen, batch, recipe=recipe), recipe=recipe)


def shipped(heads: Params, recipe: HeadsRecipe, frozen: Params) -> Params:
    """`mtp_layers` in the dtype that the trunk has: its own, or bf16 beside quantized weights."""
    dtypes = {leaf.dtype for _, leaf in named_leaves(frozen) if not is_weight(leaf)}
    dtype = jnp.float32 if dtypes == {jnp.dtype("float32")} else jnp.bfloat16
    return cast(heads, recipe.specs(), dtype)
