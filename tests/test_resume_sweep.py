"""A run resumed from any of its checkpoints, or after a SIGKILL at any kind of moment, ends the same to the last bit.

Through the real command in-process, on a real NF4 base with LoRA dropout and recomputed activations. For each
checkpoint the run folder is copied twice: as soon as it stands there, and as late as can be before the next. The slow
tests resume every pair of settings from each checkpoint as it then stands, to the next, and from late copies to the
end, from those of odd steps or of even ones by turns.
"""

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.figures import card, charts, report
from scripts import witness

FACTORS: dict[str, dict[str, list[str]]] = {
    "accumulation": {
        "1": ["--trainer.accumulate_grad_batches", "1", "--trainer.limit_train_batches", "5"],  # else 7
        "2": ["--trainer.accumulate_grad_batches", "2"],
        "3": ["--trainer.accumulate_grad_batches", "3"],
    },
    "validation": {
        "mid-window": ["--trainer.val_check_interval", "4"],  # of 5 and 7 in an epoch; over epochs
        "epoch's end": ["--trainer.val_check_interval", "1.0"],
        "none between": ["--trainer.val_check_interval", "1000"],
    },
    "workers": {"none": ["--data.num_workers", "0"], "two": ["--data.num_workers", "2"]},
    "batches": {
        "rows": ["--data.batch_size", "2"],
        "tokens": ["--data.batch_tokens", "100"],
        "packed": ["--data.batch_tokens", "90", "--data.packing", "true"],
    },
    "optimizer": {"adamw": ["--model.optimizer", "adamw"], "8-bit": ["--model.optimizer", "adamw_8bit"]},
}
FIXED = [
    "--model.rank", "64",  # 64 x 64 weights in a matrix: from there on, the state of the 8-bit optimizer is in 8 bits
    "--model.dropout", "0.2", "--model.checkpointing", "full", "--model.learning_rate", "0.005",
    "--data.max_length", "64", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2",
    "--samples.count", "1", "--samples.max_new_tokens", "3", "--trainer.callbacks", "scripts.witness.Witness",
]  # fmt: skip
Case = tuple[str, ...]


CASES: list[Case] = [
    ("1", "mid-window", "two", "tokens", "8-bit"),
    ("1", "epoch's end", "none", "packed", "8-bit"),
    ("1", "none between", "none", "rows", "adamw"),
    ("2", "mid-window", "none", "rows", "adamw"),
    ("2", "epoch's end", "none", "tokens", "adamw"),
    ("2", "none between", "two", "packed", "8-bit"),
    ("3", "mid-window", "none", "packed", "adamw"),
    ("3", "epoch's end", "two", "rows", "8-bit"),
    ("3", "none between", "two", "tokens", "adamw"),
]
"""Any two levels of any two factors meet in one; with three levels in three factors, it takes 9."""


def _pairs(case: Case) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(case), 2))


def test_any_two_settings_meet() -> None:
    met = {pair for case in CASES for pair in _pairs(case)}
    for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {((i, a), (j, b)) for a in one for b in other} <= met
    assert len(met) == 9 + 6 + 9 + 6 + 6 + 9 + 6 + 6 + 4 + 6


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A random Llama of 2 layers with the demo's tokenizer, and 14 of its conversations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, initializer_range=0.1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.BASE / name, folder / "base")
    for source, count in ((demo.TRAIN, 14), (demo.TEST, 3)):
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        (folder / source.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        "--model.base", str(folder / "base"), "--data.source", str(folder / demo.TRAIN.name),
        "--data.validation_source", str(folder / demo.TEST.name), *FIXED,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves signals as they were: a run takes them over."""
    monkeypatch.chdir(tmp_path)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def fit(run: Path, arguments: list[str]) -> None:
    """The command, given for ``run``."""
    witness.note(run, phase="start")
    assert main(["fit", "--run", os.path.join(".", run), *arguments]) == 0  # noqa: PTH118 - a Path drops the dot


def _copy(run: Path, target: Path) -> None:
    shutil.copytree(run, target, copy_function=shutil.copy2)
    shutil.copy(witness.testimony_file(run), witness.testimony_file(target))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function after whose call a run folder is copied right after each save, and right before the next."""
    from lit_qlora.storage.checkpoint_io import FolderCheckpointIO

    save = FolderCheckpointIO.save_checkpoint

    def save_and_copy(self: Any, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        run, step = path.parents[1], int(path.name.removeprefix("step-"))
        if step > 1:
            _copy(run, run.with_name(f"late-{step - 1}"))
        save(self, checkpoint, path, storage_options)
        _copy(run, run.with_name(f"early-{step}"))

    def stop() -> None:
        monkeypatch.setattr(FolderCheckpointIO, "save_checkpoint", save)

    def start(run: Path) -> Callable[[], None]:
        monkeypatch.setattr(FolderCheckpointIO, "save_checkpoint", save_and_copy)
        return stop

    return start


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have curves written as figures, to be compared in a hundredth of the time."""

    def written(file: Path, figures: charts.FiguresByStep, step: int) -> bool:
        shown = {at: {name: value for name, value in found.items() if "loss" in name} for at, found in figures.items()}
        file.write_text(f"{step} {shown}", encoding="utf-8")
        return True

    monkeypatch.setattr(card, "draw_curves", written)
    monkeypatch.setattr(report, "charts", lambda *_: iter(()))


def sweep(arguments: list[str], copies: Callable[[Path], Any], take: Callable[[int, str], bool]) -> Path:
    """Runs once without a break, then from every copy that ``take`` chooses by its step and its name."""
    arguments = [*arguments, "--save_every_steps", "1"]
    whole = Path("whole")
    stop = copies(whole)
    fit(whole, arguments)
    stop()
    expected, (said,) = witness.result(whole), witness.testimony(whole)
    last = expected["finished"]["step"]
    _copy(whole, Path(f"late-{last}"))
    Path(f"late-{last}", "finished.json").unlink()
    for step in range(1, last + 1):
        for kind in ("early", "late"):
            run = Path(f"{kind}-{step}")
            if take(step, kind):
                fit(run, arguments)
                assert witness.differences(witness.result(run), expected) == [], run
                before, after = witness.testimony(run)
                assert witness.contradictions([before, after], said) == [], run
                # The same rest, and nothing twice: what the copy had not seen is a saved step's.
                done = [line for line in said[: len(said) - len(after)] if "update" in line]
                assert len(done) == step, run
            shutil.rmtree(run)
    return whole


class Cut(BaseException):
    """Ends a start right after a save."""


def chain(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts a run after each of its saves, so that each checkpoint is made by a start that had resumed from another."""
    from lit_qlora.storage.checkpoint_io import FolderCheckpointIO

    save = FolderCheckpointIO.save_checkpoint

    def save_and_cut(self: Any, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        raise Cut

    arguments, run, whole = [*arguments, "--save_every_steps", "1"], Path("chain"), Path("whole")
    expected, (said,) = witness.result(whole), witness.testimony(whole)
    with monkeypatch.context() as patched:
        patched.setattr(FolderCheckpointIO, "save_checkpoint", save_and_cut)
        for _ in range(expected["finished"]["step"]):
            with pytest.raises(Cut):
                fit(run, arguments)
    fit(run, arguments)
    assert witness.contradictions(witness.testimony(run), said) == []
    assert witness.differences(witness.result(run), expected) == []


def chosen(case: Case) -> list[str]:
    """The options of a case."""
    return [option for levels, level in zip(FACTORS.values(), case, strict=True) for option in levels[level]]


QUICK = chosen(("2", "mid-window", "none", "rows", "adamw"))
"""One of those that the slow tests go through."""


def _every_other(step: int, kind: str) -> bool:
    """One copy of even steps: as soon as can be, and as late, by turns; the late one of an epoch's end."""
    return step % 2 == 0 and kind == ("late", "early")[step // 2 % 2]


def test_some_settings(options: list[str], copies: Callable[[Path], Any]) -> None:
    whole = sweep([*options, *QUICK], copies, _every_other)
    assert len(witness.testimony(whole)[0]) > 20


@pytest.mark.slow(first=True)
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("case", CASES, ids="|".join)
def test_every_checkpoint_of_every_pair_of_settings(
    case: Case, options: list[str], copies: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep([*options, *chosen(case)], copies, lambda step, kind: kind == "late" and step % 2 == CASES.index(case) % 2)
    chain([*options, *chosen(case)], monkeypatch)


# Moments: a process of its own is killed at one of them, and the command is given again.


def kill_at(owner: Any, name: str, when: Callable[..., bool]) -> Callable[[], None]:
    """Has this process killed by SIGKILL where ``owner.name`` is about to be called with what ``when`` waits for."""

    def put_in() -> None:
        original = getattr(owner, name)

        def killed(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killed)

    return put_in


def _moments() -> dict[str, Callable[[], None]]:
    """The run has 2 x 7 micro-batches, a window of 2, a validation after 5 and 10 of them, and a save at each 2nd
    step."""
    from lit_qlora.model import load
    from lit_qlora.model.module import QLoRAModule
    from lit_qlora.storage import folders

    def at(epoch: int, batch: int) -> Callable[..., bool]:
        return lambda _, trainer, __, ___, batch_idx: (trainer.current_epoch, batch_idx) == (epoch, batch)

    def begins(name: str) -> Callable[..., bool]:
        return lambda path, *_, **__: Path(path).name.startswith(name)

    def second_best(path: Path, _: Any) -> bool:
        return path.name.startswith(".adapter.tmp-") and any(path.parent.glob(".adapter.old-*"))

    seen, start, end = witness.Witness, "on_train_batch_start", "on_train_epoch_end"
    return {
        "before the model is loaded": kill_at(load, "load_base", lambda *_: True),
        "before the first save": kill_at(seen, start, at(0, 3)),
        "mid-epoch": kill_at(seen, start, at(0, 6)),
        "mid-accumulation": kill_at(seen, start, at(1, 3)),
        "mid-accumulation, behind a validation": kill_at(seen, start, at(0, 5)),
        "before an update": kill_at(seen, "on_before_optimizer_step", lambda _, trainer, *__: trainer.global_step == 2),
        "in a validation": kill_at(QLoRAModule, "validation_step", lambda self, *_: self.trainer.global_step == 5),
        "before the manifest of a save": kill_at(folders, "_seal", begins(".step-00000004")),
        "between a save's folder and its rename": kill_at(folders, "_put", begins(".step-00000004")),
        "between the two renames of the best adapter": kill_at(Path, "rename", second_best),
        "while an old checkpoint goes": kill_at(shutil, "rmtree", begins(".step-00000002.gone-")),
        "at an epoch's edge": kill_at(seen, end, lambda *_: True),
        "at the second epoch's first batch": kill_at(seen, start, at(1, 0)),
        "behind the last save": kill_at(seen, "on_train_end", lambda *_: True),
    }  # fmt: skip


MOMENT_OPTIONS = [
    "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "5", "--data.batch_size", "2",
    "--save_every_steps", "2",
]  # fmt: skip
QUICK_MOMENTS = (
    "mid-accumulation, behind a validation",
    "between a save's folder and its rename",
)
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def _killed(run: Path, arguments: list[str], put_in: Callable[[], None]) -> None:
    """Gives the command in a fork that ends at its moment."""
    witness.note(run, phase="start")
    child = os.fork()
    if not child:
        try:
            put_in()
            main(["fit", "--run", str(run), *arguments])
        finally:
            os._exit(99)  # it never came to its moment
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"exit status {status}"


def _go_through(moments: dict[str, Callable[[], None]], options: list[str]) -> None:
    arguments, whole = [*options, *MOMENT_OPTIONS], Path("whole")
    fit(whole, arguments)
    expected, (said,) = witness.result(whole), witness.testimony(whole)
    for number, (moment, put_in) in enumerate(moments.items()):
        run = Path(f"run-{number}")
        _killed(run, arguments, put_in)
        fit(run, arguments)
        assert witness.differences(witness.result(run), expected) == [], moment
        assert witness.contradictions(witness.testimony(run), said) == [], moment


@forks
def test_some_moments(options: list[str]) -> None:
    moments = _moments()
    _go_through({moment: moments[moment] for moment in QUICK_MOMENTS}, options)


@forks
@pytest.mark.slow
def test_every_moment(options: list[str]) -> None:
    _go_through(_moments(), options)


def test_a_finished_run_is_left_as_it_is(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, run = [*options, *MOMENT_OPTIONS, "--trainer.max_steps", "2"], Path("run")
    fit(run, arguments)
    capsys.readouterr()

    def files() -> dict[Path, tuple[bytes, int]]:
        found = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")  # which says who has it
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    before = files()
    assert len(before) > 12
    assert main(["fit", "--run", os.path.join(".", run), *arguments]) == 0  # noqa: PTH118 - a Path drops the dot
    assert "is finished (2 of 2 steps): nothing to do" in capsys.readouterr().out
    assert files() == before


# What is left to chance or to others: a gradient scaler that overflows, and early stopping.


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_gradient_scaler_keeps_its_scale(
    options: list[str], copies: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 as on a T4; the scale doubles after every 2nd update, so it overflows again and again."""
    from lightning.pytorch.plugins import MixedPrecision

    from lit_qlora import trainer, training

    class HalfTrainer(trainer.QLoRATrainer):
        def __init__(self, **config: Any) -> None:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
            plugins = [*config.pop("plugins"), MixedPrecision("16-mixed", "cpu", scaler)]
            super().__init__(**config, plugins=plugins)

    monkeypatch.setattr(trainer, "choose_precision", lambda *_: (None, "as on a T4"))
    monkeypatch.setattr(training, "QLoRATrainer", HalfTrainer)
    whole = sweep([*options, *QUICK], copies, _every_other)
    skipped = [
        line["updates/skipped"] for line in witness.read_lines(whole / "metrics.jsonl") if "updates/skipped" in line
    ]
    assert 0 < skipped[0] < skipped[-1] < 6


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_early_stop_stays_where_it_was(options: list[str], copies: Callable[[Path], Any]) -> None:
    # the rate is too small for a loss to fall, on any machine; adapter and optimizer change with each step still
    stopped = ["--early_stopping", "4", "--model.learning_rate", "1e-12", "--trainer.max_epochs", "4"]
    whole = sweep([*options, *QUICK, *stopped], copies, lambda step, kind: _every_other(step, kind) or step == 9)
    mark = witness.result(whole)["finished"]
    assert (mark["step"], mark["steps"]) == (9, 16)
