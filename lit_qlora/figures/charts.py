"""Owns the charts of a run, by matplotlib: SVG for its report, and the PNG of the losses for the card of its adapter.

The SVG's colours are variables of the page that shows it, so that one drawing serves light and dark. Knows the figures
by their recorded names, and no run folder.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_qlora.metrics import METRICS, held_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
INK, GRID, TRAIN_HUE, FAINT, HELD_OUT_HUE, MARK_HUE = (f"C{number}" for number in range(6))
"""Colours by their places in a palette."""

FOR_PAGE = ("#101010", "#202020", "#303030", "#404040", "#505050", "#606060")
VARIABLES = dict(zip(FOR_PAGE, ("ink", "grid", "train", "faint", "held-out", "mark"), strict=True))
"""What the page calls each colour; the numbers never reach it."""

PRINTED = ("#333333", "#e4e4e4", "#2f6db5", "#bcd3ec", "#d1571f", "#888888")

SIZE = 5.6, 3.1
"""Inches, at 72 points each: a chart fills half of a wide page, and the whole of a narrow one."""

DOTS = 160
"""Dots per inch of the PNG."""

FiguresByStep = Mapping[int, Mapping[str, Any]]
Points = list[tuple[float, float]]


class Chart(NamedTuple):
    """A chart for the report.

    Args:
        title: stands above it.
        svg: the drawing, an ``<svg>`` element.
        words: what it shows, for those who can't see it.
    """

    title: str
    svg: str
    words: str


def charts(figures: FiguresByStep, step: int | None) -> Iterator[Chart]:
    """The charts of a run, without those that have nothing to show.

    Args:
        figures: Finite figures by optimizer step.
        step: Of the best adapter, marked in the chart of the held-out loss; None for none.
    """
    titles = dict.fromkeys(metric.chart for metric in METRICS.values() if metric.chart)
    drawings = {title: partial(_curves, figures=figures, title=title, step=step) for title in titles}
    drawings["Peak memory (GiB)"] = partial(_memory, figures=figures)
    for number, (title, draw) in enumerate(drawings.items()):
        found = _drawn(draw, f"chart{number}")
        if found:
            yield Chart(title, *found)


def draw_curves(file: Path, figures: FiguresByStep, step: int) -> bool:
    """Draw the losses into ``file``; True if there was a line to draw, and matplotlib is installed to draw it.

    Args:
        file: the PNG to write.
        figures: recorded figures, by optimizer step; values that are not finite are left out.
        step: of the adapter, marked in the picture.

    Raises OSError where the file can't be written.
    """

    def draw(axes: "Axes") -> str:
        words = _curves(axes, figures, METRICS["val/loss"].chart, step)
        axes.set_ylabel("loss, nats per token", color=INK)
        return words

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:  # a card without its picture is better than a run that ends
        return False
    with _drawing(draw, PRINTED) as (figure, words):
        if words:
            figure.patch.set(visible=True, facecolor="white")
            figure.set_dpi(DOTS)
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        return bool(words)


def _drawn(draw: Callable[["Axes"], str], prefix: str) -> tuple[str, str] | None:
    """A drawing as SVG, and its words; None where there was nothing to draw."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with _drawing(draw, FOR_PAGE, prefix) as (figure, words):
        if not words:
            return None
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return _for_page(file.getvalue(), prefix), words


@contextmanager
def _drawing(draw: Callable[["Axes"], str], palette: Sequence[str], prefix: str = "") -> Iterator[tuple["Figure", str]]:
    """What ``draw`` draws, in the colours of ``palette``, and its words, which are empty where there is nothing."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": prefix, "axes.prop_cycle": cycler(color=palette)}
    with rc_context(look | {"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        words = draw(axes)
        if words:
            _style(axes)
        yield figure, words


def _for_page(svg: str, prefix: str) -> str:
    """The element alone, as wide as its place, with names of its own and the page's colours and fonts."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"font(?:-family)?: ([^;\"]*?)(?:'[^;\"]*|sans-serif[^;\"]*)", r"font: \1sans-serif", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _style(axes: "Axes") -> None:
    """Axes without a frame, in the page's colours, transparent."""
    axes.figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x" if axes.patches else "y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    legend = axes.get_legend()
    for text in legend.get_texts() if legend else ():
        text.set_color(INK)


def points(figures: FiguresByStep, name: str) -> Points:
    """The finite values of a figure, each behind its step.

    Args:
        figures: figures by optimizer step.
        name: name of the figure.
    """
    found = ((float(step), float(line[name])) for step, line in sorted(figures.items()) if name in line)
    return [(step, value) for step, value in found if math.isfinite(value)]


def smoothed(line: Points) -> Points:
    """The moving average of a ``line`` over the last twentieth of its points, fewer at the start; if few, unchanged."""
    width, values, result = len(line) // 20, [value for _, value in line], []
    for index, (step, value) in enumerate(line):
        last = values[max(0, index - width + 1) : index + 1] or [value]
        result.append((step, sum(last) / len(last)))
    return result


def _steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer steps", color=INK)


def _curves(axes: "Axes", figures: FiguresByStep, title: str, step: int | None) -> str:
    """The chart with this ``title``: training and held-out in one, or training alone."""
    from matplotlib.ticker import PercentFormatter

    names, words = [name for name, metric in METRICS.items() if metric.chart == title], list[str]()
    if not {*names} & {*held_out()}:
        return _curve(axes, figures, names[0])
    found = {name: line for name in names if (line := points(figures, name))}
    if max(map(len, found.values()), default=0) < 2:
        return ""
    for name, line in found.items():
        colour, label, shape = (HELD_OUT_HUE, "held-out", "o") if name in held_out() else (TRAIN_HUE, "training", "")
        shown = line if name in held_out() else smoothed(line)
        if shown != line:
            axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1)
        axes.plot(*zip(*shown, strict=True), color=colour, linewidth=2, marker=shape, markersize=4, label=label)
        words.append(f"{label} from {shown[0][1]:.4g} to {shown[-1][1]:.4g}")
    if step and "val/loss" in names:
        axes.axvline(step, color=MARK_HUE, linewidth=1, linestyle=(0, (3, 3)), label="best adapter")
        words.append(f"best adapter at step {step:,}")
    if METRICS[names[0]].form.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    _steps(axes)
    return ", ".join(words)


def _curve(axes: "Axes", figures: FiguresByStep, name: str) -> str:
    from matplotlib.ticker import StrMethodFormatter

    line = points(figures, name)
    if len(line) < 2:
        return ""
    axes.plot(*zip(*line, strict=True), color=TRAIN_HUE, linewidth=2)
    if METRICS[name].starts_at_zero:
        axes.set_ylim(0, max(value for _, value in line) * 1.1 or 1)
    if METRICS[name].form:
        axes.yaxis.set_major_formatter(StrMethodFormatter(f"{{x:{METRICS[name].form}}}"))
    _steps(axes)
    values = [value for _, value in line]
    return f"from {values[0]:.4g} to {values[-1]:.4g}, between {min(values):.4g} and {max(values):.4g}"


def _memory(axes: "Axes", figures: FiguresByStep) -> str:
    """A bar for the highest of each moment, of what torch reserves or of the host, and the forecast as a line."""
    peaks = [(metric, peak_of(figures, name)) for name, metric in METRICS.items() if metric.bar]
    bars = [(metric.bar, peak, metric.written(peak)) for metric, peak in peaks if peak is not None]
    if not bars:
        return ""
    names, values, written = zip(*reversed(bars), strict=True)
    drawn = axes.barh(names, values, color=TRAIN_HUE, height=0.55)
    axes.bar_label(drawn, written, padding=4, color=INK)
    forecast = peak_of(figures, "memory/predicted_reserved_gib")
    words = [f"{name} {shown}" for name, _, shown in bars]
    if forecast is not None:
        shown = METRICS["memory/predicted_reserved_gib"].written(forecast)
        axes.axvline(forecast, color=HELD_OUT_HUE, linewidth=2, label=f"forecast for training: {shown}")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        words.append(f"forecast for training {shown}")
    axes.set_xlim(0, max([*values, forecast or 0]) * 1.15 or 1)
    around = max(0.6, 1.6 - len(bars) / 2)  # a single bar is no wall
    axes.set_ylim(-around, len(bars) - 1 + around)
    return ", ".join(words)


def peak_of(figures: FiguresByStep, name: str) -> float | None:
    """The highest value of a figure; None where it was never recorded.

    Args:
        figures: finite figures by optimizer step.
        name: name of the figure.
    """
    return max((value for _, value in points(figures, name)), default=None)
