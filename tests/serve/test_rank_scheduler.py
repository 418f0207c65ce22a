"""Requests of several ranks behind one scheduler: who gets them, and what a step of all is."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from serve.agree import Sizes, agree
from serve.buckets import Bucket, Variant
from serve.build import build_engine, place
from serve.config import RoleConfig, parse_roles
from serve.drafting import DraftPolicy
from serve.engine_api import Role
from serve.errors import OverloadedError
from serve.plan import StepResult
from serve.request import FinishReason, SamplingOptions, Status
from serve.start import ServerOptions, _limits
from tests.serve.fake import continuation
from tests.serve.harness import EOS, long_answer, make_request, prompt
from tests.serve.rank_bench import BUCKETS, Devices, make
from tests.serve.stack import Answers, small, toy_model


def test_requests_go_where_there_is_most_room():
    scheduler = make(ranks=3, num_pages=16, num_slots=2)
    sizes = (20, 9, 4, 4, 30, 4)
    for i, size in enumerate(sizes):
        scheduler.add(make_request(f"r{i}", prompt(size, i)))
    # Rank 2 has more room left than rank 1, then both have no slot; the next ones fill the first.
    assert [scheduler.rank_of(f"r{i}") for i in range(6)] == [0, 1, 2, 2, 1, 0]
    assert scheduler.stats().waiting == 6


def test_a_request_never_moves_and_gets_what_it_gets_alone():
    scheduler = make(ranks=3, drafts=2, num_pages=8, max_columns=8)
    devices, homes = Devices(scheduler), {}
    asked = {f"r{i}": make_request(f"r{i}", prompt(2 + i, i), 16) for i in range(12)}
    for request in asked.values():
        scheduler.add(request)
        homes[request.id] = scheduler.rank_of(request.id)
    busy = True
    while busy:
        busy = devices.step()
        now = {id: scheduler.rank_of(id) for id in asked}
        assert all(at in (None, homes[id]) for id, at in now.items())
    for id, request in asked.items():
        assert (
            devices.tokens[id]
            == continuation(prompt(2 + int(id[1:]), int(id[1:])), request.stop, EOS)[0]
        )
    assert set(homes.values()) == {0, 1, 2} and scheduler.stats().preemptions
    assert scheduler.stats().free_pages == 24 and scheduler.stats().total_pages == 24


def test_a_shared_prefix_draws_a_request_to_its_rank():
    scheduler = make(ranks=2, num_pages=32)
    devices = Devices(scheduler)
    scheduler.add(make_request("other", prompt(20, 3), 2))
    scheduler.add(make_request("first", prompt(20), 2))
    devices.drain()
    for rank in scheduler.ranks:
        assert rank.blocks.cached  # of different prompts
    for id, tokens, scored, home in (
        ("stranger", prompt(20, 9), None, 0),  # the first of equals
        ("second", prompt(20), None, 1),
        ("scored", prompt(20), 0, 0),  # its rows are all computed
    ):
        sampling = SamplingOptions(prompt_logprobs=scored)
        scheduler.add(make_request(id, tokens, 2, sampling=sampling))
        assert scheduler.rank_of(id) == home
        devices.drain()
    assert scheduler.stats().hit_tokens == 16


def test_a_step_is_as_large_as_the_largest_rank_needs():
    scheduler = make(ranks=2, drafts=2, mixed=True)
    scheduler.add(make_request("a", prompt(30), 8, drafts=1))
    for i in range(3):
        scheduler.add(make_request(f"b{i}", [3 + i], 8, drafts=0, min_tokens=2))
    plan = scheduler.schedule(0.0)
    assert plan is not None and plan.idle == 0
    homes = [scheduler.rank_of(id) for id in ("a", "b0", "b1", "b2")]
    assert homes == [0, 1, 1, 1]
    assert plan.sizes == Sizes(3, 0, 4, int(Variant.FULL), 0, (1, 0))
    assert plan.sizes.programs(BUCKETS) == [
        Bucket(4, 0, 0, 0, 4, Variant.FULL),
        Bucket(0, 1, 16, 0, 4),
    ]
    assert plan.slots.tolist() == [4, 5, 6] and [part.drafts for part in plan.parts] == [0, 0]
    assert [request.id for request in plan.admit] == ["a", "b0", "b1", "b2"]


def test_nobody_launches_when_nobody_has_anything():
    scheduler = make(ranks=2)
    assert scheduler.schedule(0.0) is None
    scheduler.add(make_request("a", prompt(5)))
    plan = scheduler.schedule(0.0)
    assert plan.idle == 1 and plan.parts[1] is None


@pytest.mark.parametrize("mixed", [False, True])
def test_prompt_rows_of_all_ranks_share_launches(mixed):
    buckets = dataclasses.replace(BUCKETS, mixed=mixed)
    one = Sizes(2, 1, 3, 0, 0, (1, 0))
    other = Sizes(3, 2, 5, 0, 1, (0, 2))
    both = agree([one, other, Sizes(0, 0, 0, 0, 0, (0, 0))])
    assert both == agree([other, one]) == Sizes(3, 2, 5, 0, 1, (1, 2))
    decode, *rest = both.programs(buckets)
    whole, short = Bucket(0, 1, 16, 0, 16, scored=True), Bucket(0, 4, 4, 0, 16, scored=True)
    if mixed:
        assert decode == Bucket(4, 1, 16, 2, 16, Variant.FULL, True) and rest == [short, short]
    else:
        assert decode == Bucket(4, 0, 0, 2, 16) and rest == [whole, short, short]
    assert Sizes.unpack(both.pack()) == both and both.pack().dtype == np.int32


def test_the_policy_picks_the_drafts_of_all_ranks():
    policy = DraftPolicy((0, 2), (2, 4))
    scheduler = make(ranks=2, drafts=2, drafting=policy)
    tokens = long_answer(1, 8)
    for i, drafts in enumerate((0, 1)):
        scheduler.add(make_request(f"r{i}", tokens, 8, drafts=drafts))
    plan = scheduler.schedule(0.0)
    assert plan.drafts == 2 and [part.drafts for part in plan.parts] == [2, 2]  # one has no program
    result = StepResult(np.zeros((2, 3), np.int32), *np.ones((3, 2), np.int32), np.zeros(2, bool))
    scheduler.observe(plan, result, 0.5)
    assert policy.speed(1, 2) == pytest.approx((1 + 2 * 1.0) / 0.5)


def test_scores_of_prompts_find_their_ranks():
    scheduler = make(ranks=2)
    devices, wanted = Devices(scheduler), SamplingOptions(prompt_logprobs=1)
    requests = [make_request(f"r{i}", prompt(6, i), 3, sampling=wanted) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    devices.drain()  # `Results` sees to it that every row of a prompt has its score
    assert set(devices.tokens) == {"r0", "r1", "r2", "r3"}


def test_commands_reach_the_rank_of_the_request():
    scheduler = make(ranks=2, max_waiting=1)
    first, second = make_request("a", prompt(5)), make_request("b", prompt(5, 2))
    scheduler.add(first)
    scheduler.add(second)
    assert [scheduler.rank_of(id) for id in "ab"] == [0, 1]
    with pytest.raises(ValueError, match="'b' is in use"):
        scheduler.add(make_request("b", prompt(3)))
    with pytest.raises(OverloadedError, match="try later"):
        scheduler.add(make_request("c", prompt(3)))
    assert scheduler.find("b") is second and scheduler.find("c") is None
    assert scheduler.abort("b") is second and scheduler.abort("b") is None
    received = make_request("d", prompt(5, 4))
    assert scheduler.reserve(received) == 0 and received.status is Status.RECEIVING
    assert scheduler.rank_of("d") == 1 and len(scheduler.pages("d")) == 2
    scheduler.start_received("d", [5])
    assert received.status is Status.RUNNING
    other = make_request("e", prompt(5, 7))
    assert scheduler.reserve(other) == 0 and scheduler.release("e", failed=True) is other
    for lost in (lambda: scheduler.pages("x"), lambda: scheduler.start_received("x", [1])):
        with pytest.raises(KeyError, match="x"):
            lost()
    assert scheduler.release("x") is None and scheduler.finish("x", FinishReason.STOP) is None


# ------------------------------------------------------------------ options


def test_a_mesh_makes_ranks():
    (role,) = parse_roles("2ifb", mesh={"dp": 2, "ep": 4})
    assert role == RoleConfig(role=Role.IFB, engines=2, dp=2, ep=4) and role.devices == 16
    (role,) = parse_roles("ifb", mesh={"ep": 4})
    assert role.dp == 1 and role.width == 4
    assert parse_roles("ifb", mesh={})[0].dp is None
    prefill, decode = parse_roles("2P1D", prefill_ep=2, decode_mesh={"dp": 2, "ep": 2})
    assert prefill == RoleConfig(role=Role.PREFILL, engines=2, ep=2)
    assert decode == RoleConfig(role=Role.DECODE, dp=2, ep=2)
    prefill, decode = parse_roles("1P2D", prefill_mesh={"ep": 2}, decode_tp=2)
    assert (prefill.dp, prefill.width, decode.dp, decode.width) == (1, 2, None, 2)


def test_prefill_ranks_send_whole():
    options = ServerOptions(model=Path(), name="x", roles=parse_roles("1P1D"), engine=small())
    assert _limits(options).layerwise_tokens == options.engine.layerwise_from
    roles = parse_roles("1P1D", prefill_mesh={"dp": 2})
    limits = _limits(dataclasses.replace(options, roles=roles))
    assert limits.layerwise_tokens > options.engine.max_model_len


DP = {"dp": 2}


@pytest.mark.parametrize(
    ("roles", "options", "said"),
    [
        ("1P1D", {"mesh": DP}, "'1P1D' with mesh={'dp': 2}: use prefill_mesh or decode_mesh"),
        ("ifb", {"decode_mesh": DP}, "'ifb' with decode_mesh={'dp': 2}: use mesh"),
        ("2ifb", {"prefill_mesh": DP, "mesh": DP}, "'2ifb' with prefill_mesh={'dp': 2}: use mesh"),
        ("ifb", {"mesh": DP, "decode_ep": 2}, "ep=2 beside mesh=.*in the mesh"),
        (
            "1P1D",
            {"decode_mesh": DP, "decode_tp": 2},
            "tp=2 and ep=1 beside decode_mesh=.*mesh",
        ),
        ("1P1D", {"prefill_mesh": DP, "prefill_ep": 2}, "ep=2 beside prefill_mesh=.*in the mesh"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(roles, options, said):
    with pytest.raises(ValueError, match=said):
        parse_roles(roles, **options)


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({"slots": 6}, {"dp": 4}, "slots=6 for 4 ranks: give a multiple of 4"),
        ({"pages": 62}, {"dp": 4}, "pages=62 for 4 ranks"),
        ({"pages": 32}, {"dp": 4}, "pages=32 for 4 ranks.*at least 64"),
        ({"redundant_experts": 2}, {"dp": 4}, "redundant_experts=2.*ep=2 or more"),
        ({"redundant_experts": 3}, {"dp": 1, "ep": 4}, "do not divide over 4 ranks"),
        ({"redundant_experts": 2}, {}, "redundant_experts=2.*ep=2 or more"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_refused(options, shape, said):
    import jax

    where = place((RoleConfig(role=Role.IFB, **shape),), jax.devices())[0]
    with pytest.raises(ValueError, match=said):
        build_engine(toy_model(0), small(drafts=0, **options), where, post=Answers().post)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"redundant_experts": -1}, "redundant_experts=-1 must be 0 or more"),
        ({"rebalance_every": -1}, "rebalance_every=-1 must be 0 or more"),
        ({"redundant_experts": 2, "unroll": True}, "turn unroll off"),
    ],
)
def test_options_of_experts_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        small(**options)
