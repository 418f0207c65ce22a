"""The least time a decode step can take: bytes over bandwidth, operations over peak, whichever is
longer.

One GPU of an attention-data-parallel, expert-parallel group holds all weights but the routed
experts, of which it holds 1/ep. A step reads every weight it touches once and every cached row of
its sequences once, and computes `verify` tokens a sequence in absorbed form. With tensor
parallelism, tp GPUs share heads, widths and vocabulary, and each keeps the latent cache of all
their sequences. Communication (`dskjax.traffic`), launch gaps and sampling are left out: no program
is faster than this.
"""

import dataclasses
from typing import Literal

from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, count, named_leaves
from dskjax.presets import preset

Experts = Literal["int4", "fp8", "bf16"]
CacheLayout = Literal["bf16", "fp8_tensor", "fp8_tile"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense datasheet peaks of a GPU.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second of device memory.
        bf16: FLOP/s of bf16 matrix products.
        fp8: FLOP/s of fp8 matrix products.
        nvlink: bytes per second it can send to GPUs of its node; half of the both-way figure.
        network: bytes per second it can send to other nodes; a NIC of 400 Gb/s for each GPU.
    """

    memory: float
    bandwidth: float
    bf16: float
    fp8: float
    nvlink: float
    network: float = 50e9


_HOPPER = {"bf16": 989e12, "fp8": 1979e12}
GPUS = {
    "h20": Gpu(memory=96e9, bandwidth=4.0e12, bf16=148e12, fp8=296e12, nvlink=450e9),
    "h800": Gpu(memory=80e9, bandwidth=3.35e12, nvlink=200e9, **_HOPPER),
    "h100": Gpu(memory=80e9, bandwidth=3.35e12, nvlink=450e9, **_HOPPER),
    "h200": Gpu(memory=141e9, bandwidth=4.8e12, nvlink=450e9, **_HOPPER),
}

EXPERT_BYTES: dict[Experts, float] = {
    "int4": 0.5 + 2 / 128,  # a bf16 scale per 128 inputs
    "fp8": 1 + 4 / 128**2,  # an fp32 scale per 128x128 block
    "bf16": 2.0,
}
"""Bytes of one routed expert weight, scales included."""


def cache_bytes_per_token(
    cfg: ModelConfig, layout: CacheLayout = "bf16", *, mtp: bool = True
) -> int:
    """Bytes the latent cache holds per token: a latent and a rope key per layer.

    Args:
        cfg: the model.
        layout: "bf16"; "fp8_tensor": latent and rope key in e4m3, one scale for all (TensorRT-LLM);
            "fp8_tile": latent in e4m3 with an fp32 scale per 128 channels, rope key in bf16
            (FlashMLA, and our `kv_dtype="fp8"`).
        mtp: count the layers of MTP modules.

    Raises:
        ValueError: an unknown layout.
    """
    latent, rope = cfg.mla.kv_lora_rank, cfg.mla.qk_rope_head_dim
    layouts: dict[CacheLayout, int] = {
        "bf16": 2 * (latent + rope),
        "fp8_tensor": latent + rope,
        "fp8_tile": latent + 4 * -(-latent // 128) + 2 * rope,
    }
    if layout not in layouts:
        raise ValueError(f"cache layout {layout!r} must be one of {', '.join(layouts)}")
    return layouts[layout] * (cfg.num_cache_layers if mtp else cfg.num_hidden_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """Lower bounds of one decode step on one GPU, in seconds.

    Attributes:
        weights: reading weights.
        cache: reading the latent cache.
        linear: products with weights.
        core: attention over cached tokens.
        batch: sequences on the GPU.
    """

    weights: float
    cache: float
    linear: float
    core: float
    batch: int

    @property
    def step(self) -> float:
        """The longer of memory time and compute time."""
        return max(self.weights + self.cache, self.linear + self.core)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return "memory" if self.weights + self.cache >= self.linear + self.core else "compute"

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of this GPU when each step yields one token a sequence."""
        return self.batch / self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model costs, counted from its declared shapes.

    Attributes:
        routed: weights of all routed experts of the trunk.
        other: trunk weights that every token uses, embedding and head left out.
        whole: of these, what tensor parallelism does not split: down projections to the latents,
            gates and norms.
        vectors: of these, norms and biases, in no product.
        head: weights of the output head.
        linear_flops: operations per token in products with weights, head left out.
        core_flops: operations per token and cached token in attention.
    """

    routed: int
    other: int
    whole: int
    vectors: int
    head: int
    linear_flops: int
    core_flops: int


def parts(cfg: ModelConfig) -> Parts:
    """Counts a model's parts."""
    specs = {
        k: v
        for k, v in param_specs(cfg).items()
        if k not in ("embed_tokens", "lm_head", "mtp_layers")
    }
    named = dict(named_leaves(specs))
    routed, split, whole = _by_split(specs)
    other = split + whole
    layers, heads, mla = cfg.num_hidden_layers, cfg.num_attention_heads, cfg.mla
    chosen = (
        0 if cfg.moe is None else routed // cfg.moe.n_routed_experts * cfg.moe.num_experts_per_tok
    )
    vectors = sum(
        count({"w": spec}) for spec in named.values() if len(spec.shape) < 3
    )  # stacked norms and biases
    # kv_b_proj is used absorbed: once on the query side and once on the value side, as many
    # operations as its product.
    return Parts(
        routed=routed,
        other=other,
        whole=whole,
        vectors=vectors,
        head=cfg.vocab_size * cfg.hidden_size,
        linear_flops=2 * (other - vectors + chosen),
        core_flops=layers * 2 * heads * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim),
    )


_TENSOR_AXES = {"heads", "mlp", "vocab"}
"""Logical axes that tensor parallelism splits."""


def _by_split(specs: Params) -> tuple[int, int, int]:
    """Weights of routed experts; of the rest those that tensor parallelism splits, and others."""
    routed = split = whole = 0
    for name, spec in named_leaves(specs):
        size = count({"w": spec})
        if ".experts." in name:
            routed += size
        elif _TENSOR_AXES.intersection(spec.axes):
            split += size
        else:
            whole += size
    return routed, split, whole


def roofline(
    model: ModelConfig | str,
    hw: Gpu | str,
    batch: int,
    ctx: int,
    ep: int = 1,
    m: int = 1,
    *,
    experts: Experts = "int4",
    cache: CacheLayout = "fp8_tensor",
    fp8_attention: bool = False,
    tp: int = 1,
    redundant: int = 0,
) -> Floor:
    """Bounds one decode step.

    Args:
        model: the model, or the name of its preset.
        hw: peaks of the GPU, or its name in `GPUS`.
        batch: sequences per GPU; tp GPUs work on `tp * batch` together.
        ctx: cached tokens per sequence.
        ep: GPUs, or groups of tp GPUs, that share the experts; each brings sequences of its own.
        m: tokens verified per sequence, 1 + drafts.
        experts: format of the routed experts; all other weights are fp8, the head bf16.
        cache: layout of the latent cache.
        fp8_attention: attention products in fp8 instead of bf16.
        tp: GPUs that share every layer.
        redundant: further copies of routed experts, each of another one, that take part of its
            tokens; per layer.

    Raises:
        ValueError: an unknown name, or a size below 1.
    """
    cfg, gpu = _model(model), _gpu(hw)
    for name, value in dict(batch=batch, ctx=ctx, ep=ep, m=m, tp=tp).items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    p = parts(cfg)
    held = weights_held(cfg, ep, tp=tp, redundant=redundant, experts=experts)
    hit = _hit(cfg, batch * m * ep * tp, redundant)
    weights = (held.routed + held.redundant) * hit + held.rest + held.vocab / 2
    cached = batch * tp * ctx * cache_bytes_per_token(cfg, cache, mtp=False)
    # Every GPU of a tensor-parallel group computes the whole products for all of its sequences.
    linear = p.linear_flops + 2 * (tp - 1) * (p.whole - p.vectors)
    return Floor(
        weights=weights / gpu.bandwidth,
        cache=cached / gpu.bandwidth,
        linear=batch * m * (linear / gpu.fp8 + 2 * p.head / gpu.bf16),
        core=batch * m * ctx * p.core_flops / (gpu.fp8 if fp8_attention else gpu.bf16),
        batch=batch,
    )


def _hit(cfg: ModelConfig, tokens: int, redundant: int) -> float:
    """Part of the slots for experts that at least one of the tokens reaches, if choices are uniform
    and an expert's copies share its tokens evenly.
    """
    if cfg.moe is None:
        return 0.0
    experts = cfg.moe.n_routed_experts
    chance = cfg.moe.num_experts_per_tok / experts
    copies, more = divmod(experts + redundant, experts)
    slots = {copies: (experts - more) * copies, copies + 1: more * (copies + 1)}
    hit = sum(n * (1 - (1 - chance / of) ** tokens) for of, n in slots.items())
    return hit / (experts + redundant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of weights on one GPU of a mesh.

    Attributes:
        routed: its part of the trunk's routed experts.
        redundant: its part of their further copies.
        rest: all else of the trunk's layers.
        vocab: embedding and head.
        mtp: MTP modules, their experts and further copies of these included.
    """

    routed: float
    redundant: float
    rest: float
    vocab: float
    mtp: float

    @property
    def trunk(self) -> float:
        """All but the MTP modules."""
        return self.routed + self.redundant + self.rest + self.vocab

    @property
    def total(self) -> float:
        """All."""
        return self.trunk + self.mtp


def weights_held(
    model: ModelConfig | str,
    ep: int = 1,
    *,
    tp: int = 1,
    redundant: int = 0,
    experts: Experts = "int4",
) -> Weights:
    """Counts the weights on one GPU; the arguments are those of `roofline`.

    Embedding and head are bf16 and two, as is a module's `eh_proj`; all else but routed experts is
    fp8.
    """
    cfg = _model(model)
    p, form = parts(cfg), _expert_bytes(experts) / (ep * tp)
    more = 0.0 if cfg.moe is None else redundant / cfg.moe.n_routed_experts
    modules = param_specs(cfg).get("mtp_layers", {})
    routed, split, whole = _by_split(modules)
    joins = count({"eh_proj": modules["eh_proj"]}) if modules else 0
    return Weights(
        routed=p.routed * form,
        redundant=p.routed * form * more,
        rest=(p.other - p.whole) / tp + p.whole,
        vocab=4 * p.head / tp,
        mtp=routed * form * (1 + more) + split / tp + whole + joins,
    )


def memory_needed(
    model: ModelConfig | str,
    batch: int,
    ctx: int,
    ep: int = 1,
    *,
    experts: Experts = "int4",
    cache: CacheLayout = "fp8_tensor",
    tp: int = 1,
    redundant: int = 0,
) -> float:
    """Bytes one GPU holds: the trunk's weights and its sequences' cache. Arguments are those of
    `roofline`.
    """
    cfg = _model(model)
    weights = weights_held(cfg, ep, tp=tp, redundant=redundant, experts=experts).trunk
    return weights + batch * tp * ctx * cache_bytes_per_token(cfg, cache, mtp=False)


def _model(model: ModelConfig | str) -> ModelConfig:
    return preset(model) if isinstance(model, str) else model


def _gpu(hw: Gpu | str) -> Gpu:
    if isinstance(hw, Gpu):
        return hw
    if hw not in GPUS:
        raise ValueError(f"unknown GPU {hw!r}; known: {', '.join(GPUS)}")
    return GPUS[hw]


def _expert_bytes(experts: Experts) -> float:
    if experts not in EXPERT_BYTES:
        raise ValueError(f"{experts=} must be one of {', '.join(EXPERT_BYTES)}")
    return EXPERT_BYTES[experts]
