"""The comparison's ratios and its time: TRL's best is the quicker of its settings, and a quick one ends in time."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compare
import peers


def test_the_best_of_trl_is_its_quickest():
    speeds = {"lit_qlora": 600.0, "trl_default": 100.0, "trl_grouped": 150.0, "trl_packed": 240.0, "unsloth": 0}
    assert compare._ratios(speeds) == {
        "ratio_to_trl_default": 6.0, "ratio_to_trl_best": 2.5, "best_ratio_to_trl_best": 2.5
    }  # fmt: skip
    assert compare._ratios(speeds | {"trl_packed": 0})["ratio_to_trl_best"] == 4.0
    assert compare._ratios({"trl_default": 100.0}) == {}


def test_unsloth_is_measured_at_its_defaults_and_at_its_best():
    speeds = {"lit_qlora": 600.0, "unsloth": 300.0, "unsloth_packed": 400.0}
    assert compare._ratios(speeds | {"lit_qlora_tokens": 800.0}) == {
        "ratio_to_unsloth": 2.0, "ratio_to_unsloth_best": 1.5, "best_ratio_to_unsloth_best": 2.0
    }  # fmt: skip
    assert compare._ratios(speeds | {"unsloth_kept": 600.0})["ratio_to_unsloth_best"] == 1.0
    assert compare._ratios({"lit_qlora": 600.0, "unsloth": 300.0})["ratio_to_unsloth_best"] == 2.0
    assert [*compare.PEERS] == [*peers.NAMES]


@pytest.mark.parametrize(
    ("quick", "minutes", "begun"), [(True, 4.0, 1), (True, 3.0, 2), (True, 2.0, 3), (False, 4.0, 3)]
)
def test_quick_begins_no_repetition_that_would_not_end_in_time(monkeypatch, capsys, tmp_path, quick, minutes, begun):
    now = [compare.STARTED]
    found = dict.fromkeys(("tokens_per_second", "padding_share", "loss", "loss_after", "start_seconds"), 1.0)

    def run(*_, **__):
        now[0] += 60 * minutes
        return SimpleNamespace(returncode=0, stdout=json.dumps(found), stderr="")

    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run))
    options = SimpleNamespace(peers=["lit_qlora"], repetitions=3, quick=quick, kernels=False, output=tmp_path)
    assert compare._measure(options, {"": tmp_path}) == {"": {"lit_qlora": [found] * begun}}
    assert (f"stopped after {begun} of 3 repetitions: time is up" in capsys.readouterr().err) == (begun < 3)


@pytest.mark.parametrize(
    ("failing", "status"),
    [((), None), (("trl_default",), None), (("lit_qlora",), "not measured: lit_qlora")],
)
def test_it_fails_where_ours_was_not_measured(monkeypatch, capsys, tmp_path, failing, status):
    keys = ("tokens_per_second", "padding_share", "loss", "loss_after", "start_seconds", "peak_gib", "steps")
    good = dict.fromkeys(keys, 1.0) | {"precision": "32-true"}
    results = {peer: [{"failed": "no"} if peer in failing else good] * 2 for peer in ("lit_qlora", "trl_default")}
    results["lit_qlora"].append(good if "lit_qlora" not in failing else {"failed": "no"})
    monkeypatch.setattr(sys, "argv", ["compare.py", "--cpu", "--peers", *results, "--output", str(tmp_path)])
    monkeypatch.setattr(compare, "_prepare", lambda *_: tmp_path)
    monkeypatch.setattr(compare, "_measure", lambda *_: {"": results})
    monkeypatch.setattr(compare, "_picture", lambda *_: None)
    if status is None:
        compare.main()
    else:
        with pytest.raises(SystemExit, match=status):
            compare.main()
    ratios = {} if failing else {"ratio_to_trl_default": 1.0}
    repetitions = 3 if failing == ("trl_default",) else 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ratios | {"repetitions": repetitions}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], (256, 60, 3)),
        (["--quick"], (8, 8, 1)),
        (["--quick", "--rows", "12", "--warm-up", "2", "--seconds", "5"], (12, 5, 2)),
    ],
)
def test_quick_sets_defaults_only(monkeypatch, given, expected):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--cpu", *given])
    options = compare._options()
    assert (options.rows, options.seconds, options.warm_up) == expected


def test_more_rows_than_there_are_is_one_line(monkeypatch, capsys):
    given = ["--base", "demo", "--data", "demo", "--rows", "848", "--max-length", "32"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--cpu", *given])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: rows: expected fewer than the ")


def arguments_of(monkeypatch, tmp_path, peer, **spec):
    """The command line with which one of ours is measured."""
    seen = []
    monkeypatch.setattr("lit_qlora.cli.main", seen.extend)
    (tmp_path / "ids.jsonl").write_text("", encoding="utf-8")
    given = dict.fromkeys(("base", "chats", "held_out"), "x") | {"ids": str(tmp_path / "ids.jsonl"), "rank": 16}
    with pytest.raises(SystemExit):
        peers.NAMES[peer](given | {"max_length": 1024, "batch_size": 16} | spec, None)
    return " ".join(seen)


def test_packing_learns_as_many_tokens_per_step_as_batches_by_tokens(monkeypatch, tmp_path):
    by_tokens = arguments_of(monkeypatch, tmp_path, "lit_qlora_tokens", kernels=False, t4=False)
    packed = arguments_of(monkeypatch, tmp_path, "lit_qlora_packed", kernels=False, t4=False)
    assert "--data.batch_tokens 8192" in by_tokens and "packing" not in by_tokens
    assert "--data.batch_tokens 8192 --data.packing true" in packed


@pytest.mark.parametrize(("peer", "recorded"), [("lit_qlora", True), ("lit_qlora_packed", False)])
def test_packed_rows_are_not_recorded(monkeypatch, tmp_path, peer, recorded):
    """A fit refuses that: each packed row has conversations of its own."""
    found = arguments_of(monkeypatch, tmp_path, peer, kernels=False, t4=True)
    assert ("--model.cuda_graphs true" in found) == recorded


def test_trl_recomputes_only_where_memory_is_short():
    assert peers._quicker({"t4": False})["gradient_checkpointing"] is False
    assert "gradient_checkpointing" not in peers._quicker({"t4": True})


def test_profiled_peers_have_a_table_by_class():
    found = {"us_per_token": {"products": 53.0, "attention": 8.9}, "tflops": 700.0, "gb_per_s": 3000.0}
    lines = compare._kernel_table({"peers": {"lit_qlora": found, "unsloth": {"failed": "no memory"}}})
    assert lines[3] == "| lit-qlora, its defaults | 53.0 | 0.0 | 8.9 | 0.0 | 0.0 | 0.0 | 0.0 |"
    assert len(lines) == 6 and "700 TFLOP/s and 3,000 GB/s" in lines[-1]
    assert compare._kernel_table({"peers": {"lit_qlora": {"tokens_per_second": 1.0}}}) == []


def test_quick_measures_short_rows_too_and_leaves_no_files(monkeypatch, capsys, tmp_path):
    """Defaults beside defaults, and the best beside the best, for both kinds of rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--cpu", "--quick"])
    prepared, speeds = [], {"lit_qlora": 300.0, "lit_qlora_tokens": 500.0, "trl_default": 100.0, "trl_packed": 200.0}

    def prepare(options, folder):
        prepared.append((options.data, options.rows))
        (folder / "spec.json").write_text(json.dumps({"base": "small"}), encoding="utf-8")
        return folder / "spec.json"

    def measure_one(options, peer, spec):
        found = dict.fromkeys(("padding_share", "loss", "loss_after", "start_seconds", "peak_gib", "steps"), 1.0)
        speed = speeds.get(peer, 50.0) * (3 if spec.parent.name == "short" and "lit" in peer else 1)
        return found | {"precision": "bf16-mixed", "tokens_per_second": speed}

    monkeypatch.setattr(compare, "_prepare", prepare)
    monkeypatch.setattr(compare, "_measure_one", measure_one)
    compare.main()
    assert prepared == [(compare.GUANACO, 8), ("demo", 64)]
    out = capsys.readouterr().out
    assert "On short rows:" in out
    assert json.loads(out.splitlines()[-1]) == {
        "ratio_to_trl_default": 3.0, "ratio_to_trl_best": 1.5, "best_ratio_to_trl_best": 2.5,
        "short_ratio_to_trl_default": 9.0, "short_ratio_to_trl_best": 4.5, "short_best_ratio_to_trl_best": 7.5,
        "repetitions": 3,
    }  # fmt: skip
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_ours_is_measured(tmp_path):
    """Through the real command: nothing else would notice that its parts have moved."""
    command = [sys.executable, Path(compare.__file__), "--cpu", "--quick", "--base", "demo", "--data", "demo"]
    command += ["--rows", "4", "--max-length", "160", "--seconds", "0.1", "--repetitions", "1", "--peers", "lit_qlora"]
    done = subprocess.run([*map(str, command), "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compare.json").read_text())["peers"]["lit_qlora"]
    assert found["tokens_per_second"] > 0 and found["loss"] > found["loss_after"] > 0
