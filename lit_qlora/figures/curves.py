"""Owns the picture of a run's losses in its card: training, raw and smoothed, and held-out.

A PNG, which every viewer of cards shows, drawn by Pillow, which TensorBoard requires. Knows no run folder.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

CURVES = "curves.png"
WIDTH, HEIGHT = 900, 480
LEFT, TOP, RIGHT, BOTTOM = 76, 56, 876, 420
"""The plot inside the picture, in pixels."""

SCALE = 3
"""Factor by which it is drawn larger and then reduced, for smooth edges."""

INK, GRID = "#333333", "#e4e4e4"
TRAIN, LIGHT, HELD_OUT = "#2f6db5", "#bcd3ec", "#d1571f"
Points = list[tuple[float, float]]


def draw_curves(file: Path, figures: Mapping[int, Mapping[str, Any]], step: int) -> bool:
    """Draw the losses into ``file``; True if there was a line to draw.

    Args:
        file: the PNG to write.
        figures: recorded figures, by optimizer step; values that are not finite are left out.
        step: of the adapter, marked in the picture.

    Raises OSError where the file can't be written.
    """
    from PIL import Image, ImageDraw

    train, held_out = (points(figures, name) for name in ("train/loss", "val/loss"))
    if max(len(train), len(held_out)) < 2:
        return False
    smooth = smoothed(train)
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    plot = _Plot(ImageDraw.Draw(picture), [train, smooth, held_out])
    plot.axes("optimizer steps", "loss, nats per token")
    plot.mark(step, f"this adapter, step {step:,}")
    if smooth != train:
        plot.line(train, LIGHT, 1)
    plot.line(smooth, TRAIN, 2)
    plot.line(held_out, HELD_OUT, 2, dots=True)
    plot.legend([(name, colour) for name, colour, drawn in (
        ("training", LIGHT, smooth != train and train), ("training, smoothed", TRAIN, smooth != train and train),
        ("training", TRAIN, smooth == train and train), ("held-out", HELD_OUT, held_out),
    ) if drawn])  # fmt: skip
    small = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    small.quantize(64, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)  # a third of the bytes
    return True


def points(figures: Mapping[int, Mapping[str, Any]], name: str) -> Points:
    """Steps and values at which ``name`` was recorded and is finite."""
    found = ((float(step), float(line[name])) for step, line in sorted(figures.items()) if name in line)
    return [(step, value) for step, value in found if math.isfinite(value)]


def smoothed(line: Points) -> Points:
    """The moving average over the last twentieth of the points, fewer at the start; a few points are not smoothed."""
    width, values, result = len(line) // 20, [value for _, value in line], []
    for index, (step, value) in enumerate(line):
        last = values[max(0, index - width + 1) : index + 1] or [value]
        result.append((step, sum(last) / len(last)))
    return result


def ticks(low: float, high: float, about: int) -> list[float]:
    """About ``about`` round numbers from ``low`` to ``high``, spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [number * apart for number in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


class _Plot:
    """A plot in ``draw``, wide enough for all of ``lines``."""

    def __init__(self, draw: "ImageDraw", lines: Sequence[Points]) -> None:
        from PIL import ImageFont

        self._draw = draw
        self._font = ImageFont.load_default(size=15 * SCALE)
        values = [value for line in lines for _, value in line]
        margin = 0.05 * (max(values) - min(values)) or 0.5
        self._low, self._high = min(values) - margin, max(values) + margin
        self._last = max(step for line in lines for step, _ in line)

    def _at(self, step: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / self._last
        y = BOTTOM - (BOTTOM - TOP) * (value - self._low) / (self._high - self._low)
        return x * SCALE, y * SCALE

    def _text(self, x: float, y: float, text: str, anchor: str, colour: str = INK) -> None:
        self._draw.text((x, y), text, fill=colour, font=self._font, anchor=anchor)

    def axes(self, steps: str, values: str) -> None:
        """Draw grid, numbers and axis labels."""
        numbers = ticks(self._low, self._high, 5)
        digits = max(0, -math.floor(math.log10(numbers[1] - numbers[0]) + 1e-9)) if len(numbers) > 1 else 2
        for value in numbers:
            x, y = self._at(0, value)
            self._draw.line([(x, y), self._at(self._last, value)], fill=GRID, width=SCALE)
            self._text(x - 8 * SCALE, y, f"{value:.{digits}f}", "rm")
        for step in (tick for tick in ticks(0, self._last, 8) if tick == int(tick)):
            x, y = self._at(step, self._low)
            self._draw.line([(x, y), (x, y + 5 * SCALE)], fill=INK, width=SCALE)
            self._text(x, y + 9 * SCALE, f"{int(step):,}", "ma")
        self._draw.line([self._at(0, self._low), self._at(self._last, self._low)], fill=INK, width=SCALE)
        self._text(RIGHT * SCALE, (HEIGHT - 12) * SCALE, steps, "rs")
        self._text(16 * SCALE, 14 * SCALE, values, "la")

    def mark(self, step: int, text: str) -> None:
        """Draw a dashed line at a step, with its label."""
        x, bottom = self._at(min(step, self._last), self._low)
        for y in range(TOP * SCALE, int(bottom), 8 * SCALE):
            self._draw.line([(x, y), (x, y + 4 * SCALE)], fill="#888888", width=SCALE)
        is_right = x > (LEFT + RIGHT) / 2 * SCALE
        self._text(x + (-6 if is_right else 6) * SCALE, (TOP + 2) * SCALE, text, "ra" if is_right else "la", "#666666")

    def line(self, line: Points, colour: str, width: int, dots: bool = False) -> None:
        """Draw a line through points, optionally with dots."""
        places = [self._at(*point) for point in line]
        if len(places) > 1:
            self._draw.line(places, fill=colour, width=width * SCALE, joint="curve")
        for x, y in places if dots or len(places) == 1 else ():
            radius = 3.5 * SCALE
            self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def legend(self, entries: Iterable[tuple[str, str]]) -> None:
        """Draw the legend, in one row above the plot, from the right."""
        x, y = float(RIGHT * SCALE), 22.0 * SCALE
        for name, colour in reversed([*entries]):
            self._text(x, y, name, "rm")
            x -= self._draw.textlength(name, font=self._font) + 8 * SCALE
            self._draw.line([(x - 22 * SCALE, y), (x, y)], fill=colour, width=3 * SCALE)
            x -= 42 * SCALE
