"""dskjax: DeepSeek and Kimi models in JAX, as pure functions, with MTP speculation.

import dskjax
params, cfg = dskjax.load("examples/tiny-deepseek", dtype="float32")
logits = dskjax.apply(params, tokens, cfg=cfg)          # whole sequences, differentiable
result = dskjax.generate(params, cfg, [ids], max_tokens=32, drafts=2)
"""

from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.checkpoint.load import load
from dskjax.checkpoint.save import save_hf as save
from dskjax.config import ModelConfig
from dskjax.decode import generate
from dskjax.model import apply, head, init, mtp_chain, trunk
from dskjax.paged import forward, forward_mtp
from dskjax.presets import preset
from dskjax.quantise import quantise
from dskjax.tokenizer import Tokenizer
from pallas_kernels import dequantise

__all__ = [
    "ModelConfig",
    "RaggedBatch",
    "Tokenizer",
    "apply",
    "dequantise",
    "forward",
    "forward_mtp",
    "generate",
    "head",
    "init",
    "init_cache",
    "load",
    "mtp_chain",
    "preset",
    "quantise",
    "save",
    "trunk",
]
