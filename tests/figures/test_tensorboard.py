"""TensorBoard's files of a run: the loss first, runs by name, and each step once, however often it is resumed."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray

from lit_qlora.figures.record import Record
from lit_qlora.figures.tensorboard import FOLDERS, Board
from lit_qlora.storage.run import RunFolder
from tests.expect import check_line

LOSS, RESERVED = "1 Loss/nats per token", "4 Memory (GiB)/training, reserved"
SETTINGS = {"model.rank": 4, "model.learning_rate": 2e-4, "model.base": "demo", "data.packing": False, "mine": 3}


def answers(text):
    said = {"text": text, "cut_by": None}
    return {"max_new_tokens": 4, "answers": [{"prompt": "p", "base": said, "adapter": said}]}


def shown(folder):
    """What the page shows: steps and values by tag; a text's value is the text."""
    return {tag: found for part in FOLDERS if (folder / part).is_dir() for tag, found in shown_of(folder, part).items()}


def shown_of(folder, part):
    """The same of one part."""
    events = EventAccumulator(str(folder / part), size_guidance={"tensors": 0}).Reload()
    values = {
        tag: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"] if not tag.startswith("_hparams_/")
    }  # fmt: skip
    return {
        tag.removesuffix("/text_summary"): [(step, v.decode() if isinstance(v, bytes) else v) for step, v in found]
        for tag, found in values.items()
    }


def files_of(folder, part="training"):
    return [*(folder / part).glob("events.out.tfevents.*")]


def start(folder, state=None):
    run = RunFolder(folder)
    record = Record(run, Board(folder, "model:\n  rank: 4\n", SETTINGS))
    record.go_back(state)
    return record


def log(record, *lines):
    for step, value in lines:
        if isinstance(value, str):
            record.log_samples(answers(value), step)
        else:
            record.log_metrics({"a": value}, step)


def test_figures_and_the_config_lie_in_the_run_folder_at_once(tmp_path):
    record = start(tmp_path)
    log(record, (1, 0.5), (2, float("inf")))
    (file,) = files_of(tmp_path)
    assert file.name.startswith("events.out.tfevents.")
    assert shown(tmp_path) == {
        "config": [(0, "    model:\n      rank: 4\n")], "a": [(1, 0.5), (2, float("inf"))]
    }  # fmt: skip


@pytest.mark.parametrize("end", ["success", "failed"])
def test_a_resumed_run_shows_each_step_once(tmp_path, end):
    record = start(tmp_path)
    log(record, (1, 0.5), (1, "one"), (2, 0.25), (2, "two"))
    state = record.state_dict()
    log(record, (3, 8.0), (3, "to come again"))
    record.finalize(end)
    for _ in range(2):
        resumed = start(tmp_path, state)
        log(resumed, (3, 0.125), (3, "three"))
        resumed.finalize("success")
        found = shown(tmp_path)
        assert found["a"] == [(1, 0.5), (2, 0.25), (3, 0.125)]
        assert [(step, text.splitlines()[-1]) for step, text in found["samples"]] == [
            (1, "| p | one | one |"), (2, "| p | two | two |"), (3, "| p | three | three |")
        ]  # fmt: skip
        assert len(found["config"]) == 1
        assert sorted(file.stat().st_size > 0 for file in files_of(tmp_path)) == [False, True]


def test_the_loss_comes_first_and_training_and_held_out_share_its_chart(tmp_path):
    (tmp_path / "demo").mkdir()
    record = start(tmp_path / "demo")
    record.log_metrics({"val/loss": 2.0, "val/accuracy": 0.25}, 0)
    record.log_metrics({"train/loss": 1.0, "train/learning_rate": 0.125, "mine/own": 3.0}, 5)
    record.log_metrics({"memory/train_reserved_gib": 7.5, "memory/predicted_reserved_gib": 8.0}, 5)
    record.log_metrics({"val/loss": 1.5, "val/accuracy": 0.5, "val/own": 4.0, "samples/ended": 3.0}, 5)
    record.log_metrics({"val/loss": float("nan"), "val/accuracy": 0.0}, 6)
    record.log_metrics({"val/loss": 1.75, "val/accuracy": 0.75}, 7)
    for _ in range(2):
        training, held_out, forecast = (shown_of(tmp_path / "demo", part) for part in FOLDERS)
        assert training[LOSS] == [(5, 1.0)]
        assert [held_out[LOSS][at] for at in (0, 1, 3)] == [(0, 2.0), (5, 1.5), (7, 1.75)]
        assert (training[RESERVED], forecast) == ([(5, 7.5)], {RESERVED: [(5, 8.0)]})
        tags = sorted({*training, *held_out, *forecast} - {"config"})
        assert tags == [
            LOSS, "2 Learning/learning rate", RESERVED, "5 Tokens/accuracy", "6 Sample answers/ended",
            "7 Best adapter/held-out accuracy", "7 Best adapter/held-out loss", "mine/own", "val/own",
        ]  # fmt: skip
        assert training["7 Best adapter/held-out loss"] == [(5, 1.5)]  # before training there is no adapter
        assert held_out["val/own"] == [(5, 4.0)]
        assert training["7 Best adapter/held-out accuracy"] == [(5, 0.5)]
        assert (tmp_path / "demo" / "metrics.jsonl").read_text().startswith('{"step": 0, "val/loss": 2.0,')
        record.close_step()
        resumed = start(tmp_path / "demo", record.state_dict())
        resumed.finalize("success")


@pytest.mark.parametrize("last", [2.0 - 1e-9, "-inf"])
def test_the_best_validation_is_the_one_whose_adapter_is_kept(tmp_path, last):
    """The losses compared are those recorded: in TensorBoard's fp32, one that is lower by a hair would be as low."""
    record = start(tmp_path)
    for step, loss in ((1, 2.0), (2, last)):
        record.log_metrics({"val/loss": float(loss), "val/accuracy": step / 8}, step)
    kept = [(1, 0.125), (2, 0.25)][: 1 if last == "-inf" else 2]
    for _ in range(2):
        assert shown_of(tmp_path, "training")["7 Best adapter/held-out accuracy"] == kept
        record = start(tmp_path, record.state_dict())


def test_hyper_parameters_stand_beside_the_result(tmp_path):
    """TensorBoard itself is asked for its page HPARAMS."""
    for name, rank, loss in (("one", 4, 1.5), ("two", 8, 1.25)):
        (tmp_path / name).mkdir()
        record = Record(RunFolder(tmp_path / name), Board(tmp_path / name, "a: 1", SETTINGS | {"model.rank": rank}))
        record.go_back(None)
        record.log_metrics({"val/loss": loss + 1}, 3)
        record.log_metrics({"val/loss": loss}, 6)
    found = {}
    for session in session_groups(tmp_path):
        values = {value.name.tag: value.value for value in session.metric_values}
        found[session.sessions[0].name] = (session.hparams, values["7 Best adapter/held-out loss"])
    assert {name: (hparams["model.rank"].number_value, loss) for name, (hparams, loss) in found.items()} == {
        "one/training": (4, 1.5), "two/training": (8, 1.25)
    }  # fmt: skip
    assert found["one/training"][0]["data.packing"].string_value == "False"
    assert "mine" not in found["one/training"][0]


def session_groups(folder):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    runs = EventMultiplexer(tensor_size_guidance={"tensors": 0}).AddRunsFromDirectory(str(folder)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(folder))))
    asked = RequestContext()
    experiment = context.experiment_from_metadata(asked, "", True, context.hparams_metadata(asked, ""), [])
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_UNKNOWN], slice_size=9, start_index=0,
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
    )  # fmt: skip
    handler = list_session_groups.Handler(asked, context, "", request)
    return handler.run().session_groups


def test_a_run_that_was_never_saved_starts_its_curves_anew(tmp_path):
    log(start(tmp_path), (0, 8.0), (1, 8.0))
    log(start(tmp_path), (0, 1.0), (1, 0.5))
    assert shown(tmp_path)["a"] == [(0, 1.0), (1, 0.5)]


def test_a_page_that_is_open_meanwhile_drops_what_it_had(tmp_path):
    """TensorBoard has read the earlier file by then, and continues with the next one by name."""
    log(start(tmp_path), (0, 8.0), (5, 8.0))
    (earlier,) = files_of(tmp_path)
    page = EventAccumulator(str(tmp_path / "training")).Reload()
    record = start(tmp_path)
    log(record, (0, 1.0), (2, 0.5))
    assert sorted(files_of(tmp_path))[0] == earlier
    page.Reload()
    assert [event.step for event in page.Tensors("a")] == [0, 2]


def test_a_step_that_is_validated_twice_shows_what_came_last(tmp_path):
    """A validation in the middle of a long window falls on the step of the one before."""
    record = start(tmp_path)
    log(record, (0, 8.0), (0, "first"), (0, 1.0), (0, "second"), (1, 0.5))
    record.save()
    log(record, (2, 0.25))
    found = shown(tmp_path)
    assert found["a"] == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert [text.splitlines()[-1] for _, text in found["samples"]] == ["| p | second | second |"]


def test_figures_under_counts_of_their_own_come_again_too(tmp_path):
    record = start(tmp_path)
    record.trainer = type("Trainer", (), {"global_step": 2})()
    log(record, (2, 0.5), (100, 7.0), (101, 8.0))
    state = record.state_dict()
    log(record, (102, 9.0))
    resumed = start(tmp_path, state)
    assert shown(tmp_path)["a"] == [(2, 0.5), (100, 7.0), (101, 8.0)]
    assert resumed.by_step() == {2: {"step": 2, "a": 0.5}}


def test_tensorflow_is_not_imported_and_nothing_is_put_in_its_place(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('imported')\n")
    code = (
        "import sys; from lit_qlora.figures.tensorboard import Board, figures_events; from pathlib import Path; "
        f"file = Board(Path({str(tmp_path)!r}), 'a: 1', {{}}); file.refresh(lambda: figures_events(1, {{'a': 1.0}})); "
        "print(file.problem, 'tensorboard.compat.notf' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "None False\n"


@pytest.mark.slow
def test_a_long_run_is_written_anew_in_seconds(tmp_path):
    record = start(tmp_path)
    for step in range(20_000):
        record.log_metrics({f"figure/{number}": float(step) for number in range(10)}, step)
    state = record.state_dict()
    began = time.process_time()
    start(tmp_path, state)
    assert time.process_time() - began < 6


@pytest.fixture
def disk(monkeypatch):
    """A list of one number: the records that files still take; None: all of them."""
    left, real = [None], RecordWriter.write

    def write(self, data):
        if left[0] == 0:
            self._writer.write(b"torn")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] = None if left[0] is None else left[0] - 1
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    return left


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("is_begun", [True, False])
def test_what_found_no_room_is_written_once_there_is_some(tmp_path, capsys, disk, room, is_begun):
    log(start(tmp_path), (3, 9.0))  # of a process that was killed before it saved anything
    if not is_begun:
        disk[0] = room
    record = start(tmp_path)
    capsys.readouterr()
    log(record, (1, 1.0))
    if is_begun:
        disk[0] = room
    log(record, (2, 2.0), (2, "two"), (3, 3.0), (3, "three"), (4, 4.0))
    record.save()
    if is_begun and room:
        assert shown(tmp_path)["a"][0] == (1, 1.0)  # what was written whole stays, while there is no room
    if is_begun:
        problem = f"TensorBoard's files in {tmp_path} can't be written: No space left on device"
        assert record.problem == problem
        check_line(capsys.readouterr().err, "training continues", "kept for later", begins=f"error: {problem}; ")
    disk[0] = None
    log(record, (5, 5.0))
    record.save()
    log(record, (6, 6.0))
    assert record.problem is None
    found = shown(tmp_path)
    assert found["a"] == [(step, float(step)) for step in range(1, 7)]
    assert [step for step, _ in found["samples"]] == [2, 3]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_file_that_cannot_be_begun_is_reported_once_and_the_rest_continues(tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("lit_qlora.figures.tensorboard._write", denied)
    record = start(tmp_path)
    log(record, (1, 1.0), (2, 1.0))
    record.save()
    record.finalize("success")
    assert capsys.readouterr().err.count("error: TensorBoard's files in") == 1
    assert len(record.run.metrics.read_text().splitlines()) == 2


def test_other_mistakes_of_a_logger_are_not_swallowed(tmp_path):
    with pytest.raises(TypeError, match="float"):
        start(tmp_path).log_metrics({"a": object()}, 1)
