import pytest

from serve.drafting import DraftPolicy
from tests.serve.fake import continuation
from tests.serve.harness import EOS, Harness, make_config


class Bench:
    """An engine that takes `base` seconds and `each` more a row and draft."""

    def __init__(self, policy: DraftPolicy, *, each: float, rate: float):
        self.policy, self.each, self.rate = policy, each, rate
        self.chosen: list[int] = []

    def run(self, steps: int, batch: int) -> list[int]:
        """The choices of `steps` steps."""
        for _ in range(steps):
            m = self.policy.choose(batch)
            fresh = not self.chosen or self.chosen[-1] < m  # none on the table yet
            offered = 0 if fresh else batch * m
            seconds = 0.010 + self.each * batch * (1 + m)
            self.policy.observe(batch, m, seconds, round(offered * self.rate), offered)
            self.chosen.append(m)
        return self.chosen[-steps:]


def make(**options) -> DraftPolicy:
    return DraftPolicy((0, 3), (4, 32, 128), **{"probe_every": 32, "probe_steps": 4, **options})


def test_begins_with_the_most_drafts():
    assert {make().choose(batch) for batch in (1, 4, 5, 128, 500)} == {3}


def test_keeps_drafting_where_it_pays():
    chosen = Bench(make(), each=1e-5, rate=0.7).run(400, batch=4)
    assert chosen.count(0) / 400 == pytest.approx(4 / 32, abs=0.02)  # the probes
    assert chosen[-1] == 3


def test_stops_drafting_where_it_costs_more_than_it_brings():
    policy = make()
    big = Bench(policy, each=1e-3, rate=0.3)
    big.run(100, batch=128)
    assert big.run(32, batch=128).count(3) == 4
    assert Bench(policy, each=1e-5, rate=0.7).run(30, batch=2)[-1] == 3, "buckets are separate"


def test_comes_back_when_acceptance_rises():
    policy = make()
    bench = Bench(policy, each=2e-4, rate=0.05)
    assert bench.run(200, batch=32)[-32:].count(3) == 4
    bench.rate = 0.9
    assert bench.run(600, batch=32)[-32:].count(3) == 28


def test_small_differences_do_not_change_the_choice():
    gap = {}
    for margin in (0.0, 0.2):
        policy = make(margin=margin)
        # 1 + 3 * 0.5 = 2.5 tokens in 2.6 times the time: 4 % worse than none.
        for _ in range(200):
            m = policy.choose(4)
            policy.observe(4, m, 0.026 if m else 0.010, 6 if m else 0, 12 if m else 0)
        gap[margin] = policy.choose(4)
    assert gap == {0.0: 0, 0.2: 3}


def test_speed_is_tokens_a_second_of_a_row():
    policy = make()
    assert policy.speed(4, 3) is None
    policy.observe(4, 3, 0.01, 6, 12)
    assert policy.speed(4, 3) == pytest.approx(250)
    policy.observe(4, 0, 0.005, 0, 0)
    assert policy.speed(3, 0) == pytest.approx(200)


def test_same_measurements_same_choices():
    runs = [Bench(make(), each=1e-4, rate=0.4).run(300, batch=20) for _ in range(2)]
    assert runs[0] == runs[1]


def test_one_rung_is_fixed():
    policy = DraftPolicy((2,), (8,))
    assert Bench(policy, each=1.0, rate=0.0).run(300, batch=8) == [2] * 300


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (dict(ladder=()), "ladder"),
        (dict(ladder=(3, 0)), "ladder"),
        (dict(ladder=(-1, 0)), "ladder"),
        (dict(buckets=(8, 4)), "buckets"),
        (dict(buckets=(0,)), "buckets"),
        (dict(margin=-0.1), "margin"),
        (dict(probe_steps=1), "probe_steps"),
        (dict(probe_every=4, probe_steps=4), "probe_every"),
    ],
)
def test_arguments_are_checked(bad, match):
    with pytest.raises(ValueError, match=match):
        DraftPolicy(**{"ladder": (0, 3), "buckets": (4,), **bad})


def test_a_scheduler_takes_the_policys_choice_rounded_up_to_a_rung():
    config = make_config(drafts=3, lookahead=3, tail=2)
    policy = DraftPolicy((0, 3), (4,), probe_every=8, probe_steps=2)
    harness = Harness(config, drafting=policy)
    for i in range(8):
        harness.add(str(i), [1 + i, 5, 9], 20, drafts=(None, 1)[i % 2])
    harness.drain()
    used = {plan.drafts for plan in harness.plans if plan.requests}
    assert used == {0, 3}
    for i in range(8):
        request = harness.ends[str(i)].request
        assert harness.tokens[str(i)] == continuation([1 + i, 5, 9], request.stop, EOS)[0]
    with pytest.raises(ValueError, match="ladder"):
        Harness(config, drafting=DraftPolicy((0, 4), (4,)))
