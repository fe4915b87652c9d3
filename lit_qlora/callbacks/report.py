"""Owns what the terminal shows: decisions at the start, each validation, and before -> after at the end.

Figures come from the run's own files, so a resumed run reports all of it. Knows no model but its sizes.
"""

import json
import math
import shlex
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from lit_qlora import demo
from lit_qlora.callbacks.checkpoints import RunCheckpoints, has_stopped_early, read_result
from lit_qlora.callbacks.memory import PeakMemory
from lit_qlora.callbacks.record import record
from lit_qlora.callbacks.steps import is_last_step
from lit_qlora.callbacks.throughput import Throughput
from lit_qlora.callbacks.validation import held_out_figures
from lit_qlora.console import WIDTH, note, say, wrapped
from lit_qlora.devices.world import world
from lit_qlora.errors import UserError, one_line
from lit_qlora.figures.card import PACKAGES, versions
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.report import write_report
from lit_qlora.figures.samples import answered, ends_in_words, side_by_side
from lit_qlora.forecast import words
from lit_qlora.forecast.foresee import foresee
from lit_qlora.metrics import METRICS, held_out, held_out_in_words, is_better
from lit_qlora.place import COMMAND
from lit_qlora.storage.config_file import flat
from lit_qlora.storage.files import SaveError, write_file
from lit_qlora.storage.run import RUNS, RunFolder, newest_run
from lit_qlora.wording import number_of

NO_GAIN = "and no better than before training"


class Report(Callback):
    """A callback that prints decisions, results, and what to do next.

    Args:
        run: the run folder.
        memory: the peaks, for the last lines.
        resumed_from: name of the checkpoint that the run resumes from, if any.
        checkpoints: reports failed saves.
        lengths: the options that set the run's length, for the record of its end.
    """

    def __init__(
        self,
        run: RunFolder,
        memory: PeakMemory,
        resumed_from: str | None,
        checkpoints: RunCheckpoints,
        lengths: Mapping[str, Any],
    ) -> None:
        self.run, self.memory, self.resumed_from, self.checkpoints = run, memory, resumed_from, checkpoints
        self.lengths = dict(lengths)
        self.forecast_gib: float | None = None
        self._lines: list[list[str]] = []
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self.has_ended = False
        """True if the end was reached; a run killed between its last save and its end starts at the end."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the decisions, once model and data are loaded."""
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "source", None) == "demo":
            self._say("demo", demo.WORLD)
        for line in data.describe():
            self._say("data", line)
        for line in data.example(lines=1 if self.resumed_from else 2):
            self._say("learns", line)
        for line in module.describe():
            self._say("model", line)
        steps = data.num_optimizer_steps()
        batch = number_of(*((data.plan.tokens, "tokens") if data.plan.tokens else (data.plan.rows, "rows")))
        if trainer.accumulate_grad_batches > 1:
            batch += f" x {trainer.accumulate_grad_batches} accumulated"
        reason: str = trainer.precision_reason  # type: ignore[attr-defined]
        self._say("train", f"{number_of(steps, 'steps')} of {batch}; precision {trainer.precision} ({reason})")
        if world().size > 1:
            share = data.train_dataloader().efficiency()
            dealt = f"{world().size} devices, micro-batches dealt by size: each works {share:.0%} of the time"
            self._say("train", dealt + words.uneven(trainer.accumulate_grad_batches, world().size))
        forecast = foresee(module, data, trainer)
        if forecast:
            self.forecast_gib = forecast.in_training_gib
            for line in words.forecast_lines(forecast):
                self._say("plan", line)
        self._say("run", f"{self.run.path}" + _resumed_in_words(self.resumed_from, module.device.type == "cuda"))
        self._keep_decisions({})

    def _say(self, topic: str, line: str) -> None:
        say(topic, line)
        self._lines.append([topic, line])

    def _keep_decisions(self, end: Mapping[str, Any]) -> None:
        """Keep what was printed at the start for the run's report, and ``end``, what is known at its end."""
        packages = versions(("lit-qlora", *PACKAGES, "datasets"))
        kept = {"started": self._started, "versions": packages, "lines": self._lines, **end}
        try:
            write_file(self.run.decisions, json.dumps(kept, indent=1) + "\n")
        except SaveError as error:  # a report without them is better than no run
            note(f"warning: {error}; training continues, and the report will lack the decisions")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the forecast beside the peaks, before the save that may follow the validation."""
        if self.forecast_gib is not None:
            record(trainer, {"memory/predicted_reserved_gib": self.forecast_gib})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line per validation."""
        if not trainer.is_global_zero:
            return
        figures = held_out_figures(trainer)
        best = read_result(self.run.adapter)
        is_best = best is not None and best["step"] == trainer.global_step
        mark = "best" if is_best else "" if trainer.global_step else "before"
        tqdm.write(held_out_line(trainer.global_step, figures, mark))  # above the bar
        if not math.isfinite(figures["val/loss"]):
            broken = "not finite: the base, or this state of the adapter, is broken; it is never the best"
            tqdm.write(wrapped("", broken))
        elif is_best and not is_gain(self.run, figures["val/loss"]):
            tqdm.write(wrapped("", f"the best so far, {NO_GAIN}"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print before and after, and the adapter's path; record the end of a finished run."""
        self.has_ended = True
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        if not (is_last_step(trainer) or has_stopped_early(trainer)):
            saved = max(self.run.saved_steps(), default=0)  # a callback may stop the Trainer inside of a step
            here = "here" if saved == trainer.global_step else f"step {saved}"
            then = f"resumes from {here}" if saved else "begins anew, for nothing was saved"
            print(f"stopped at step {trainer.global_step}; the same command {then}", flush=True)
            return
        # Entries that could not be written are in the last checkpoint, and in no file.
        unwritten = {type(logger).__name__: getattr(logger, "problem", None) for logger in trainer.loggers}
        self.checkpoints.failures |= {name: problem for name, problem in unwritten.items() if problem}
        if self.checkpoints.failures:  # the run is not finished: the same command, given again, completes it
            return
        steps = trainer.datamodule.num_optimizer_steps()  # type: ignore[attr-defined]
        best = read_result(self.run.adapter) or {}
        mark = {"step": trainer.global_step, "steps": steps, "lengths": self.lengths, "best_step": best.get("step")}
        if not self.checkpoints.attempt("mark", lambda: write_file(self.run.finished_mark, json.dumps(mark))):
            return
        self.checkpoints.drop_aside()
        (throughput,) = (callback for callback in trainer.callbacks if isinstance(callback, Throughput))  # type: ignore[attr-defined]
        self._keep_decisions({"training_s": throughput.training_s})
        table = before_and_after(self.run)
        print("\n".join(["", *(table and [*table, ""]), *last_samples(self.run), *self._closing()]), flush=True)

    def _closing(self) -> list[str]:
        peaks = [f"{METRICS[name].label} {METRICS[name].written(gib)}" for name, gib in self.memory.peaks_gib.items()]
        if self.forecast_gib is not None:
            peaks.append(f"forecast for training, reserved: {self.forecast_gib:.2f}")
        best = read_result(self.run.adapter) or {}
        loss = best.get("val/loss")
        gain = "" if loss is None or is_gain(self.run, loss) else f", {NO_GAIN}"
        memory = f"peak memory (GiB): {', '.join(peaks)}"
        return [
            *textwrap.wrap(memory, WIDTH, subsequent_indent=" " * 19),
            f"best adapter: {self.run.adapter}{gain}",
            f"report: {self._report()}",
            f"curves: tensorboard --logdir {shlex.quote(str(self.run.path.parent))}",
            *next_step(self.run),
        ]

    def _report(self) -> str:
        """Write the run's report; its path, or why there is none: the run is finished either way."""
        try:
            return str(write_report(self.run))
        except (OSError, ImportError) as error:
            return f"none ({one_line(error)}); {COMMAND} report makes it"


def held_out_line(step: int, figures: Mapping[str, float], mark: str) -> str:
    """The line of a validation, within `WIDTH` columns whatever the figures are.

    Args:
        step: optimizer steps done.
        figures: of the validation, by their names in the record.
        mark: what the validation is, in a word.
    """
    shown = {name: metric for name, metric in held_out().items() if metric.line and name in figures}
    parts = [metric.line.format(metric.written(figures[name])).replace(" ", "\0") for name, metric in shown.items()]
    line = f"step {step:>6}  {' '.join(parts)}  {mark}".rstrip()
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * 13).replace("\0", " ")  # each part stays whole


def last_samples(run: RunFolder) -> list[str]:
    """Sample questions as the best adapter of ``run`` answers them, beside the base; an empty line behind them."""
    shown = side_by_side(answered(run.samples, (read_result(run.adapter) or {}).get("step")))
    return [*shown, ""] if shown else []


def next_step(run: RunFolder) -> list[str]:
    """What to do with the adapter of ``run``, and of the demo what to ask it."""
    try:
        is_newest = newest_run().path.resolve() == run.path.resolve()
    except UserError:  # the run lies elsewhere
        is_newest = False
    name = run.path.name if run.path.parent == RUNS else str(run.path)
    lines = [f"next: {COMMAND} chat{'' if is_newest else f' --run {shlex.quote(name)}'}"]
    config = flat(run.read_config()) if run.config.is_file() else {}
    if (config.get("model.base"), config.get("data.source")) == ("demo", "demo"):
        lines.append(f"      and ask it: {demo.QUESTION}")
    return lines


def is_gain(run: RunFolder, loss: float) -> bool:
    """True if a loss is below the one before training, or if none was measured then.

    Args:
        run: the run folder, with the recorded figures.
        loss: held-out loss in nats per token.
    """
    before = (line for line in read_lines(run.metrics) if not line["step"] and "val/loss" in line)
    return is_better({"val/loss": loss}, next(before, None))


def before_and_after(run: RunFolder) -> list[str]:
    """A table of the held-out figures of ``run`` measured both at step 0 and at the best step."""
    by_step = {line["step"]: line for line in read_lines(run.metrics)}
    best = read_result(run.adapter)
    if best is None or 0 not in by_step or best["step"] not in by_step:
        return []
    before, after = by_step[0], by_step[best["step"]]
    lines = [f"{'':32}{'before':>12}   after (step {best['step']}, the best)"]
    for title, first, last in (*held_out_in_words(before, after), *ends_in_words(before, after)):
        if first is not None:
            lines.append(f"{title:32}{first:>12}   {last}")
    return lines


def _resumed_in_words(resumed_from: str | None, on_gpu: bool) -> str:
    """The resumed checkpoint, with a note if the last bits may differ."""
    if resumed_from is None:
        return ""
    exact = not on_gpu or torch.are_deterministic_algorithms_enabled()
    but = "" if exact else "; state and order are exact, a GPU's last bits only with --trainer.deterministic true"
    return f", resuming from {resumed_from}{but}"
