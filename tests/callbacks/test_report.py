"""What the terminal shows of a resumed run, and at the end of a run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_qlora.callbacks import report
from lit_qlora.storage.run import RunFolder

BUT = "; state and order are exact, a GPU's last bits only with --trainer.deterministic true"


@pytest.mark.parametrize(
    ("resumed_from", "on_gpu", "deterministic", "expected"),
    [
        (None, True, False, ""),
        ("step-4", False, False, ", resuming from step-4"),
        ("step-4", True, False, f", resuming from step-4{BUT}"),
        ("step-4", True, True, ", resuming from step-4"),
    ],
)
def test_how_exact_a_resume_is_is_said(monkeypatch, resumed_from, on_gpu, deterministic, expected):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert report._resumed_in_words(resumed_from, on_gpu) == expected


@pytest.mark.parametrize(
    ("before", "loss", "gains"),
    [(2.0, 1.9, True), (2.0, 2.0, False), (2.0, 2.1, False), (math.nan, 2.1, True), (None, 2.1, True)],
)
def test_an_adapter_that_is_no_better_than_the_base_is_called_so(tmp_path, capsys, before, loss, gains):
    run = RunFolder(tmp_path)
    run.prepare()
    run.adapter.mkdir()
    (run.adapter / "result.json").write_text(json.dumps({"step": 4, "val/loss": loss}))
    lines = [{"step": 0} if before is None else {"step": 0, "val/loss": before}, {"step": 4, "val/loss": loss}]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shown = report.Report(run, SimpleNamespace(peaks_gib={}), None, None, {})
    figures = {"val/loss": loss, "val/perplexity": 8.0, "val/accuracy": 0.5}
    state = SimpleNamespace(fn="fit")
    shown.on_validation_end(
        SimpleNamespace(state=state, is_global_zero=True, global_step=4, callback_metrics=figures), None
    )
    line = capsys.readouterr().out
    assert "best" in line.split()
    assert max(map(len, line.splitlines())) <= 80
    for printed in (line, "\n".join(shown._closing())):
        assert ("no better than before training" in printed) != gains


def test_the_table_at_the_end_counts_answers_that_were_cut_apart(tmp_path):
    run = RunFolder(tmp_path)
    run.prepare()
    run.adapter.mkdir()
    (run.adapter / "result.json").write_text('{"step": 4}')
    ends = ((0, 0, 8), (2, 3, 5), (4, 6, 2))
    lines = [
        {"step": step, "val/loss": 2.0, "samples/ended": ended, "samples/cut": cut, "samples/max_new_tokens": 128}
        for step, ended, cut in ends
    ]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert report.before_and_after(run) == [
        "                                      before   after (step 4, the best)",
        "held-out loss, nats per token         2.0000   2.0000",
        "answers that ended by themselves      0 of 8   6 of 8",
        "answers cut at 128 tokens             8 of 8   2 of 8",
    ]


@pytest.mark.parametrize(
    ("loss", "perplexity", "line"),
    [
        (1.94564, 6.998, "step      0  held-out loss 1.9456  perplexity 7.00     accuracy  76.4%  before"),
        (10.43873, 34154.81, "step      0  held-out loss 10.4387 perplexity 34,154.81 accuracy  76.4%  before"),
        (13.8, 999_999.991, "step      0  held-out loss 13.8000 perplexity 999,999.99 accuracy  76.4%  before"),
        (88.1, 1.82e38, "step      0  held-out loss 88.1000 perplexity 1.82e+38 accuracy  76.4%  before"),
        (float("nan"), float("nan"), "step      0  held-out loss nan     perplexity nan      accuracy  76.4%  before"),
    ],
)
def test_the_line_of_a_validation_keeps_its_columns_apart(loss, perplexity, line):
    figures = {"val/loss": loss, "val/perplexity": perplexity, "val/accuracy": 0.764}
    assert report.held_out_line(0, figures, "before") == line and len(line) <= 80


@pytest.mark.parametrize(("rank", "resumed", "lines"), [(0, None, 2), (0, "step-4", 1), (1, None, 0)])
def test_an_example_of_what_is_learned_is_shown_once(monkeypatch, tmp_path, capsys, rank, resumed, lines):
    """One process shows it; where the run resumes, in one line."""
    from lit_qlora.data.datamodule import ChatDataModule

    monkeypatch.setattr(report, "foresee", lambda *_: None)
    data = ChatDataModule(tokenizer="demo", validation_source="held.jsonl", source="rows.jsonl")
    monkeypatch.chdir(tmp_path)
    long = {"text": f"### Human: {'Who? ' * 30}### Assistant: {'Ada. ' * 30}"}
    for name in ("rows.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(json.dumps(long | {"text": long["text"] + name}))
    data.setup("fit")
    monkeypatch.setattr(data, "num_optimizer_steps", lambda: 1)
    module = SimpleNamespace(describe=list, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        is_global_zero=rank == 0, datamodule=data, accumulate_grad_batches=1, precision_reason="", precision="32-true"
    )
    run = RunFolder(tmp_path / "run")
    run.prepare()
    report.Report(run, SimpleNamespace(peaks_gib={}), resumed, None, {}).on_fit_start(trainer, module)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learns  ")]
    assert len(shown) == lines and all(len(line) <= 80 for line in shown)
    assert not lines or ("**Ada." in shown[-1] and shown[-1].endswith("** ⏹") and "[INST] Who?" in shown[0])


@pytest.mark.parametrize(
    ("path", "words"),
    [("runs/mine", "next: python main.py chat"), ("runs/a b", "next: python main.py chat --run 'a b'"),
     ("x/mine", "next: python main.py chat --run x/mine")],
)  # fmt: skip
def test_what_to_do_next_names_the_run_unless_it_is_the_newest(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    for name, start in (("runs/mine", "2026-01-02"), ("runs/a b", "2026-01-01"), ("x/mine", "2026-01-03")):
        run = RunFolder(Path(name))
        run.path.mkdir(parents=True)
        run.config.write_text(f"# started {start}T00:00:00+00:00\nmodel:\n  base: demo\ndata:\n  source: mine.jsonl\n")
    assert report.next_step(RunFolder(Path(path))) == [words]


def test_of_the_demo_the_first_question_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.config.write_text("model:\n  base: demo\ndata:\n  source: demo\n")
    assert report.next_step(run)[1] == "      and ask it: Who goes everywhere with Silas?"


def test_the_samples_at_the_end_are_those_of_the_best_adapter(tmp_path):
    run = RunFolder(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "result.json").write_text('{"step": 4}')

    def line(step, text):
        row = {"prompt": "Who?", "base": {"text": "b", "cut_by": None}}
        return json.dumps(
            {"step": step, "answers": [row | ({"adapter": {"text": text, "cut_by": None}} if text else {})]}
        )

    run.samples.write_text("".join(f"{line(*one)}\n" for one in ((0, ""), (2, "second"), (4, "best"), (6, "later"))))
    assert report.last_samples(run)[2].split() == ["b", "best"]
    run.samples.write_text(line(0, "") + "\n")
    assert report.last_samples(run) == []


@pytest.mark.parametrize(("loss", "gains"), [(1.0, True), (2.0, False), (3.0, False)])
def test_a_gain_is_over_the_line_before_training_that_has_a_loss(tmp_path, loss, gains):
    lines = [{"step": 0, "memory/host_gib": 1.0}, {"step": 0, "val/loss": 2.0}, {"step": 5, "val/loss": 0.5}]
    run = RunFolder(tmp_path)
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert report.is_gain(run, loss) == gains
