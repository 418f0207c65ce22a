"""Plots of a study with as many variants as the committed one has stay legible."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from train_mtp.study.compare import Study
from train_mtp.study.figures import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.read([ROOT / "benchmarks" / "results" / "mtp-experiment.json"])


@pytest.fixture(scope="module")
def plots(study) -> dict:
    return make(study)


def luminance(color) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it."""
    levels = np.array(to_rgb(color))
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_variants_stand_apart_at_each_position(study, plots):
    most = max(setting.drafts for setting in study.settings)
    settings = [setting for setting in study.settings if setting.drafts == most]
    for axis, setting in zip(plots["positions"].axes, settings, strict=True):
        lines = {str(line.get_label()): line for line in axis.lines}
        assert list(lines) == [name for name in study.names if study.score(name, setting)]
        assert len({tuple(to_rgb(line.get_color())) for line in lines.values()}) == len(lines)
        places = np.array([line.get_xdata() for line in lines.values()])
        assert np.all(np.round(places) == np.arange(1, most + 1))
        assert np.diff(places, axis=0).min() > 0.02
        for name, line in lines.items():
            assert list(line.get_ydata()) == study.score(name, setting).conditional


def test_numbers_stand_out_on_their_cells(study, plots):
    shown = 0
    for axis in plots["kinds"].axes:
        [image] = axis.images
        for text in axis.texts:
            x, y = (round(place) for place in text.get_position())
            cell = luminance(image.cmap(image.norm(image.get_array()[y, x]))[:3])
            dark, light = sorted((cell, luminance(text.get_color())))
            assert (light + 0.05) / (dark + 0.05) > 4, text.get_text()
            shown += 1
    assert shown == len(study.kinds) * sum(
        study.score(name, setting) is not None
        for setting in study.settings
        for name in study.names
        if name != study.baseline
    )
