"""Prometheus metrics of a server, under names of vLLM and SGLang with the prefix `dskjax:`.

Every metric has the label `model_name`. "engine" below stands for the labels `engine` and `role`;
metrics without them are of the whole server, where an answer may have had two engines. Counters
are exposed with the suffix `_total`.

| name | type | labels | meaning |
|---|---|---|---|
| num_requests_running | gauge | engine | requests with a slot |
| num_requests_waiting | gauge | engine | requests without one |
| kv_cache_usage_perc | gauge | engine | share of the cache's pages in use, 0 to 1 |
| remaining_slots | gauge | engine | more requests that would fit, at the mean output length |
| mean_output_length | gauge | engine | of the answers that ended lately, tokens |
| num_preemptions | counter | engine | requests that lost slot and pages and started over |
| prefix_cache_queries | counter | engine | prompt tokens looked up |
| prefix_cache_hits | counter | engine | prompt tokens found |
| spec_decode_num_drafts | counter | engine | rows that verified at least one draft token |
| spec_decode_num_draft_tokens | counter | engine | draft tokens tested |
| spec_decode_num_accepted_tokens | counter | engine | draft tokens accepted |
| spec_decode_num_accepted_tokens_per_pos | counter | engine, position | by place in the draft |
| draft_acceptance | gauge | engine, method, position | accepted / tested, since the start |
| engine_step_seconds | histogram | engine | from launch to result |
| engine_host_seconds | histogram | engine | of the host between two launches |
| dummy_steps | counter | engine | of ranks without a request, to keep in step with others |
| eplb_imbalance | gauge | engine, when | rows of experts, fullest over mean device |
| eplb_rebalances | counter | engine | times that experts were dealt out anew |
| eplb_moved_experts | counter | engine | slots that got another expert |
| compile_count_after_warmup | counter | engine | compilations that made a request wait |
| startup_time_seconds | gauge | engine | until it was warmed up |
| kv_transfer_latency_seconds | histogram | engine | of one request's cache on the wire |
| kv_transfer_bytes | counter | engine | received |
| kv_transfer_failed | counter | engine | transfers given up |
| transfer_mode | counter | engine, mode | transfers: layerwise, whole or merged |
| transfer_overlap_ratio | gauge | engine | share of transfer time hidden by prefill |
| time_to_first_token_seconds | histogram | | from arrival |
| inter_token_latency_seconds | histogram | | a gap with k new tokens counts as k gaps of a k-th |
| request_time_per_output_token_seconds | histogram | | mean of a request, first token left out |
| e2e_request_latency_seconds | histogram | | arrival to last token |
| request_queue_time_seconds | histogram | | arrival to first slot |
| request_prefill_time_seconds | histogram | | first slot to first token |
| request_decode_time_seconds | histogram | | first to last token |
| prompt_tokens | counter | | of requests that got a first token |
| generation_tokens | counter | | handed to clients |
| request_success | counter | finished_reason | answers that ended: stop, length, abort or error |
"""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serve.engine_metrics import EngineMetrics, Role
from serve.histogram import Histogram
from serve.request import FinishReason, Request

PREFIX = "dskjax:"
CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of `Metrics.expose`, for HTTP."""

_ENGINE = ("engine", "role")
FAMILIES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("num_requests_running", "gauge", _ENGINE, "requests with a slot"),
    ("num_requests_waiting", "gauge", _ENGINE, "requests without one"),
    ("kv_cache_usage_perc", "gauge", _ENGINE, "share of the cache's pages in use, 0 to 1"),
    (
        "remaining_slots",
        "gauge",
        _ENGINE,
        "more requests that would fit, at the mean output length",
    ),
    ("mean_output_length", "gauge", _ENGINE, "of the answers that ended lately, tokens"),
    ("num_preemptions", "counter", _ENGINE, "requests that lost slot and pages and started over"),
    ("prefix_cache_queries", "counter", _ENGINE, "prompt tokens looked up"),
    ("prefix_cache_hits", "counter", _ENGINE, "prompt tokens found"),
    ("spec_decode_num_drafts", "counter", _ENGINE, "rows that verified at least one draft token"),
    ("spec_decode_num_draft_tokens", "counter", _ENGINE, "draft tokens tested"),
    ("spec_decode_num_accepted_tokens", "counter", _ENGINE, "draft tokens accepted"),
    (
        "spec_decode_num_accepted_tokens_per_pos",
        "counter",
        (*_ENGINE, "position"),
        "by place in the draft",
    ),
    (
        "draft_acceptance",
        "gauge",
        (*_ENGINE, "method", "position"),
        "accepted / tested, since the start",
    ),
    ("engine_step_seconds", "histogram", _ENGINE, "from launch to result"),
    ("engine_host_seconds", "histogram", _ENGINE, "of the host between two launches"),
    ("dummy_steps", "counter", _ENGINE, "of ranks without a request, to keep in step with others"),
    (
        "eplb_imbalance",
        "gauge",
        (*_ENGINE, "when"),
        "rows of experts, fullest over mean device",
    ),
    ("eplb_rebalances", "counter", _ENGINE, "times that experts were dealt out anew"),
    ("eplb_moved_experts", "counter", _ENGINE, "slots that got another expert"),
    ("compile_count_after_warmup", "counter", _ENGINE, "compilations that made a request wait"),
    ("startup_time_seconds", "gauge", _ENGINE, "until it was warmed up"),
    ("kv_transfer_latency_seconds", "histogram", _ENGINE, "of one request's cache on the wire"),
    ("kv_transfer_bytes", "counter", _ENGINE, "received"),
    ("kv_transfer_failed", "counter", _ENGINE, "transfers given up"),
    ("transfer_mode", "counter", (*_ENGINE, "mode"), "transfers: layerwise, whole or merged"),
    (
        "transfer_overlap_ratio",
        "gauge",
        _ENGINE,
        "share of transfer time hidden by prefill",
    ),
    ("time_to_first_token_seconds", "histogram", (), "from arrival"),
    (
        "inter_token_latency_seconds",
        "histogram",
        (),
        "a gap with k new tokens counts as k gaps of a k-th",
    ),
    (
        "request_time_per_output_token_seconds",
        "histogram",
        (),
        "mean of a request, first token left out",
    ),
    ("e2e_request_latency_seconds", "histogram", (), "arrival to last token"),
    ("request_queue_time_seconds", "histogram", (), "arrival to first slot"),
    ("request_prefill_time_seconds", "histogram", (), "first slot to first token"),
    ("request_decode_time_seconds", "histogram", (), "first to last token"),
    ("prompt_tokens", "counter", (), "of requests that got a first token"),
    ("generation_tokens", "counter", (), "handed to clients"),
    (
        "request_success",
        "counter",
        ("finished_reason",),
        "answers that ended: stop, length, abort or error",
    ),
)
"""The table: name, type, labels beside `model_name`, meaning."""

_GAP_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
_REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
)
_STEP_BUCKETS = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
_BUCKETS = {
    "engine_step_seconds": _STEP_BUCKETS,
    "engine_host_seconds": _STEP_BUCKETS,
    "kv_transfer_latency_seconds": _FIRST_TOKEN_BUCKETS,
    "time_to_first_token_seconds": _FIRST_TOKEN_BUCKETS,
    "inter_token_latency_seconds": _GAP_BUCKETS,
    "request_time_per_output_token_seconds": _GAP_BUCKETS,
}


class Metrics:
    """All metrics of one server, in a registry of their own. Methods may be called by any thread.

    Args:
        model: name under which the model is served.

    Attributes:
        registry: holds these metrics and no others.
    """

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._model = model
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        for name, kind, labels, meaning in FAMILIES:
            self._families[name] = self._family(name, kind, ("model_name", *labels), meaning)
        self._first_token = self._series("time_to_first_token_seconds")
        self._gap = self._series("inter_token_latency_seconds")
        self._per_token = self._series("request_time_per_output_token_seconds")
        self._e2e = self._series("e2e_request_latency_seconds")
        self._queue = self._series("request_queue_time_seconds")
        self._prefill = self._series("request_prefill_time_seconds")
        self._decode = self._series("request_decode_time_seconds")
        self._prompt_tokens = self._series("prompt_tokens")
        self._generation_tokens = self._series("generation_tokens")
        self._ends = {reason: self._series("request_success", reason) for reason in FinishReason}

    def engine(self, name: str, role: Role = "both") -> "EngineMetrics":
        """The metrics of one engine."""
        return EngineMetrics(lambda metric, *labels: self._series(metric, name, role, *labels))

    def expose(self) -> bytes:
        """Everything in Prometheus' text format; see `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """An answer's first tokens came so long after its request."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def between_tokens(self, seconds: float, times: int) -> None:
        """So many tokens came so long after the one before; see the table for several at once."""
        self._gap.observe(seconds, times)

    def generated(self, tokens: int) -> None:
        """New tokens of all answers in one step."""
        self._generation_tokens.inc(tokens)

    def finished(self, request: Request, reason: FinishReason, now: float) -> None:
        """An answer ended at `now`, on the clock of the request's times.

        The times of one that was aborted or failed are left out: they say nothing of the server.
        """
        self._ends[reason].inc()
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._e2e.observe(now - request.arrival)
        scheduled, first, last = request.first_scheduled, request.first_token, request.last_token
        if scheduled is None:
            return
        self._queue.observe(scheduled - request.arrival)
        if first is None:
            return
        self._prefill.observe(first - scheduled)
        if last is not None and last > first:
            self._decode.observe(last - first)
            self._per_token.observe((last - first) / max(request.emitted - 1, 1))

    def _family(self, name: str, kind: str, labels: Sequence[str], meaning: str):
        if kind == "histogram":
            buckets = _BUCKETS.get(name, _REQUEST_BUCKETS)
            return Histogram(
                PREFIX + name, meaning, labels, buckets=buckets, registry=self.registry
            )
        make = {"counter": Counter, "gauge": Gauge}[kind]
        return make(PREFIX + name, meaning, labels, registry=self.registry)

    def _series(self, name: str, *labels: str) -> Any:
        return self._families[name].labels(self._model, *labels)
