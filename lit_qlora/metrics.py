"""Owns the figures of a run: what each is called, how it comes from sums over answer tokens, how it is written, where
it is shown, and which validation is better.

All views read this table, which has not: the words of the forecast beside the peaks, the report's tiles of memory and
the groups of their own in TensorBoard, of sample answers and of the best adapter. A figure that is not in it is
recorded, too, and is in TensorBoard under its own name. Knows no run, and adds nothing up.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Formula = Callable[[Mapping[str, Any], Callable[[Any], Any]], Any]
"""A figure from ``loss_sum``, ``num_correct`` and ``num_answers``, sums over answer tokens, and from e's power."""


class Metric(NamedTuple):
    """A figure, and where it is shown; an empty text leaves it out there.

    Args:
        tag: Group and title in TensorBoard, which a figure of training and a held-out one share; empty: its name.
        chart: Title of its chart in the report, which both share, too.
        form: How a value is written, as in a format string.
        label: What a held-out figure, or memory, is, in words: in the terminal's last lines, the adapter's card and,
            if held out, the report.
        line: Its part of a validation's line, with braces for the value.
        bar: Title of its highest value in the report's chart of memory.
        starts_at_zero: True if the axis of its chart does.
        is_logged: True if a script's fit logs it, for callbacks to monitor; a held-out one always is.
        formula: How `figures_of` computes it; None for a figure that is measured or counted.
    """

    tag: str = ""
    chart: str = ""
    form: str = ""
    label: str = ""
    line: str = ""
    bar: str = ""
    starts_at_zero: bool = False
    is_logged: bool = False
    formula: Formula | None = None

    def written(self, value: Any) -> str:
        """``value``, a number or its text, as it is shown; a huge one in powers of ten."""
        number = float(value)
        return f"{number:{self.form if abs(number) < 1e6 else '.3g'}}"


def _of_memory(title: str, label: str, bar: str = "") -> Metric:
    return Metric(f"4 Memory (GiB)/{title}", "", ".2f", label, bar=bar)


def _loss(sums: Mapping[str, Any], exp: Callable[[Any], Any]) -> Any:
    return sums["loss_sum"] / sums["num_answers"]


def _perplexity(sums: Mapping[str, Any], exp: Callable[[Any], Any]) -> Any:
    return exp(_loss(sums, exp))  # the mean comes first: a mean of exponentials is another figure


def _accuracy(sums: Mapping[str, Any], exp: Callable[[Any], Any]) -> Any:
    return sums["num_correct"] / sums["num_answers"]


METRICS = {
    "train/loss": Metric("1 Loss/nats per token", "Loss (nats per token)", is_logged=True, formula=_loss),
    "train/perplexity": Metric("5 Tokens/perplexity", formula=_perplexity),
    "train/accuracy": Metric(
        "5 Tokens/accuracy", "Tokens predicted correctly", ".1%", is_logged=True, formula=_accuracy
    ),
    "train/learning_rate": Metric("2 Learning/learning rate", "Learning rate"),
    "train/gradient_norm": Metric("2 Learning/gradient norm", "Gradient norm", is_logged=True),
    "train/epoch": Metric("3 Speed/epoch"),
    "updates/applied": Metric("2 Learning/updates applied"),
    "updates/skipped": Metric("2 Learning/updates skipped"),
    "speed/tokens_per_second": Metric("3 Speed/tokens per second", "Tokens per second", ",.0f", starts_at_zero=True),
    "speed/padding_share": Metric("3 Speed/share of padding", "", ".1%"),
    "memory/load_allocated_gib": _of_memory("loading, allocated", "load allocated"),
    "memory/load_reserved_gib": _of_memory("loading, reserved", "load reserved", "loading"),
    "memory/train_allocated_gib": _of_memory("training, allocated", "train allocated"),
    "memory/train_reserved_gib": _of_memory("training, reserved", "train reserved", "training"),
    "memory/validation_allocated_gib": _of_memory("validation, allocated", "validation allocated"),
    "memory/validation_reserved_gib": _of_memory("validation, reserved", "validation reserved", "validation"),
    "memory/host_gib": _of_memory("host", "host", "host"),
    "memory/predicted_reserved_gib": _of_memory("training, reserved", "predicted reserved"),
    "val/loss": Metric(
        "1 Loss/nats per token", "Loss (nats per token)", ".4f", "held-out loss, nats per token",
        "held-out loss {:<7}", formula=_loss,
    ),
    "val/perplexity": Metric(
        "5 Tokens/perplexity", "", ",.2f", "held-out perplexity", "perplexity {:<8}", formula=_perplexity
    ),
    "val/accuracy": Metric(
        "5 Tokens/accuracy", "Tokens predicted correctly", ".1%", "held-out token accuracy", "accuracy {:>6}",
        formula=_accuracy,
    ),
}  # fmt: skip
"""The figures by their names in the record; of each group, the order in which they are shown."""


def figures_of(part: str, sums: Mapping[str, Any], exp: Callable[[Any], Any]) -> dict[str, Any]:
    """The figures that are computed from sums over answer tokens, by name.

    Args:
        part: ``train`` or ``val``; or ``test``, which has the figures of ``val``.
        sums: as `Formula` takes them: numbers, tensors or arrays.
        exp: e's power of such.
    """
    table = "val" if part == "test" else part
    return {
        f"{part}/{name.removeprefix(f'{table}/')}": metric.formula(sums, exp)
        for name, metric in METRICS.items()
        if metric.formula and name.startswith(f"{table}/")
    }


def is_held_out(name: str) -> bool:
    """True if the figure ``name``, of this table or not, is one of a validation."""
    return name.startswith("val/")


def held_out() -> dict[str, Metric]:
    """The figures of a validation, by name."""
    return {name: metric for name, metric in METRICS.items() if is_held_out(name)}


def logged() -> list[str]:
    """Names of the figures that a script's fit logs."""
    return [name for name, metric in METRICS.items() if metric.is_logged or is_held_out(name)]


def held_out_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Label and values, ``before`` and ``after``, of each held-out figure among those of two steps.

    One that was not measured after is left out; before is None if it was not measured then.
    """
    for name, metric in held_out().items():
        if name in after:
            yield metric.label, metric.written(before[name]) if name in before else None, metric.written(after[name])


def is_better(figures: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """True if ``figures`` of a validation have a finite loss, and a lower one than the ``best`` before it, if any."""
    loss, lowest = (float(one.get("val/loss", math.nan)) for one in (figures, best or {}))
    return math.isfinite(loss) and not lowest <= loss
