"""A model that compiles in seconds, and packed batches for it."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dskjax.checkpoint import save_hf
from dskjax.config import MlaConfig, ModelConfig, MoeConfig, MtpConfig
from dskjax.model import init
from dskjax.tokenizer import Tokenizer
from train_mtp.data import Batch
from train_mtp.optim import AdamW
from train_mtp.step import Recipe

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-deepseek"


def model(vocab_size: int = 64, modules: int = 1) -> ModelConfig:
    """One dense and one MoE layer, and MTP modules; experts in groups."""
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        mla=MlaConfig(
            q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
        moe=MoeConfig(
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.0,
        ),
        first_k_dense_replace=1,
        mtp=MtpConfig(num_nextn_predict_layers=modules),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def write_trunk(folder: Path) -> list[str]:
    """A trunk of one layer with one module in `folder`/trunk, and text for it in train.txt; returns
    the documents.
    """
    tokenizer = Tokenizer.load(TOKENIZER)
    cfg = dataclasses.replace(
        model(vocab_size=6144),
        num_hidden_layers=1,
        first_k_dense_replace=0,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tuple(tokenizer.eos_ids),
    )
    params = jax.jit(lambda: init(cfg, jax.random.key(1), std=0.2))()
    save_hf(folder / "trunk", params, cfg)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / "trunk" / name)
    lines = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(60)]
    (folder / "train.txt").write_text("\x1e\n".join(lines) + "\x1e\n")
    return lines


def recipe(**changes) -> Recipe:
    """The recipe the tests share, so that they share its compiled step too."""
    given = {
        "cfg": model(),
        "optimizer": AdamW(lr=2e-2, warmup=3, steps=40),
        "precision": "float32",
    }
    return Recipe(**{**given, **changes})


def batch(rows: int = 8, columns: int = 16, vocab_size: int = 64, seed: int = 0) -> Batch:
    """Rows of documents of uneven length, with padding at the end of some rows."""
    rng = np.random.default_rng(seed)
    out = Batch(*(np.zeros((rows, columns), np.int32) for _ in range(3)))
    for row in range(rows):
        at, segment = 0, 1
        end = columns - (row % 3) * 2
        while at < end:
            length = min(int(rng.integers(1, columns)), end - at)
            cells = (row, slice(at, at + length))
            # Documents count upwards, so that there is something to learn.
            first = rng.integers(2, vocab_size)
            out.tokens[cells] = 2 + (first + np.arange(length)) % (vocab_size - 2)
            out.segment_ids[cells] = segment
            out.positions[cells] = np.arange(length)
            at, segment = at + length, segment + 1
    return out


@contextlib.contextmanager
def quick_compiler() -> Iterator[None]:
    """Compiles in half the time; toy steps take milliseconds either way."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
