"""The measured price of a rule: noise for lossless ones, more for lossy ones."""

import pytest

from dskjax.commands.rule_tv import measure_tv
from dskjax.decode import RuleOptions

LOSSLESS = (
    *("rejection", "hybrid"),
    *(pytest.param(name, marks=pytest.mark.full) for name in ("strict", "block")),
)
LOSSY = (("typical", 1.0), ("hybrid:lenience=0.5", 1.0), ("relaxed", 0.0))


@pytest.mark.parametrize("text", LOSSLESS)
def test_a_lossless_rule_shows_noise_only(text):
    found = measure_tv(RuleOptions.parse(text), 0.8, samples=1 << 14)
    print(f"{text}: TV {found.mean:.4f}, noise {found.noise:.4f}")
    assert found.mean < 1.5 * found.noise


@pytest.mark.parametrize(("text", "temperature"), LOSSY)
def test_a_lossy_rule_shows_more(text, temperature):
    found = measure_tv(RuleOptions.parse(text), temperature, samples=1 << 14)
    print(f"{text}: TV {found.mean:.4f} (largest {found.largest:.4f}), noise {found.noise:.4f}")
    assert found.mean > 3 * found.noise and found.largest > 0.02
