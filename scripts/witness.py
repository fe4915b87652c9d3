"""Owns what a run shows of itself while it trains, and what of it must be the same however often it was cut.

``--trainer.callbacks scripts.witness.Witness`` has the real command write one line per micro-batch, update,
validation and phase into a file beside its run folder. Knows nothing of kills.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.optim import Optimizer

from lit_qlora.batch import Batch
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.tensorboard import HELD_OUT_FOLDER, TRAINING_FOLDER
from lit_qlora.storage.run import RunFolder
from lit_qlora.storage.state import load_state

CLOCK = re.compile(r"(speed/tokens|memory/|3 Speed/tokens|4 Memory|_hparams_)")
"""Figures that the clock and the host have a say in, and what is no figure."""

NOT_COMPARED = re.compile(r"\.(seconds|training_s|at_s)$|metrics_line.*(speed/tokens|memory/)")
"""The same in a checkpoint."""


def testimony_file(run: Path) -> Path:
    """The file of the witness of ``run``, beside the folder."""
    return run.with_name(f"{run.name}.witness.jsonl")


def note(run: Path, **what: Any) -> None:
    """Add a line to a witness's file in one write: a kill leaves it whole or not there.

    Args:
        run: Run folder.
        **what: Keys and values of the line.
    """
    with testimony_file(run).open("a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


class Witness(Callback):
    """Write down each loss, learning rate and held-out figure to its last bit, and the phase that the run is in."""

    def __init__(self) -> None:
        self._phase = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note that data is read and the model loaded."""
        self._enter(trainer, "load")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note that it trains."""
        self._enter(trainer, "train")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate of the update."""
        rates = [float(group["lr"]).hex() for group in optimizer.param_groups]
        self._note(trainer, update=trainer.global_step + 1, learning_rates=rates)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note rows and loss of the micro-batch."""
        loss = float(outputs["loss_sum"]).hex()
        self._note(trainer, epoch=trainer.current_epoch, batch=batch_idx, rows=list(batch.rows), loss=loss)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it validates; the saves after it are of the same phase, up to `on_save_checkpoint`."""
        self._enter(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out figures."""
        figures = {name: float(value).hex() for name, value in trainer.callback_metrics.items()}
        held_out = {name: value for name, value in figures.items() if name.startswith("val/")}
        self._note(trainer, validation=trainer.fit_loop.epoch_loop.total_batch_idx, held_out=held_out)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that it saves, up to the next micro-batch."""
        self._enter(trainer, "save")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training has ended."""
        self._enter(trainer, "end")

    def _enter(self, trainer: Trainer, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._note(trainer, phase=phase)

    def _note(self, trainer: Trainer, **what: Any) -> None:
        note(Path(trainer.default_root_dir), **what)


def testimony(run: Path) -> list[list[dict[str, Any]]]:
    """Return what each start of ``run`` has seen, in order; a start begins with the phase ``start``."""
    starts: list[list[dict[str, Any]]] = []
    for line in testimony_file(run).read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        if said.get("phase") == "start":
            starts.append([])
        elif "phase" not in said:
            starts[-1].append(said)
    return starts


def last_phase(run: Path) -> str:
    """The phase in which the newest start of ``run`` wrote its last line."""
    lines = testimony_file(run).read_text(encoding="utf-8").splitlines()
    return next(said["phase"] for said in map(json.loads, reversed(lines)) if "phase" in said)


def contradictions(starts: list[list[dict[str, Any]]], whole: list[dict[str, Any]]) -> list[str]:
    """Find where a run's starts did not do what the uninterrupted run did, or left out what none before had done.

    Args:
        starts: What each start has seen, as `testimony` returns it.
        whole: What the uninterrupted run has seen.

    Returns:
        A sentence for each contradiction.
    """
    found, done = [], 0
    for number, said in enumerate(starts):
        if not said:
            continue
        if said[0] not in whole:
            found.append(f"start {number} began with {said[0]}, which was never")
            continue
        first = whole.index(said[0])
        if first > done:
            found.append(f"start {number} began with {said[0]}, and {whole[done]} was never done")
        for was, now in zip(whole[first:], said, strict=False):
            if was != now:
                found.append(f"start {number}: {was} became {now}")
                break
        if first + len(said) > len(whole):
            found.append(f"start {number} did more than there was: {said[len(whole) - first]}")
        done = max(done, first + len(said))
    if done < len(whole):
        found.append(f"{whole[done]} was never done")
    return found


def result(run: Path) -> dict[str, Any]:
    """Return what a finished ``run``'s files hold that depends on no clock, process or place."""
    kept = RunFolder(run)
    found: dict[str, Any] = {"checkpoints": kept.saved_steps(), "finished": kept.finished()}
    found["configs"] = sorted(path.name for path in run.glob("config*.yaml"))
    for line in read_lines(kept.metrics):
        step = line.pop("step")
        assert f"metrics, step {step}" not in found, f"step {step} stands twice in {kept.metrics}"
        found[f"metrics, step {step}"] = {name: value for name, value in line.items() if not CLOCK.match(name)}
    for line in read_lines(kept.samples):
        step = line.pop("step")
        assert f"samples, step {step}" not in found, f"step {step} stands twice in {kept.samples}"
        found[f"samples, step {step}"] = line
    for file in sorted(path for path in kept.adapter.iterdir() if path.name != "manifest.json"):
        content = file.read_bytes()
        if file.suffix == ".md":  # the card states how long it took, and how much memory
            content = re.sub(rb"(?m)^[\d,]+ optimizer steps.*$", b"", content)
        found[f"adapter/{file.name}"] = hashlib.sha256(content).hexdigest()
    found |= _flat(load_state(kept.checkpoint(kept.saved_steps()[-1])), "last checkpoint")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each file that continues another
    for part in (TRAINING_FOLDER, HELD_OUT_FOLDER):
        curves = EventAccumulator(str(run / part), size_guidance={"tensors": 0}).Reload()
        for tag in curves.Tags()["tensors"]:
            if not CLOCK.match(tag):
                values = [(event.step, make_ndarray(event.tensor_proto).item()) for event in curves.Tensors(tag)]
                found[f"TensorBoard {part} {tag}"] = [
                    (at, value.hex() if isinstance(value, float) else value) for at, value in values
                ]
    return found


def differences(now: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Compare two runs' results.

    Args:
        now: Result of a run, as `result` returns it.
        whole: Result of the uninterrupted run.

    Returns:
        A sentence for each difference.
    """
    return [
        f"{name}: {whole.get(name)} became {now.get(name)}"
        for name in sorted({*whole, *now})
        if whole.get(name) != now.get(name)
    ]


def _flat(state: Any, name: str = "") -> dict[str, Any]:
    """A nested state as one dict, tensors by type, shape and content; without what was measured of time."""
    if isinstance(state, Tensor):
        content = state.contiguous().view(-1).numpy().tobytes()
        return {name: (str(state.dtype), tuple(state.shape), hashlib.sha256(content).hexdigest())}
    if not isinstance(state, dict | list | tuple):
        return {} if NOT_COMPARED.search(name) else {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {key: value for inner, part in items for key, value in _flat(part, f"{name}.{inner}").items()}
