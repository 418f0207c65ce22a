"""What each process of `test_processes.py` runs: python -m tests.parallel.worker OUT PART..."""

import os
import sys
from collections.abc import Sequence

import jax
import numpy as np

from dskjax import mesh, model
from dskjax.decode.generate import generate
from dskjax.distributed import Membership, fetch, put
from dskjax.params import WeightSpec, is_spec
from dskjax.presets import preset
from tests.train_mtp import toy
from train_mtp.step import init_state, place_batch, train_step

PROMPTS = [[5, 6, 7, 8, 9], [11], [4] * 9]


def results(parts: Sequence[str]) -> dict[str, np.ndarray]:
    """What functions of this file compute, each on 8 devices in its own layout. On every process
    the same.
    """
    run = {"forward": forward, "decoded": decoded, "trained": trained}
    return {name: x for part in parts for name, x in run[part]().items()}


def forward() -> dict[str, np.ndarray]:
    cfg, where = preset("tiny-v3"), mesh.preset("prefill", mesh.make_mesh(ep=4, tp=2))
    params = weights(cfg, where)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 12), np.int32)
    tokens = put(tokens, where.of((None, None)))
    run = jax.jit(
        lambda p, t: model.apply(p, t, cfg=cfg, sharding=where), out_shardings=where.of(())
    )
    return {"logits": np.asarray(fetch(run(params, tokens)))}


def decoded() -> dict[str, np.ndarray]:
    cfg, where = preset("tiny-v3"), mesh.preset("decode", mesh.make_mesh(dp=2, ep=4))
    drafts = cfg.mtp.num_nextn_predict_layers
    found = generate(
        weights(cfg, where),
        cfg,
        PROMPTS,
        max_tokens=6,
        drafts=drafts,
        accept="strict",
        ignore_eos=True,
        page_size=4,
        sharding=where,
    )
    return {"tokens": np.array(found.tokens), "steps": np.array(found.stats.steps)}


def trained() -> dict[str, np.ndarray]:
    where = mesh.preset("train", mesh.make_mesh(dp=2, ep=2, tp=2))
    recipe = toy.recipe(sharding=where)
    rows = toy.batch()
    share = len(rows.tokens) // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    batch = jax.tree.map(lambda part: part[mine], rows)
    state, losses = init_state(recipe, 0), []
    for _ in range(2):
        state, metrics = train_step(state, place_batch(batch, where), recipe=recipe)
        losses.append(float(metrics["total_loss"]))
    return {"losses": np.array(losses), "norm": np.asarray(fetch(state.params["norm"]["weight"]))}


def weights(cfg, where):
    """The same values on any mesh. NumPy: `model.init` would compile a program per mesh."""
    rng, specs = np.random.default_rng(0), model.param_specs(cfg)

    def draw(spec: WeightSpec, place: jax.sharding.Sharding) -> jax.Array:
        loc, scale = (1.0, 0.0) if spec.init == "ones" else (0.0, 0.2)
        return put(rng.normal(loc, scale, spec.shape).astype(np.float32), place)

    return jax.tree.map(draw, specs, where.params(specs), is_leaf=is_spec)


if __name__ == "__main__":
    place = Membership.told(os.environ)
    assert place is not None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // place.processes)
    place.join()
    out, *parts = sys.argv[1:]
    found = results(parts)
    np.savez(f"{out}.{place.process}.npz", **found)
