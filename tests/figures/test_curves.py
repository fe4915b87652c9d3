"""The picture of the losses: every recorded figure stands where it belongs, and what was not recorded does not."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from lit_qlora.figures import curves
from lit_qlora.figures.curves import draw_curves, points, smoothed, ticks

FALLING = {step: {"train/loss": 2.0 - step / 100} for step in range(10, 110, 10)}


def pixels(file, colour: str) -> list[tuple[int, int]]:
    """Where a picture has about that colour, inside the plot."""
    with Image.open(file) as picture:
        differences = np.abs(np.asarray(picture.convert("RGB"), int) - ImageColor.getrgb(colour)).max(-1)
    inside = differences[curves.TOP : curves.BOTTOM, curves.LEFT - 4 : curves.RIGHT + 4]
    return [(int(x) + curves.LEFT - 4, int(y) + curves.TOP) for y, x in np.argwhere(inside < 24)]


def test_lines_go_from_the_first_figure_to_the_last(tmp_path):
    figures = FALLING | {0: {"val/loss": 2.1}, 100: {"val/loss": 1.0, **FALLING[100]}}
    assert draw_curves(tmp_path / "x.png", figures, 100)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (900, 480)
    assert (tmp_path / "x.png").stat().st_size < 40_000
    held_out, train = (pixels(tmp_path / "x.png", colour) for colour in (curves.HELD_OUT, curves.TRAIN))
    # The plot goes from 1.0 to 2.1 and 5 % beyond, over 800 pixels by 364.
    assert min(held_out)[0] == pytest.approx(76, abs=6)
    assert max(held_out)[0] == pytest.approx(876, abs=6)
    assert min(y for _, y in held_out) == pytest.approx(56 + 364 * 0.05 / 1.1, abs=6)
    assert max(y for _, y in held_out) == pytest.approx(420 - 364 * 0.05 / 1.1, abs=6)
    assert min(train)[0] == pytest.approx(76 + 80, abs=6)
    assert min(y for x, y in train if x < 300) == pytest.approx(420 - 364 * (1.9 - 0.945) / 1.21, abs=6)


def test_without_held_out_rows(tmp_path):
    assert draw_curves(tmp_path / "x.png", FALLING, 100)
    assert pixels(tmp_path / "x.png", curves.HELD_OUT) == []


def test_many_points_are_smoothed_too(tmp_path):
    figures = {step: {"train/loss": 2.0 + step % 2} for step in range(1, 101)}
    assert draw_curves(tmp_path / "x.png", figures, 100)
    assert pixels(tmp_path / "x.png", curves.LIGHT)
    assert smoothed(points(figures, "train/loss"))[-1] == (100.0, 2.4)  # of the last five


@pytest.mark.parametrize("figures", [{}, {5: {"train/loss": 1.0}}, {0: {"val/loss": 1.0}, 5: {"val/loss": "nan"}}])
def test_nothing_to_draw(tmp_path, figures):
    assert not draw_curves(tmp_path / "x.png", figures, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1.5, 1e-7, 3e8])
def test_lines_that_are_flat_or_far_off(tmp_path, value):
    assert draw_curves(tmp_path / "x.png", {1: {"train/loss": value}, 2: {"train/loss": value}}, 2)
    assert pixels(tmp_path / "x.png", curves.TRAIN)


def test_what_is_not_finite_is_left_out():
    figures = {3: {"train/loss": "nan"}, 2: {"train/loss": 1.0}, 1: {"train/loss": "inf"}, 4: {"val/loss": 2.0}}
    assert points(figures, "train/loss") == [(2.0, 1.0)]


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 100, 8, [0, 20, 40, 60, 80, 100]),
        (0, 1870, 8, [0, 500, 1000, 1500]),
        (1.02, 1.96, 5, [1.2, 1.4, 1.6, 1.8]),
        (0, 4, 8, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
    ],
)
def test_round_numbers_on_the_axes(low, high, about, expected):
    assert ticks(low, high, about) == pytest.approx(expected)
