"""The curves lie right in the run folder, and go on after a cut-off without a doubled step."""

import sys

from lit_qlora.callbacks.tensorboard import RunTensorBoard


def read(folder, tag="a"):
    """(steps and values of a curve, the texts), as the page shows them: the other reader drops no texts."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder)).Reload()
    found = {
        name: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }
    texts = {name: [text.decode() for _, text in found[name]] for name in found if name.endswith("/text_summary")}
    return found[tag], texts


def write(folder, resumed_step, *lines, state=None):
    """Adds lines of (step, figures), and returns the state after each of them."""
    logger = RunTensorBoard(folder, "model:\n  rank: 4\n", resumed_step)
    if state:
        logger.load_state_dict(state)
    states = []
    for step, value in lines:
        if isinstance(value, str):
            logger.add_text("samples", value, step)
        else:
            logger.log_metrics(value if isinstance(value, dict) else {"a": value}, step)
        states.append(logger.state_dict())
    logger.save()
    logger.finalize("success")
    return states


def test_figures_and_the_config_lie_in_the_run_folder(tmp_path):
    write(tmp_path, None, (1, 0.5), (2, 0.25))
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    curve, texts = read(tmp_path)
    assert curve == [(1, 0.5), (2, 0.25)]
    assert texts == {"config/text_summary": ["    model:\n      rank: 4\n"]}


def test_a_resumed_run_goes_on_without_a_doubled_step(tmp_path):
    states = write(tmp_path, None, (1, 0.5), (2, 0.25), (3, 8.0), (4, 8.0))
    write(tmp_path, 2, (3, 0.125), (4, 0.0625), state=states[1])
    curve, texts = read(tmp_path)
    assert curve == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert len(texts["config/text_summary"]) == 1


def test_what_came_under_the_saved_step_before_the_save_stays_and_what_came_after_it_comes_again(tmp_path):
    states = write(tmp_path, None, (1, 0.5), (2, 0.25), (2, {"b": 8.0}), (3, 8.0))
    write(tmp_path, 2, (2, {"b": 1.0}), (3, 0.125), state=states[1])
    assert read(tmp_path)[0] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert read(tmp_path, "b")[0] == [(2, 1.0)]


def test_a_step_before_the_saved_one_is_not_added_again(tmp_path):
    states = write(tmp_path, None, (1, 0.5), (2, 0.25))
    write(tmp_path, 3, (4, 0.125), state=states[1])
    assert read(tmp_path)[0] == [(1, 0.5), (2, 0.25), (4, 0.125)]


def test_a_text_of_the_saved_step_is_there_once(tmp_path):
    states = write(tmp_path, None, (1, 0.5), (2, 0.25), (2, "answers of 2"), (3, 8.0), (3, "to come again"))
    write(tmp_path, 2, (3, 0.125), (3, "answers of 3"), state=states[2])
    curve, texts = read(tmp_path)
    assert curve == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert texts["samples/text_summary"] == ["answers of 2", "answers of 3"]
    assert len(texts["config/text_summary"]) == 1


def test_a_run_that_was_never_saved_starts_its_curves_anew(tmp_path):
    write(tmp_path, None, (0, 8.0), (1, 8.0))
    write(tmp_path, None, (0, 1.0), (1, 0.5))
    assert read(tmp_path)[0] == [(0, 1.0), (1, 0.5)]
    # By name, in which there is the second: of one second, a process's tenth file would stand behind its eleventh.
    assert len({file.name.split(".")[3] for file in tmp_path.glob("events.out.tfevents.*")}) == 2


def test_tensorflow_is_not_imported(tmp_path):
    write(tmp_path, None, (1, 0.5))
    assert "tensorboard.compat.notf" in sys.modules
    assert "tensorflow" not in sys.modules
