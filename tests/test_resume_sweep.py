"""A run goes on from every one of its checkpoints, and from a SIGKILL at every kind of moment, to the same last bit.

Through the real command in-process, on a real NF4 base with LoRA dropout and recomputed activations. For each
checkpoint the run folder is copied twice: as soon as it stands there, and as late as can be before the next.
"""

import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora import demo
from lit_qlora.cli import main
from scripts import witness

FACTORS: dict[str, dict[str, list[str]]] = {
    "accumulation": {
        "1": ["--trainer.accumulate_grad_batches", "1"],
        "2": ["--trainer.accumulate_grad_batches", "2"],
        "3": ["--trainer.accumulate_grad_batches", "3"],
    },
    "validation": {
        "mid-window": ["--trainer.val_check_interval", "5"],
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


def pairwise() -> list[Case]:
    """Cases in which any two levels of any two factors meet; greedy, so a few more than the fewest."""
    every = list(itertools.product(*FACTORS.values()))
    left, chosen = {pair for case in every for pair in _pairs(case)}, []
    while left:
        best = max(every, key=lambda case: len(left & _pairs(case)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(case), 2))


CASES = pairwise()


def test_any_two_settings_meet() -> None:
    met = {pair for case in CASES for pair in _pairs(case)}
    for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {((i, a), (j, b)) for a in one for b in other} <= met
    assert len(met) == 9 + 6 + 9 + 6 + 6 + 9 + 6 + 6 + 4 + 6
    assert len(CASES) <= 12


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
    # TensorBoard orders its files by the second in their names: real starts are further apart.
    while any(f"tfevents.{int(time.time())}" in path.name for path in run.glob("events.*")):
        time.sleep(0.02)
    witness.note(run, phase="start")
    assert main(["fit", "--run", str(run), *arguments]) == 0


def _copy(run: Path, target: Path) -> None:
    shutil.copytree(run, target, copy_function=shutil.copy2)
    shutil.copy(witness.testimony_file(run), witness.testimony_file(target))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From now on, a run folder is copied right behind each save, and right before the next."""
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


def chosen(case: Case) -> list[str]:
    """The options of a case."""
    return [option for levels, level in zip(FACTORS.values(), case, strict=True) for option in levels[level]]


QUICK = [("2", "mid-window", "none", "rows", "adamw"), ("3", "epoch's end", "two", "packed", "8-bit")]


@pytest.mark.parametrize("case", QUICK, ids="|".join)
def test_some_settings(case: Case, options: list[str], copies: Callable[[Path], Any]) -> None:
    whole = sweep([*options, *chosen(case)], copies, lambda step, kind: kind == ("early", "late")[step % 2])
    assert len(witness.testimony(whole)[0]) > 20


def test_cut_again_in_the_epoch_that_a_resume_began(options: list[str]) -> None:
    """At an epoch's edge first, in the midst of the next epoch then: each save is of a run that was resumed before."""
    arguments = [*options, *chosen(QUICK[0]), "--save_every_steps", "1", "--keep_checkpoints", "99"]
    fit(Path("whole"), arguments)
    steps = sorted(int(path.name.removeprefix("step-")) for path in Path("whole/checkpoints").iterdir())
    edge = len(steps) // 2
    run = Path("whole")
    for number, cut in enumerate((edge, edge + 1, edge + 2)):
        shutil.copytree(run, f"cut-{number}", copy_function=shutil.copy2)
        run = Path(f"cut-{number}")
        for step in steps[cut:]:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
        (run / "finished.json").unlink()
        fit(run, arguments)
        last = f"checkpoints/step-{steps[-1]:08d}/state.safetensors"
        assert (run / last).read_bytes() == Path("whole", last).read_bytes(), cut


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="|".join)
def test_every_checkpoint_of_every_pair_of_settings(
    case: Case, options: list[str], copies: Callable[[Path], Any]
) -> None:
    sweep([*options, *chosen(case)], copies, lambda step, kind: True)
