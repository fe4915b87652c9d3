"""All figures of a step stand in one line, those of the open step are in the checkpoint, and views follow."""

import json
import math
from types import SimpleNamespace

import pytest

from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder

ANSWERS = {"max_new_tokens": 4, "answers": [{"prompt": "a", "base": {"text": "b", "cut_by": None}}]}


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def written(record, *lines):
    """Logs (step, figures) pairs, and ends."""
    for step, figures in lines:
        record.log_metrics(figures, step=step)
    record.finalize("success")
    return record


def through_json(state):
    """A state through JSON, as `storage.state` writes it: keys stay numbers."""

    def numbered(found):
        return {int(key) if key.isdigit() else key: value for key, value in found.items()}

    return json.loads(json.dumps(state), object_hook=numbered)


def test_a_line_holds_all_figures_of_a_step(run):
    written(Record(run), (0, {"a": 1.5}), (0, {"b": 2}), (3, {"a": 0.25}))
    assert run.metrics.read_text(encoding="utf-8") == '{"step": 0, "a": 1.5, "b": 2.0}\n{"step": 3, "a": 0.25}\n'
    assert [file.name for file in run.path.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_finite_is_a_string(run):
    written(Record(run), (1, {"a": math.inf, "b": -math.inf, "c": math.nan}))
    assert run.metrics.read_text(encoding="utf-8") == '{"step": 1, "a": "inf", "b": "-inf", "c": "nan"}\n'


def test_a_save_in_between_does_not_close_the_line(run):
    # A checkpoint is saved at a step's edge; a validation in the window after it belongs to the same step.
    record = Record(run)
    record.log_metrics({"a": 1}, step=1)
    record.save()
    assert not run.metrics.exists()
    written(record, (1, {"b": 2}))
    assert [*read_lines(run.metrics)] == [{"step": 1, "a": 1.0, "b": 2.0}]


def test_a_run_that_was_cut_keeps_the_open_step_in_its_checkpoint(run):
    record = Record(run)
    record.log_metrics({"a": 0}, step=0)
    record.log_metrics({"a": math.nan}, step=1)
    record.log_samples(ANSWERS, 1)
    state = through_json(record.state_dict())
    record.log_metrics({"b": 8}, step=1)  # after the save: comes again
    record.log_metrics({"a": 8}, step=2)
    record.finalize("failed")
    assert [line["step"] for line in read_lines(run.metrics)] == [0, 1]
    resumed = Record(run)
    resumed.go_back(state)
    assert resumed.by_step() == {0: {"step": 0, "a": 0.0}, 1: {"step": 1, "a": "nan"}}
    written(resumed, (1, {"b": 2}), (2, {"a": 3}))
    assert [*read_lines(run.metrics)] == [
        {"step": 0, "a": 0.0},
        {"step": 1, "a": "nan", "b": 2.0},
        {"step": 2, "a": 3.0},
    ]
    assert [*read_lines(run.samples)] == [{"step": 1, **ANSWERS}]


def test_samples_of_steps_after_the_checkpoint_are_removed(run):
    record = Record(run)
    record.log_samples(ANSWERS, 0)
    record.log_metrics({"a": 1}, step=2)
    state = through_json(record.state_dict())
    for step in (4, 6):
        record.log_samples(ANSWERS, step)
    record.finalize("success")
    assert [line["step"] for line in read_lines(run.samples)] == [0, 4, 6]
    Record(run).go_back(state)
    assert [line["step"] for line in read_lines(run.samples)] == [0]


def test_what_is_counted_otherwise_ends_no_line_and_is_kept_apart(run):
    """A callback of the user's own may log under the micro-batches of all validations."""
    record = Record(run)
    record.trainer = SimpleNamespace(global_step=1)
    record.log_metrics({"a": 1}, step=1)
    record.log_metrics({"odd": 9}, step=100)
    record.log_metrics({"b": 2}, step=1)
    state = through_json(record.state_dict())
    for one in (record, Record(run)):
        one.trainer = SimpleNamespace(global_step=2)
        if one is not record:
            one.go_back(state)
        one.log_metrics({"a": 3}, step=2)
        one.log_metrics({"odd": 8}, step=101)
        one.finalize("success")
        assert [*read_lines(run.metrics)] == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]
        assert [*read_lines(run.others)] == [
            {"step": 1, "figures": [[100, {"odd": 9.0}]]}, {"step": 2, "figures": [[101, {"odd": 8.0}]]}
        ]  # fmt: skip
