"""The curves lie right in the run folder, and go on after a cut-off without a doubled step."""

import sys

from lit_qlora.callbacks.tensorboard import RunTensorBoard


def read(folder):
    """(steps and values of the curve "a", the texts)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    return [(event.step, event.value) for event in events.Scalars("a")], texts


def write(folder, resumed_step, *lines):
    logger = RunTensorBoard(folder, "model:\n  rank: 4\n", resumed_step)
    for step, value in lines:
        logger.log_metrics({"a": value}, step)
    logger.save()
    logger.finalize("success")


def test_figures_and_the_config_lie_in_the_run_folder(tmp_path):
    write(tmp_path, None, (1, 0.5), (2, 0.25))
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    curve, texts = read(tmp_path)
    assert curve == [(1, 0.5), (2, 0.25)]
    assert texts == {"config/text_summary": ["    model:\n      rank: 4\n"]}


def test_a_resumed_run_goes_on_without_a_doubled_step(tmp_path):
    write(tmp_path, None, (1, 0.5), (2, 0.25), (3, 8.0), (4, 8.0))
    write(tmp_path, 2, (3, 0.125), (4, 0.0625))
    curve, texts = read(tmp_path)
    assert curve == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert len(texts["config/text_summary"]) == 1


def test_tensorflow_is_not_imported(tmp_path):
    write(tmp_path, None, (1, 0.5))
    assert "tensorboard.compat.notf" in sys.modules
    assert "tensorflow" not in sys.modules
