"""Owns ``report.html``, a view of a whole run in one file that loads nothing: what came of it, how, and from what.

A run folder may come from a stranger: all of it is data here, of any content, and nothing of it becomes markup.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_qlora.errors import UserError
from lit_qlora.figures.charts import charts, peak_of, points
from lit_qlora.figures.lines import damage_words, damaged_lines, read_lines
from lit_qlora.figures.render import filled
from lit_qlora.figures.samples import CUT, CUT_BY_CONTEXT, ROWS_SHOWN, answered, ends_in_words
from lit_qlora.metrics import METRICS, held_out_in_words
from lit_qlora.place import COMMAND
from lit_qlora.storage.config_file import as_yaml, read_options
from lit_qlora.storage.files import write_file
from lit_qlora.storage.folders import RESULT
from lit_qlora.storage.foreign import object_in, read_object
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.settings import differences
from lit_qlora.wording import duration

TOPICS = {
    "data": "Data",
    "demo": "The demo",
    "learns": "Learned, such as (the part between **, and its end ⏹)",
    "model": "Model",
    "train": "Training",
    "plan": "Forecast",
    "run": "Run",
}
LONGEST = 20_000
"""Characters of a text that the page shows."""


def write_report(run: RunFolder) -> Path:
    """Write the report of a run into its folder.

    Args:
        run: the run folder.

    Returns:
        The file.

    Raises:
        SaveError: if it can't be written.
    """
    write_file(run.report, report_page(run))
    return run.report


def damage(run: RunFolder) -> Iterator[str]:
    """What of the records of ``run`` can't be read, so that its page lacks it, in lines."""
    for file in (run.metrics, run.samples):
        if numbers := damaged_lines(file):
            yield damage_words(file, numbers)
    objects = (run.finished_mark, run.decisions, run.adapter / RESULT)
    readers: list[Callable[[], object]] = [partial(read_object, file) for file in objects if file.exists()]
    for read in (run.read_config, *readers):
        try:
            read()
        except UserError as error:
            yield str(error)


def report_page(run: RunFolder) -> str:
    """The report of ``run`` as HTML."""
    figures, best = _finite_figures(run.metrics), object_in(run.adapter / RESULT)
    step = best.get("step")
    step = step if type(step) is int and step in figures else max(figures, default=0)
    decided = object_in(run.decisions)
    try:
        drawn = [chart._replace(svg=Markup(chart.svg)) for chart in charts(figures, step or None)]  # ours alone
        lacks = "Too few figures were recorded to draw any."
    except ImportError:  # a page without curves is better than none at a run's end
        drawn, lacks = [], f"matplotlib, which draws them, is not installed; with it, {COMMAND} report does."
    config, changes, problem = _configuration(run)
    data = config.get("data")
    return filled(
        "lit_qlora.figures",
        "report.html.jinja",
        name=run.path.resolve().name,
        subtitle=_subtitle(config),
        state=_run_state(run, figures),
        started=_text(decided.get("started"))[:19].replace("T", " "),
        tiles=[*_tiles(figures, step, decided)],
        table=ends_in_words(figures.get(0, {}), figures.get(step, {})),
        charts=drawn,
        lacks=lacks,
        step=step,
        samples=[*_samples(run.samples, step)][:ROWS_SHOWN],
        decisions=[*_decisions(decided)],
        has_data=isinstance(data, Mapping),
        changes=changes,
        config=as_yaml(config)[:LONGEST] if config else problem,
        versions=_versions(decided),
    )


def _finite_figures(file: Path) -> dict[int, dict[str, float]]:
    """The finite figures of each step, whatever else stands in the lines."""
    return {
        line["step"]: {name: float(value) for name, value in line.items() if _is_number(value)}
        for line in read_lines(file) if 0 <= line["step"] < 2**53
    }  # fmt: skip


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _text(value: Any) -> str:
    return value[:LONGEST] if isinstance(value, str) else ""


def _configuration(run: RunFolder) -> tuple[dict[str, Any], list[str], str]:
    """The configuration of the first start, what later starts changed, and why there is none."""
    try:
        first = run.read_config()
    except UserError as error:
        return {}, [], str(error)
    changes = []
    for file in sorted(run.path.glob("config.*.yaml"), key=lambda path: (len(path.name), path.name)):
        with suppress(ValueError):  # a damaged one
            later = differences(first, read_options(file))
            changes += [f"start {file.name.split('.')[1]}: {change}" for change in later]
    return first, changes, ""


def _subtitle(config: Mapping[str, Any]) -> str:
    model, data = config.get("model"), config.get("data")
    base = _text(model.get("base")) if isinstance(model, Mapping) else ""
    source = _text(data.get("source")) if isinstance(data, Mapping) else ""
    return f"{base or 'a base'} in 4-bit with LoRA, trained on {source or 'conversations'}"


def _run_state(run: RunFolder, figures: Mapping[int, Any]) -> str:
    mark = object_in(run.finished_mark)
    if type(mark.get("step")) is int and type(mark.get("steps")) is int:
        early = " (ended early)" if mark["step"] < mark["steps"] else ""
        return f"finished at step {mark['step']:,} of {mark['steps']:,}{early}"
    return f"not finished: recorded up to step {max(figures, default=0):,}"


def _tiles(
    figures: Mapping[int, Mapping[str, float]], step: int, decided: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """The result at a glance: of each figure its name, its value, and what it is to be held against, or nothing."""
    before, after = figures.get(0, {}), figures.get(step, {})
    for title, first, last in held_out_in_words(before, after):
        yield title.capitalize(), last, f"before: {first}" if first and step else ""
    speed, share = METRICS["speed/tokens_per_second"], METRICS["speed/padding_share"]
    if speeds := [value for _, value in points(figures, "speed/tokens_per_second")]:
        padding = [value for _, value in points(figures, "speed/padding_share")]
        beside = f"padding: {share.written(sum(padding) / len(padding))}" if padding else ""
        yield speed.chart, f"{sorted(speeds)[len(speeds) // 2]:{speed.form}}", beside
    names = ("memory/train_reserved_gib", "memory/host_gib", "memory/predicted_reserved_gib")
    peaks = ((METRICS[name], peak_of(figures, name)) for name in names)
    reserved, host, forecast = (peak if peak is None else f"{metric.written(peak)} GiB" for metric, peak in peaks)
    if reserved:
        yield "GPU memory", reserved, f"forecast: {forecast}" if forecast else ""
    elif host:
        yield "Host memory", host, "no GPU"
    seconds = decided.get("training_s")
    if seconds is not None and _is_number(seconds):
        yield "Training time", duration(seconds), "in steps alone"


def _samples(file: Path, step: int) -> Iterator[dict[str, str]]:
    """The samples of the best adapter, or else of the newest: prompt, answers of base and adapter, and how each
    was cut off, or nothing. Before training, only the base has answered.
    """
    reasons = {CUT: "cut at the limit", CUT_BY_CONTEXT: "cut by the base's context"}
    for row in answered(file, step):
        shown = {"prompt": _text(row.get("prompt"))}
        for whose in ("base", "adapter"):
            answer = row.get(whose)
            answer = answer if isinstance(answer, dict) else {}
            shown |= {whose: _text(answer.get("text")), f"{whose}_cut": reasons.get(str(answer.get("cut_by")), "")}
        yield shown


def _decisions(decided: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What the newest start printed, by topic."""
    by_topic: dict[str, list[str]] = {}
    lines = decided.get("lines")
    for pair in lines if isinstance(lines, list) else ():
        if isinstance(pair, list) and len(pair) == 2:
            topic = _text(pair[0])
            by_topic.setdefault(TOPICS.get(topic, topic), []).append(_text(pair[1]))
    yield from by_topic.items()


def _versions(decided: Mapping[str, Any]) -> str:
    """The package versions that the run recorded, not those of whoever makes the report."""
    kept = decided.get("versions")
    return ", ".join(f"{_text(name)} {_text(found)}" for name, found in kept.items()) if isinstance(kept, dict) else ""
