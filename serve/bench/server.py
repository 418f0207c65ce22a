"""What a server tells of itself beside answers: its model, its version, its counters, its tokens.

Only the model is required; the rest is there or not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

_COUNTERS = (
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "kv_transfer_bytes",
    "kv_transfer_failed",
    "compile_count_after_warmup",
)
"""What vLLM's and this project's counters are called after the prefix."""
_PIECE = 200_000  # characters a request: bodies are limited


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """A server that answered.

    Attributes:
        model: the one to be measured.
        max_model_len: most tokens of prompt and answer, if it says so.
        version: what its /version says; empty if it has none.
    """

    model: str
    max_model_len: int | None
    version: Mapping[str, Any]


async def ask_info(http: httpx2.AsyncClient, *, model: str | None = None) -> ServerInfo:
    """Asks for the models and the version.

    Args:
        http: client of the server.
        model: which one; None: the first.

    Raises:
        ValueError: no server answers there, or it has no such model.
    """
    try:
        answer = await http.get("/v1/models")
    except httpx2.HTTPError as error:
        raise ValueError(
            f"no server answers at {http.base_url}: {error or type(error).__name__}"
        ) from error
    try:
        found = {str(entry["id"]): entry for entry in answer.json()["data"]}
        name = next(iter(found)) if model is None else model
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{http.base_url} answers /v1/models with HTTP {answer.status_code} and lists no "
            f"model: {answer.text[:200]}"
        ) from error
    if name not in found:
        raise ValueError(f"the server has no model {name!r}; it has {', '.join(found)}")
    limit = found[name].get("max_model_len")
    version = await http.get("/version")
    told = version.json() if version.status_code == 200 else {}
    return ServerInfo(
        model=name,
        max_model_len=limit if isinstance(limit, int) else None,
        version=told if isinstance(told, dict) else {},
    )


async def ask_counters(http: httpx2.AsyncClient) -> dict[str, float] | None:
    """Counters of /metrics by name, summed over engines; None if the server shows none."""
    answer = await http.get("/metrics", follow_redirects=True)
    if answer.status_code != 200:
        return None
    return sum_counters(answer.text) or None


def sum_counters(text: str) -> dict[str, float]:
    """The counters that are known here, of a page in Prometheus' text format."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        name = family.name.rpartition(":")[2]
        if name in _COUNTERS:
            values = [s.value for s in family.samples if s.name == family.name + "_total"]
            totals[name] = totals.get(name, 0.0) + sum(values)
    return totals


async def tokenize(
    http: httpx2.AsyncClient, model: str, text: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before every prompt, ids of a text), by the server's own /tokenize.

    Raises:
        ValueError: it has none.
    """

    async def ids(part: str, special: bool) -> tuple[int, ...]:
        body = {"model": model, "prompt": part, "add_special_tokens": special}
        answer = await http.post("/tokenize", json=body)
        try:
            if answer.status_code == 200:
                return tuple(answer.json()["tokens"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"/tokenize answers {answer.text[:200]!r}") from error
        raise ValueError(
            f"the server does not tokenize (HTTP {answer.status_code}): give --tokenizer, the "
            "folder of the model's tokenizer.json"
        )

    bare = await ids("a", False)
    full = await ids("a", True)
    front = full[: len(full) - len(bare)] if full[len(full) - len(bare) :] == bare else ()
    found: list[int] = []
    for start in range(0, len(text), _PIECE):
        found += await ids(text[start : start + _PIECE], False)
    return front, tuple(found)
