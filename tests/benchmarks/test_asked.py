"""Wrong options of the benchmarks: one line and status 2, before anything is measured, made or imported."""

import importlib
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
WHOLE = "expected a whole number from 1, got"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("as_t4 --gib", "argument --gib: expected one argument"),
        ("as_t4 --gib x fit", "argument --gib: expected a number above 0, got x"),
        ("as_t4 --gib nan fit", "argument --gib: expected a number above 0, got nan"),
        ("as_t4 fit --gib", "expected 1 CUDA GPU, and there are 0 here"),
        ("compare --t4", "expected 1 CUDA GPU, and there are 0 here; give --cpu"),
        ("compare --cpu --t4", "--t4 has no use with --cpu"),
        ("compare --cpu --kernels", "--kernels has no use with --cpu"),
        ("compare --cpu --base demo --tokenizer .", "--tokenizer has no use with --base"),
        ("compare --cpu --tokenizer /nowhere", "argument --tokenizer: expected a folder, and /nowhere is none"),
        ("compare --cpu --repetitions 0", f"argument --repetitions: {WHOLE} 0"),
        ("compare --cpu --warm-up 0", f"argument --warm-up: {WHOLE} 0"),
        ("compare --cpu --rows -3", f"argument --rows: {WHOLE} -3"),
        ("compare --cpu --batch-size 1.5", f"argument --batch-size: {WHOLE} 1.5"),
        ("compare --cpu --seconds -1", "argument --seconds: expected a number above 0, got -1"),
        ("growth", "give --base, --cpu or --rows"),
        ("growth --base demo", "expected 1 CUDA GPU, and there are 0 here; give --cpu"),
        ("growth --cpu --t4", "--t4 has no use with --cpu"),
        ("growth --rows 9 --t4", "--t4 has no use with --rows"),
        ("growth --cpu --steps 0", f"argument --steps: {WHOLE} 0"),
        ("growth --rows 1000 0", f"argument --rows: {WHOLE} 0"),
        ("growth --cpu --base /nowhere", "model.base: "),
        ("many_cards --gpu abc", "gpu: "),
        ("many_cards --network-gb-per-s 0", "argument --network-gb-per-s: expected a number above 0, got 0"),
        ("peers abc spec.json", "argument peer: invalid choice: 'abc'"),
        ("peers plain /nowhere", "argument spec: can't open '/nowhere'"),
        ("random_base --output .", "argument --output: . exists already"),
        ("random_base --output new --layers -1", f"argument --layers: {WHOLE} -1"),
        ("random_base --output new --tokenizer /nowhere", "argument --tokenizer: expected a folder"),
        ("random_base --output new --in-4-bits --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("random_base --output new --dtype float32", "--dtype has no use with a base in 16 bits"),
        ("scaling", "expected 2 CUDA GPUs, and there are 0 here; give --cpu"),
        ("scaling --cpu --shape abc", "argument --shape: invalid choice: 'abc'"),
        ("scaling --cpu --steps 0", f"argument --steps: {WHOLE} 0"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, command, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, *args = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{name}.py: error: {error}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "3,1"}, "3"), ({"LOCAL_RANK": "1"}, None)]
)
def test_one_process_under_limits_has_one_gpu(monkeypatch, given, seen):
    """Asked for several GPUs, fit would start the other processes itself, without the limits."""
    import as_t4

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["as_t4.py", "fit"])
    with pytest.raises(SystemExit):
        as_t4.main()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


def test_a_measurement_on_the_cpu_sees_no_gpu(monkeypatch):
    import compare

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--cpu"])
    compare._options()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
