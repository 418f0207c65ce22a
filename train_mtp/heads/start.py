"""The weights heads begin with."""

from typing import Literal

import jax
import jax.numpy as jnp

from dskjax import dequantise
from dskjax.config import ModelConfig
from dskjax.params import Params, initialise, named_leaves, tree_of
from train_mtp.heads.recipe import MODULES, HeadsRecipe

Init = Literal["last", "random"]


def first_weights(
    frozen: Params, key: jax.Array, *, trunk: ModelConfig, recipe: HeadsRecipe, init: Init
) -> Params:
    """fp32 masters of the modules; for use under jit.

    Args:
        frozen: params of the trunk, with its own MTP modules if it has some.
        key: of what is random.
        trunk: the config of `frozen`.
        recipe: which modules are wanted.
        init: "last": every module is a copy of the checkpoint's last MTP module; if it has none,
            its block is a copy of the trunk's last layer and the rest is random. "random": all of
            it.

    Raises:
        ValueError: "last" from a trunk whose last layer has no experts.
    """
    drawn = initialise(recipe.specs(), key, jnp.float32)
    if init == "random":
        return drawn
    if MODULES in frozen and trunk.mtp.num_nextn_predict_layers:
        source, prefix = frozen[MODULES], ""
    elif trunk.num_moe_layers:
        source, prefix = frozen["moe_layers"], "block."
    else:
        raise ValueError(
            "init='last' copies an MTP module or the trunk's last layer with experts, and this "
            "checkpoint has neither; use init='random'"
        )
    copies = {prefix + name: dequantise(leaf[-1]) for name, leaf in named_leaves(source)}
    made = {
        name: jnp.broadcast_to(copies[name], leaf.shape) if name in copies else leaf
        for name, leaf in named_leaves(drawn[MODULES])
    }
    return {MODULES: tree_of(made)}
