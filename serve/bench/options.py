"""What to measure and how: every setting of `dskjax bench serve`."""

import dataclasses
from pathlib import Path
from typing import Any

from serve.bench.arrivals import Process
from serve.bench.summary import Objectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """A measurement. Exactly one of `rate`, `concurrency` and `search_from` says how to load.

    Attributes:
        url: of the server, with or without a trailing /v1.
        model: which one; None: the server's first.
        api_key: sent as a bearer token.
        prompts: file of real prompts, see `serve.bench.prompts`; None: drawn from `text`.
        document_chars: most characters of a document of `prompts` that is plain text.
        max_tokens: most new tokens of a real prompt's answer.
        text: file whose text drawn prompts are cut from.
        tokenizer: folder of tokenizer.json for that; None: the server's /tokenize.
        input_mean, input_max, output_mean, output_max: laws of drawn lengths, in tokens.
        scale: factor on all four.
        rate: open loop: requests a second.
        arrivals: of the open loop.
        concurrency: closed loop: requests under way.
        search_from: search for the highest rate within the objectives, from this one.
        tolerance: how closely the search ends, as a share.
        probes: most rates the search tries.
        probe_seconds: least seconds of requests at each of them.
        requests: measured in each run; in a search, at least.
        warmup: requests before them, which are not measured.
        repeats: runs; in a search, of the best rate.
        references: greedy requests that are compared alone and under load; 0: no check.
        objectives: for goodput and search.
        options: further fields of every request, such as temperature.
        seed: of prompts, lengths, arrivals and sampling.
        timeout: seconds without a piece after which a request has failed.
        device: what the server runs on, where it does not say.

    Raises:
        ValueError: a value is out of range, or settings contradict each other.
    """

    url: str
    model: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    prompts: Path | None = None
    document_chars: int = 400
    max_tokens: int = 256
    text: Path | None = None
    tokenizer: Path | None = None
    input_mean: float = 3500.0
    input_max: int = 16_000
    output_mean: float = 1200.0
    output_max: int = 32_000
    scale: float = 1.0
    rate: float | None = None
    arrivals: Process = "poisson"
    concurrency: int | None = None
    search_from: float | None = None
    tolerance: float = 0.05
    probes: int = 12
    probe_seconds: float = 60.0
    requests: int = 100
    warmup: int = 4
    repeats: int = 1
    references: int = 4
    objectives: Objectives = dataclasses.field(default_factory=Objectives)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    timeout: float = 600.0
    device: str | None = None

    def __post_init__(self):
        ways = (self.rate, self.concurrency, self.search_from)
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                f"rate={self.rate}, concurrency={self.concurrency}, "
                f"search_from={self.search_from}: give exactly one of them"
            )
        if any(way is not None and not way > 0 for way in ways):
            raise ValueError("a rate or concurrency must be positive")
        if (self.prompts is None) == (self.text is None):
            raise ValueError(
                "give either real prompts (--prompts FILE) or a text to cut prompts of drawn "
                "lengths from (--text FILE): drafts for random tokens would never be accepted"
            )
        for name in ("requests", "repeats", "probes", "max_tokens", "document_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup", "references", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("scale", "timeout", "tolerance", "probe_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.arrivals not in ("poisson", "constant"):
            raise ValueError(f"arrivals={self.arrivals!r} must be poisson or constant")

    def settings(self) -> dict[str, Any]:
        """All of it for JSON, without the key."""
        values = dataclasses.asdict(self)
        del values["api_key"]
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
