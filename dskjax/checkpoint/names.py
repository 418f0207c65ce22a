"""Hugging Face tensor names <-> places in our params, derived from the declared weights.

    model.layers.{i}.mlp.experts.{e}.up_proj.weight
    <->  moe_layers.mlp.experts.gate_up_proj[i - first_k_dense_replace, e, 1]

Our leaves are stacked over layers, experts and (gate, up); a checkpoint has one tensor for each
entry of those axes. MTP module k is layer `num_hidden_layers + k` there, with names of its own.
"""

import dataclasses
import re
import sys
from collections.abc import Container, Iterator

import numpy as np

from dskjax.config import ModelConfig
from dskjax.layers.rope import half_split_order
from dskjax.model import param_specs
from dskjax.params import WeightSpec, named_leaves
from dskjax.quantise import LINEARS

EMBEDDING = "model.embed_tokens.weight"
"""The tensor whose dtype is that of the checkpoint."""

HEAD = "lm_head.weight"

_TOP = {
    "embed_tokens.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    HEAD: HEAD,
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint and the part of a leaf it fills.

    Attributes:
        name: the tensor's name in the checkpoint.
        leaf: dotted name of the leaf.
        index: leading indices into the leaf (layer, expert, gate or up); the rest is the tensor.
        shape: shape in the checkpoint; that of the part, or the same values with axes merged.
    """

    name: str
    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def slots(cfg: ModelConfig, stored: Container[str] = ()) -> Iterator[Slot]:
    """Every tensor of a model, leaf by leaf; the slots of a leaf cover it, in order of `index`.

    Args:
        cfg: the model.
        stored: names that a checkpoint holds. Where it has the fused experts of transformers 5
            (`mlp.experts.gate_up_proj` [E, 2F, D], `mlp.experts.down_proj` [E, D, F]), they take
            the place of the per-expert tensors, layer by layer.
    """
    for leaf, spec in named_leaves(param_specs(cfg)):
        yield from _leaf_slots(leaf, spec, cfg, stored)


def _leaf_slots(
    leaf: str, spec: WeightSpec, cfg: ModelConfig, stored: Container[str]
) -> Iterator[Slot]:
    if leaf in _TOP:
        yield Slot(_TOP[leaf], leaf, (), spec.shape)
        return
    group, _, rest = leaf.partition(".")
    first = {
        "dense_layers": 0,
        "moe_layers": cfg.num_dense_layers,
        "mtp_layers": cfg.num_hidden_layers,
    }[group]
    if group == "mtp_layers":
        rest = rest.removeprefix("block.") if rest.startswith("block.") else _mtp_name(rest)
    shape = spec.shape[1:]
    for layer in range(spec.shape[0]):
        name = f"model.layers.{first + layer}.{rest}"
        yield from _layer_slots(name, leaf, (layer,), shape, stored)


def _mtp_name(rest: str) -> str:
    return "shared_head.norm.weight" if rest == "norm.weight" else rest


def _layer_slots(
    name: str, leaf: str, index: tuple[int, ...], shape: tuple[int, ...], stored: Container[str]
) -> Iterator[Slot]:
    parent, _, own = name.rpartition(".")
    if parent.endswith(".experts"):
        if name in stored:
            merged = (shape[0], shape[1] * shape[2], *shape[3:]) if len(shape) == 4 else shape
            yield Slot(name, leaf, index, merged)
            return
        for expert in range(shape[0]):
            part = f"{parent}.{expert}.{own}"
            # one expert is a SwiGLU like any other
            yield from _layer_slots(part, leaf, (*index, expert), shape[1:], ())
    elif own == "gate_up_proj":
        for half, gate_or_up in enumerate(("gate", "up")):
            yield Slot(f"{parent}.{gate_or_up}_proj.weight", leaf, (*index, half), shape[1:])
    else:
        bare = own not in ("weight", "e_score_correction_bias")
        yield Slot(f"{name}.weight" if bare else name, leaf, index, shape)


def layer_of(name: str) -> int:
    """The layer a tensor belongs to; -1 for what comes before them all, a huge one for the rest."""
    if match := re.match(r"model\.layers\.(\d{1,9})\.", name):
        return int(match[1])
    return -1 if name == EMBEDDING else sys.maxsize


def is_mtp(name: str, cfg: ModelConfig) -> bool:
    """Whether a tensor belongs to one of the MTP modules that the config declares."""
    return 0 <= layer_of(name) - cfg.num_hidden_layers < cfg.mtp.num_nextn_predict_layers


def alias_of(name: str, cfg: ModelConfig) -> Slot | None:
    """The slot whose values a tensor repeats: the copies of embedding and head in MTP modules.

    The head of a tied model is one, too. None for every other tensor.
    """
    shape = (cfg.vocab_size, cfg.hidden_size)
    embedding = head = Slot(EMBEDDING, "embed_tokens.weight", (), shape)
    if not cfg.tie_word_embeddings:
        head = Slot(HEAD, HEAD, (), shape)
    elif name == HEAD:
        return embedding
    if is_mtp(name, cfg):
        own = name.split(".", 3)[3]
        return {"embed_tokens.weight": embedding, "shared_head.head.weight": head}.get(own)
    return None


def aliases(cfg: ModelConfig) -> dict[str, Slot]:
    """Every tensor that `alias_of` knows for this model."""
    first, modules = cfg.num_hidden_layers, cfg.mtp.num_nextn_predict_layers
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    found = [f"model.layers.{first + k}.{copy}" for k in range(modules) for copy in copies]
    slots = {name: alias_of(name, cfg) for name in [HEAD, *found]}
    return {name: slot for name, slot in slots.items() if slot is not None}


def is_linear(leaf: str) -> bool:
    """Whether a leaf holds matrices that may stay quantized: attention, MLPs and experts."""
    return leaf.rpartition(".")[2] in LINEARS


def row_order(leaf: str, cfg: ModelConfig) -> np.ndarray | None:
    """Which stored row each of our rows is, for leaves with rotary rows stored interleaved.

    Rotary rows are the last `qk_rope_head_dim` of each query head, and of `kv_a_proj_with_mqa`.
    None: all rows stay where they are.
    """
    own = leaf.rpartition(".")[2]
    if not cfg.rope.rope_interleave:
        return None
    if own in ("q_proj", "q_b_proj"):
        heads, keep = cfg.num_attention_heads, cfg.mla.qk_nope_head_dim
    elif own == "kv_a_proj_with_mqa":
        heads, keep = 1, cfg.mla.kv_lora_rank
    else:
        return None
    rope = half_split_order(cfg.mla.qk_rope_head_dim)
    head = np.concatenate([np.arange(keep), keep + rope])
    return (np.arange(heads)[:, None] * len(head) + head).reshape(-1)
