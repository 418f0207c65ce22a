"""A rule as text and as a checked value."""

import numpy as np
import pytest

from dskjax.decode.rule_options import RULE_NAMES, RuleOptions


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("strict", RuleOptions(name="strict")),
        (" block ", RuleOptions(name="block")),
        ("typical:eps=0.2", RuleOptions(name="typical", typical_eps=0.2)),
        (
            "relaxed:top_n=15, delta=.5",
            RuleOptions(name="relaxed", relaxed_top_n=15, relaxed_delta=0.5),
        ),
        (
            "hybrid:lenience=0.7,a=0.5,b=0.1,t_min=0.2,t_max=1.5",
            RuleOptions(
                name="hybrid",
                lenience=0.7,
                draft_a=0.5,
                draft_b=0.1,
                draft_t_min=0.2,
                draft_t_max=1.5,
            ),
        ),
        ("hybrid:", RuleOptions(name="hybrid")),
    ],
)
def test_parse(text, want):
    assert RuleOptions.parse(text) == want
    assert RuleOptions.parse(want.label) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("greedy", r"unknown acceptance rule 'greedy'; choose one of strict, rejection, block"),
        ("", r"unknown acceptance rule ''"),
        ("strict:eps=1", r"'eps=1' is not understood: it has none, give the name alone"),
        ("relaxed:eps=1", r"'eps=1' is not understood: 'relaxed' takes top_n=VALUE, delta=VALUE"),
        ("relaxed:top_n", r"'top_n' is not understood"),
        ("relaxed:top_n=2.5", r"top_n='2.5' must be an integer"),
        ("relaxed:delta=x", r"delta='x' must be a number"),
        ("relaxed:delta=0.1,delta=0.2", r"delta is given twice"),
        ("relaxed:top_n=0", r"relaxed_top_n=0 must be an integer of at least 1"),
        ("relaxed:delta=1.5", r"relaxed_delta=1.5 must be in \[0, 1\]"),
        ("typical:eps=-0.1", r"typical_eps=-0.1 must be in \[0, 1\]"),
        ("typical:delta=nan", r"typical_delta=nan must be in \[0, 1\]"),
        ("hybrid:lenience=0", r"lenience=0.0 must be in \(0, 1\]"),
        ("hybrid:a=0", r"draft_a=0.0 must be above 0"),
        ("hybrid:b=-1", r"draft_b=-1.0 at least 0"),
        ("hybrid:t_min=0", r"draft_t_min=0.0 .* 0 < t_min <= t_max"),
        ("hybrid:t_min=2,t_max=1", r"0 < t_min <= t_max"),
    ],
)
def test_refusals_name_the_value(text, message):
    with pytest.raises(ValueError, match=message):
        RuleOptions.parse(text)


def test_parameters_of_another_rule_are_refused():
    with pytest.raises(ValueError, match="lenience=0.5 is no parameter of 'block'"):
        RuleOptions(name="block", lenience=0.5)


def test_lossless_label_and_dict():
    rules = [RuleOptions(name=name) for name in RULE_NAMES]
    lossless = {rule.name for rule in rules if rule.lossless}
    assert lossless == {"strict", "rejection", "block", "hybrid"}
    assert [rule.label for rule in rules] == list(RULE_NAMES)
    lossy = RuleOptions.parse("hybrid:lenience=0.9")
    assert not lossy.lossless and lossy.label == "hybrid:lenience=0.9"
    assert RuleOptions(name="block").to_dict() == {"name": "block", "lossless": True}
    assert RuleOptions.parse("relaxed:top_n=3").to_dict() == {
        "name": "relaxed",
        "lossless": False,
        "top_n": 3,
        "delta": 0.6,
    }


def test_row_types():
    row = RuleOptions.parse("hybrid:lenience=0.5").row()
    whole = {name for name, value in row.items() if value.dtype == np.int32}
    assert whole == {"rule", "relaxed_top_n"} and row["lenience"] == np.float32(0.5)
    assert all(value.dtype == np.float32 for name, value in row.items() if name not in whole)
