"""Metrics: what is exposed, under which names, and that the numbers are right."""

import re
import threading

import numpy as np
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics as module
from serve.histogram import Histogram
from serve.metrics import Metrics
from serve.request import FinishReason
from tests.serve.text_fakes import request

WHOLE = {"model_name": "tiny"}
ENGINE = {**WHOLE, "engine": "e0", "role": "decode"}

# What dashboards made for other servers look for, beside the prefix.
KNOWN = """num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total
prefix_cache_queries_total prefix_cache_hits_total time_to_first_token_seconds_bucket
inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket
e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket
request_prefill_time_seconds_bucket request_decode_time_seconds_bucket prompt_tokens_total
generation_tokens_total request_success_total spec_decode_num_drafts_total
spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
spec_decode_num_accepted_tokens_per_pos_total startup_time_seconds""".split()


def used() -> Metrics:
    """Every metric touched once."""
    metrics = Metrics("tiny")
    engine = metrics.engine("e0", "decode")
    engine.state(running=3, waiting=2, kv_usage=0.25, remaining_slots=5, mean_output_length=99.5)
    engine.state(running=4, waiting=1, kv_usage=0.5)
    engine.step(seconds=0.01, host_seconds=0.002)
    engine.step(seconds=0.02, host_seconds=0.001, dummy=3)
    engine.balanced(before=1.75, after=1.25, moves=5)
    engine.prefix(queries=100, hits=64)
    engine.preempted(2)
    engine.drafts("block", offered=np.array([2, 2, 0, 1]), accepted=np.array([2, 1, 0, 0]))
    engine.drafts("block", offered=np.array([0, 0]), accepted=np.array([0, 0]))
    engine.drafts("typical", offered=np.array([2]), accepted=np.array([2]))
    engine.compiled()
    engine.started(12.5)
    engine.transferred("layerwise", seconds=2.0, hidden_seconds=1.5, size=1000)
    engine.transferred("whole", seconds=1.0, hidden_seconds=0.0, size=500)
    engine.transfer_failed()
    metrics.first_token(0.25, prompt_tokens=7)
    metrics.between_tokens(0.03, times=3)
    metrics.generated(4)
    ended = request()
    ended.tokens += [1, 2, 3, 4, 5]
    ended.arrival, ended.first_scheduled = 10.0, 10.5
    ended.first_token, ended.last_token = 11.5, 13.5
    metrics.finished(ended, FinishReason.STOP, 14.0)
    metrics.finished(request(), FinishReason.ABORT, 1e6)
    return metrics


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value("dskjax:" + name, labels)


def test_the_table_is_what_the_registry_holds():
    rows = re.findall(r"^\| (\w+) \| (\w+) \|(.*?)\| (.*) \|$", module.__doc__ or "", re.M)[1:]
    table = {}
    for name, kind, labels, meaning in rows:
        named = [label.strip() for label in labels.split(",") if label.strip()]
        if named[:1] == ["engine"]:
            named[:1] = ["engine", "role"]
        table["dskjax:" + name] = (kind, {"model_name", *named}, meaning)
    assert len(table) == len(rows) == len(module.FAMILIES)
    held = {}
    for family in used().registry.collect():
        labels = {key for sample in family.samples for key in sample.labels}
        held[family.name] = (family.type, labels - {"le"}, family.documentation)
    assert held == table


def test_the_exposition_parses_and_has_the_known_names():
    text = used().expose().decode()
    families = list(text_string_to_metric_families(text))
    names = {sample.name for family in families for sample in family.samples}
    assert {"dskjax:" + name for name in KNOWN} <= names
    assert all(family.documentation for family in families if not family.name.endswith("_created"))
    by_name = {family.name: family for family in families}
    buckets = [s for s in by_name["dskjax:time_to_first_token_seconds"].samples if "le" in s.labels]
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)
    assert buckets[-1].labels["le"] == "+Inf" and buckets[-1].value == 1


def test_engine_values():
    metrics = used()
    for name, expected in {
        "num_requests_running": 4,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 0.5,
        "remaining_slots": 5,
        "mean_output_length": 99.5,
        "num_preemptions_total": 2,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 64,
        "spec_decode_num_drafts_total": 4,
        "spec_decode_num_draft_tokens_total": 7,
        "spec_decode_num_accepted_tokens_total": 5,
        "engine_step_seconds_sum": 0.03,
        "engine_host_seconds_count": 2,
        "dummy_steps_total": 3,
        "eplb_rebalances_total": 1,
        "eplb_moved_experts_total": 5,
        "compile_count_after_warmup_total": 1,
        "startup_time_seconds": 12.5,
        "kv_transfer_latency_seconds_sum": 3.0,
        "kv_transfer_bytes_total": 1500,
        "kv_transfer_failed_total": 1,
        "transfer_overlap_ratio": 0.5,
    }.items():
        assert value(metrics, name, **ENGINE) == pytest.approx(expected), name
    for when, expected in {"before": 1.75, "after": 1.25}.items():
        assert value(metrics, "eplb_imbalance", **ENGINE, when=when) == expected
    for mode, expected in {"layerwise": 1, "whole": 1, "merged": 0}.items():
        assert value(metrics, "transfer_mode_total", **ENGINE, mode=mode) == expected


def test_acceptance_by_place():
    metrics = used()
    accepted = "spec_decode_num_accepted_tokens_per_pos_total"
    assert value(metrics, accepted, **ENGINE, position="0") == 3
    assert value(metrics, accepted, **ENGINE, position="1") == 2
    for method, position, expected in [
        ("block", "0", 2 / 3),
        ("block", "1", 1 / 2),
        ("typical", "0", 1),
        ("typical", "1", 1),
        ("block", "2", None),
    ]:
        got = value(metrics, "draft_acceptance", **ENGINE, method=method, position=position)
        assert got == (None if expected is None else pytest.approx(expected))


def test_request_values():
    metrics = used()
    for name, expected in {
        "time_to_first_token_seconds_sum": 0.25,
        "inter_token_latency_seconds_sum": 0.09,
        "inter_token_latency_seconds_count": 3,
        "request_time_per_output_token_seconds_sum": 0.5,
        "e2e_request_latency_seconds_sum": 4.0,
        "e2e_request_latency_seconds_count": 1,  # of the aborted one nothing
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 1.0,
        "request_decode_time_seconds_sum": 2.0,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 4,
    }.items():
        assert value(metrics, name, **WHOLE) == pytest.approx(expected), name
    for reason, expected in {"stop": 1, "length": 0, "abort": 1, "error": 0}.items():
        got = value(metrics, "request_success_total", **WHOLE, finished_reason=reason)
        assert got == expected


def test_a_request_that_never_ran_has_only_its_end():
    metrics = Metrics("tiny")
    metrics.finished(request(), FinishReason.LENGTH, 1.0)
    assert value(metrics, "e2e_request_latency_seconds_count", **WHOLE) == 1
    assert value(metrics, "request_queue_time_seconds_count", **WHOLE) == 0


def test_servers_and_engines_of_one_process_do_not_mix():
    one, two = Metrics("tiny"), Metrics("tiny")
    one.engine("e0", "decode").preempted()
    one.engine("e1", "decode").preempted(5)
    two.engine("e0", "decode").preempted(7)
    assert value(one, "num_preemptions_total", **ENGINE) == 1
    assert value(two, "num_preemptions_total", **ENGINE) == 7


# ------------------------------------------------------------------ histogram

BOUNDS = [0.001, 0.5, 1.0, 10.0]


@given(st.lists(st.tuples(st.sampled_from([*BOUNDS, 0.0, 0.7, 11.0, -1.0]), st.integers(1, 3))))
def test_histogram_equals_the_librarys(observed):
    registry = prometheus_client.CollectorRegistry()
    ours = Histogram("ours", "o", ["a"], buckets=BOUNDS, registry=registry).labels("x")
    theirs = prometheus_client.Histogram("theirs", "t", ["a"], buckets=BOUNDS, registry=registry)
    reference = theirs.labels("x")
    for number, times in observed:
        ours.observe(number, times)
        for _ in range(times):
            reference.observe(number)
    families = {
        f.name: f.samples
        for f in text_string_to_metric_families(
            prometheus_client.generate_latest(registry).decode()
        )
    }
    expected = {s.name[len("theirs") :] + str(s.labels): s.value for s in families["theirs"]}
    got = {s.name[len("ours") :] + str(s.labels): s.value for s in families["ours"]}
    assert got == pytest.approx({k: v for k, v in expected.items() if "_created" not in k})


def test_histogram_loses_nothing_between_threads():
    registry = prometheus_client.CollectorRegistry()
    family = Histogram("h", "h", [], buckets=BOUNDS, registry=registry)

    def work():
        for _ in range(2000):
            family.labels().observe(0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.get_sample_value("h_count") == 8000


def test_histogram_refuses_what_cannot_be():
    registry = prometheus_client.CollectorRegistry()
    for buckets in ([], [1.0, 1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="increasing"):
            Histogram("h", "h", [], buckets=buckets, registry=registry)
    family = Histogram("h", "h", ["a"], buckets=BOUNDS, registry=registry)
    with pytest.raises(ValueError, match="one for each"):
        family.labels()
