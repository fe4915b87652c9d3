"""The best adapter of a run on disk: what is put aside, and what takes its place."""

import json

import pytest

from lit_qlora.storage.adapter import put_adapter_back, require_trained
from lit_qlora.storage.folders import write_folder
from lit_qlora.storage.run import RunFolder


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "runs" / "one")
    run.prepare()
    return run


def adapter(folder, step):
    write_folder(folder, lambda new: (new / "result.json").write_text(json.dumps({"step": step})))


def step_of(folder):
    return json.loads((folder / "result.json").read_text())["step"] if folder.exists() else None


@pytest.mark.parametrize(
    ("best", "copy", "mirrored", "must_stay", "stands", "aside"),
    [
        (6, None, None, True, 6, None),  # that of the checkpoint's own step
        (7, 6, None, True, 6, 7),
        (7, 4, None, False, 4, 7),
        (7, None, None, False, None, 7),  # the checkpoint had none
        (7, 7, None, False, None, 7),
        (7, 7, 5, True, 5, 7),
        (7, 7, 9, True, 7, None),  # no better one is left of what the checkpoint had
        (None, None, None, False, None, None),
    ],
)
def test_a_best_adapter_from_after_the_checkpoint_makes_way_for_that_of_the_checkpoint(
    run, tmp_path, capsys, best, copy, mirrored, must_stay, stands, aside
):
    there = tmp_path / "mirror"
    for folder, step in ((run.adapter, best), (run.adapter_copy, copy), (there, mirrored)):
        if step is not None:
            adapter(folder, step)
    put_adapter_back(run, 6, there, must_stay=must_stay)
    assert (step_of(run.adapter), step_of(run.path / "adapter.before")) == (stands, aside)
    assert ("after step 6" in capsys.readouterr().out) == (aside is not None)


def test_what_was_put_aside_before_makes_way_for_what_is_put_aside_now(run):
    for step in (7, 9):
        adapter(run.adapter, step)
        put_adapter_back(run, 6)
    assert step_of(run.path / "adapter.before") == 9


def test_a_run_without_its_adapter_names_the_copy_that_is_left(run, expect_error):
    def asked():
        require_trained(run, "run", "adapter", "train it")

    expect_error(asked, run.path, "no adapter yet", "train it", option="run")
    run.adapter_copy.mkdir()
    (run.adapter_copy / "adapter_config.json").write_text("{}")
    expect_error(asked, run.adapter, "is not there", f"--adapter {run.adapter_copy}", option="run")
    run.adapter_copy.rename(run.adapter)
    asked()
