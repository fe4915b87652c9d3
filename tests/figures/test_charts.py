"""The picture of the losses: every recorded figure stands in it, and what was not recorded does not."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lit_qlora.figures import charts
from lit_qlora.figures.charts import draw_curves, points, smoothed

FALLING = {step: {"train/loss": 2.0 - step / 100} for step in range(10, 110, 10)}
TRAIN, FAINT, HELD_OUT = charts.PRINTED[2:5]


def places(file, colour: str) -> np.ndarray:
    """Row and column of what has about that colour, below the legend."""
    picture = imread(file)[..., :3]
    near = np.abs(picture - np.array(to_rgb(colour))).max(-1) < 0.1
    near[: len(near) // 8] = False
    return np.argwhere(near)


def test_lines_go_from_the_first_figure_to_the_last(tmp_path):
    figures = FALLING | {0: {"val/loss": 2.1}, 100: {"val/loss": 1.0, **FALLING[100]}}
    assert draw_curves(tmp_path / "x.png", figures, 100)
    assert imread(tmp_path / "x.png").shape[:2] == (496, 896)
    assert (tmp_path / "x.png").stat().st_size < 60_000
    held_out, train = (places(tmp_path / "x.png", colour) for colour in (HELD_OUT, TRAIN))
    left, right = held_out[:, 1].min(), held_out[:, 1].max()
    assert held_out[:, 0].min() < train[:, 0].min() and held_out[:, 0].max() >= train[:, 0].max() - 3
    assert train[:, 1].min() - left == pytest.approx((right - left) / 10, abs=12)


def test_the_same_figures_give_the_same_bytes(tmp_path):
    for name in "ab":
        assert draw_curves(tmp_path / name, FALLING, 100)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_held_out_rows(tmp_path):
    assert draw_curves(tmp_path / "x.png", FALLING, 100)
    assert len(places(tmp_path / "x.png", HELD_OUT)) == 0


def test_many_points_are_smoothed_too(tmp_path):
    figures = {step: {"train/loss": 2.0 + step % 2} for step in range(1, 101)}
    assert draw_curves(tmp_path / "x.png", figures, 100)
    assert len(places(tmp_path / "x.png", FAINT))
    assert smoothed(points(figures, "train/loss"))[-1] == (100.0, 2.4)  # of the last five
    assert [chart.words for chart in charts.charts(figures, None)] == ["training from 3 to 2.4"]


def test_speeds_are_held_against_none_at_all():
    figures = {
        step: {"speed/tokens_per_second": 1000.0 + step, "train/gradient_norm": 1000.0 + step} for step in (1, 9)
    }
    norm, speed = (chart.svg for chart in charts.charts(figures, None))
    assert ">200</text>" in speed and ">1,000</text>" in speed
    assert ">200</text>" not in norm


@pytest.mark.parametrize("figures", [{}, {5: {"train/loss": 1.0}}, {0: {"val/loss": 1.0}, 5: {"val/loss": "nan"}}])
def test_nothing_to_draw(tmp_path, figures):
    assert not draw_curves(tmp_path / "x.png", figures, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1.5, 1e-7, 3e8])
def test_lines_that_are_flat_or_far_off(tmp_path, value):
    assert draw_curves(tmp_path / "x.png", {1: {"train/loss": value}, 2: {"train/loss": value}}, 2)
    assert len(places(tmp_path / "x.png", TRAIN))


def test_what_is_not_finite_is_left_out():
    figures = {3: {"train/loss": "nan"}, 2: {"train/loss": 1.0}, 1: {"train/loss": "inf"}, 4: {"val/loss": 2.0}}
    assert points(figures, "train/loss") == [(2.0, 1.0)]


def test_a_card_without_matplotlib_has_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert not draw_curves(tmp_path / "x.png", FALLING, 100)
