"""What the kernels of a training step are spent on, by their names and by the program's scopes."""

import re
from typing import Any

KINDS = {
    "attention": ("sdpa", "flash", "fmha", "mla_"),
    "expert products": ("grouped_matmul",),
    "dense products": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk", "matmul"),
}
"""Words in the names of kernels, tried in this order; the others are "rest"."""
SCOPES = (
    *("optimizer", "teacher", "loss", "lm_head", "embed", "mla_prefill", "expert_mlp"),
    *("gate", "shared_experts", "mtp", "moe", "mla", "mlp"),
)
"""Where in the program the rest belongs, by the first of these that its name in it has."""


def scopes(program: str) -> dict[str, str]:
    """Where each kernel that XLA made belongs, by the kernel's name.

    Args:
        program: text of the compiled module.
    """
    found = {}
    for name, path in re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', program):
        words = set(re.split(r"[/()]", path))
        scope = next((scope for scope in SCOPES if scope in words), None)
        if scope is not None:
            found[re.sub(r"\W", "_", name)] = scope
    return found


def shares(kernels: list[tuple[str, float, int]], where: dict[str, str]) -> dict[str, Any]:
    """What the time goes to: by kind, the rest by scope, and the three largest of these.

    Args:
        kernels: (name, microseconds, launches).
        where: scopes by name.
    """
    kinds, rest = dict.fromkeys((*KINDS, "rest"), 0.0), {}
    for name, us, _ in kernels:
        pairs = ((kind, word) for kind, words in KINDS.items() for word in words)
        kind = next((kind for kind, word in pairs if word in name.lower()), "rest")
        kinds[kind] += us
        if kind == "rest":
            scope = where.get(name, "elsewhere")
            rest[scope] = rest.get(scope, 0.0) + us
    costs = {kind: us for kind, us in kinds.items() if kind != "rest"}
    costs |= {f"rest: {scope}": us for scope, us in rest.items()}
    return {
        "kernels_us": sum(kinds.values()),
        "launches": sum(launches for *_, launches in kernels),
        "by_kind_us": kinds,
        "rest_us": dict(sorted(rest.items(), key=lambda pair: -pair[1])),
        "largest": sorted(costs.items(), key=lambda pair: -pair[1])[:3],
    }


def rates(operations: dict[str, float], by_kind_us: dict[str, float]) -> dict[str, float]:
    """TFLOP/s of each kind that ran. Work that is done again to save memory adds time only."""
    return {
        kind: each / by_kind_us[kind] / 1e6 for kind, each in operations.items() if by_kind_us[kind]
    }
