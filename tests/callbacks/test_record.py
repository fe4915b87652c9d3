"""The run's record goes back to a checkpoint once nothing refuses that any more, and is whole at the end."""

import pytest

from lit_qlora.callbacks.record import KeepRecord
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder


def steps(path):
    return [line["step"] for line in read_lines(path)]


def test_a_resume_cuts_the_record_back_and_a_refused_one_leaves_it(full_run, tiny, rows, tmp_path):
    parts = full_run(tmp_path / "run", 2)
    parts.trainer.fit(tiny(), datamodule=rows(6))
    assert steps(parts.run.metrics) == [0, 1, 2, 3, 4, 5, 6]
    before = parts.run.metrics.read_bytes()

    class Refuses(KeepRecord):
        state_key = "Refuses"

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            raise ValueError("another base")

    refused = full_run(tmp_path / "run", 2)
    refused.trainer.callbacks.append(Refuses())
    with pytest.raises(ValueError, match="another base"):
        refused.trainer.fit(tiny(), datamodule=rows(6), ckpt_path=parts.run.checkpoint(2))
    assert parts.run.metrics.read_bytes() == before

    class Dies(tiny):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        full_run(tmp_path / "run", 2).trainer.fit(Dies(), datamodule=rows(6), ckpt_path=parts.run.checkpoint(2))
    assert steps(parts.run.metrics) == [0, 1]  # the line of 2 is in the checkpoint
    again = full_run(tmp_path / "run", 2)
    again.trainer.fit(tiny(), datamodule=rows(6), ckpt_path=parts.run.checkpoint(2))
    assert steps(parts.run.metrics) == [0, 1, 2, 3, 4, 5, 6]


def test_figures_go_to_every_logger_and_a_trainer_without_a_record_is_left_alone(trainer, tiny, rows, tmp_path):
    run = RunFolder(tmp_path / "run")
    trainer(KeepRecord(), logger=[Record(run)]).fit(tiny(), datamodule=rows(2))
    trainer(KeepRecord()).fit(tiny(), datamodule=rows(2))
    assert not run.metrics.exists()  # nothing was recorded
