"""Options read off the sources are those of the parser, and what is found first is what would be found later."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_qlora import precheck
from lit_qlora.cli import main
from lit_qlora.errors import UserError
from lit_qlora.precheck import check_first
from lit_qlora.signatures import UNKNOWN, options_of
from lit_qlora.usage import MATTER, help_asked, help_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_the_options_are_the_parsers(parser_of, verb):
    types = {name: hint for name, hint in parser_of(verb).types().items() if name not in ("config", "print_config")}
    found = {option.name: option for option in options_of(verb)}
    assert ("ckpt_path" in found) == (verb != "fit")
    found.pop("ckpt_path", None)  # which the parser gives no type
    assert {*found} == {*types} - {"help", "model", "data", "trainer", "samples"}
    for name, option in found.items():
        if option.type is not UNKNOWN:
            assert option.type == types[name] or set(option.type.__args__) == set(types[name].__args__), name
    assert sum(one.type is not UNKNOWN for one in found.values()) >= 0.8 * len(found)
    defaults = parser_of(verb).get_defaults()
    for name, option in found.items():
        if UNKNOWN not in (option.default, option.type):
            assert option.default == defaults[name], name


MISTAKES = [
    ["--model.rank=abc"], ["--model.schedule=cosin"], ["--model.rank=null"], ["--data.packing=maybe"],
    ["--save_every_minutes=x"], ["--model.cuda_graphs=x"], ["--data.batch_tokens=many"], ["--modle.rank=3"],
    ["--lr=3"], ["--model.rank"], ["something"], ["--model.rank=99999999999999999999999"], ["--model.rank=0"],
    ["--data.batch_tokens=4"], ["--data.packing=true"], ["--trainer.gradient_clip_val=-1"], ["--model.base=nowhere"],
    ["--data.source=nope.jsonl"], ["--data.validation_source=./nope"], ["--config=nope.yaml"], ["--samples.count=-1"],
    ["--model.cuda_graphs=true", "--model.dropout=0.1"], ["--model.rank=999999999999"], ["--data.max_length=1000000"],
    ["--model.target_modules=nope"], ["--model.adapter=./nope"], ["--data.columns.nope=x"],
    ["--data.template=nope.jinja"], ["--trainer.val_check_interval=1.5"], ["--trainer.limit_train_batches=0"],
    ["--trainer.limit_val_batches=-1"], ["--trainer.limit_test_batches=2.5"], ["--trainer.devices=0"],
    ["--trainer.devices=-1"], ["--trainer.devices=x"], ["--trainer.devices=[0,0]"], ["--trainer.num_nodes=0"],
    ["--trainer.accelerator=tpu"], ["--trainer.deterministic=maybe"], ["--save_every_steps=0"],
    ["--save_every_minutes=0"], ["--keep_checkpoints=1"], ["--max_time=1h"], ["--max_time=00:00:00:00"],
    ["--max_nonfinite_losses=0"], ["--early_stopping=0"], ["--early_stopping=2", "--trainer.limit_val_batches=0"],
    ["--seed_everything=-1"], ["--run=null"], ["--run=a://b"], ["--mirror= "], ["--samples.temperature=-1"],
    ["--samples.top_p=0.5"], ["--data.source=rows.yaml"], ["--data.train_on=all", "--data.batch_tokens=9"],
    ["--model.cuda_graphs=true", "--data.packing=true", "--data.batch_tokens=2000"],
    ["--trainer.callbacks=Nope"], ["--trainer.callbacks+=LearningRateMonitr"], ["--trainer.logger=csv"],
    ["--trainer.callbacks=[{class_path: Nope}]"],
]  # fmt: skip


@pytest.mark.parametrize("args", [*MISTAKES, ["--data.form=nope"]], ids=" ".join)  # which the parser says otherwise
def test_a_mistake_is_found_first(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.yaml").touch()
    with pytest.raises(UserError):
        check_first("fit", args)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.yaml"]


@pytest.mark.parametrize(
    "verb, args, option, words",
    [
        ("inspect", ["--accept=bos,nope"], "accept", ("accept: expected some of unread,", "got 'nope'")),
        ("validate", ["--ckpt_path=nope"], "ckpt_path", ("nope: expected a folder", "give best, last, base")),
        ("test", ["--ckpt_path", "a.ckpt"], None, ("a.ckpt is a file",)),
    ],
)  # fmt: skip
def test_a_mistake_of_another_verbs_own_option_is_found_first(
    verb, args, option, words, tmp_path, monkeypatch, expect_error
):
    monkeypatch.chdir(tmp_path)
    expect_error(lambda: check_first(verb, args), *words, option=option)


@pytest.mark.slow
@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_it_is_the_parsers_own_mistake_in_the_same_words(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.yaml").touch()
    assert main(["fit", *args]) == 2
    first = capsys.readouterr().err
    monkeypatch.setattr(precheck, "check_first", lambda *_: None)
    assert main(["fit", *args]) == 2
    assert capsys.readouterr().err == first


@pytest.mark.parametrize(
    "args",
    [
        [], ["--config", "colab_t4"], ["--config=demo"], ["-c", "demo"],
        ["--data.batch_tokens=400", "--data.packing=true"],
        ["--trainer.callbacks+=Timer"], ["--trainer.callbacks=mine.X"], ["--trainer.callbacks=[SampleAnswers]"],
        ["--trainer.logger=true"], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"], ["--model=x.yaml"],
        ["--trainer.logger=false"], ["--data.system=--x y"], ["--samples.prompts+=a"], ["--print_config"],
        ["--model.target_modules=[q_proj,v_proj]"], ["--data.source=a/b"], ["--model.base=a/b"], ["--data.seed=3"],
        ["--trainer.gradient_clip_val=null"], ["--data.form=auto"], ["--model.learning_rate=1e-4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_the_parser_takes_or_alone_can_judge_passes(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_first("fit", args)


def test_a_config_with_classes_and_lists_to_add_to_passes_and_its_misspelt_key_does_not(tmp_path, expect_error):
    file = tmp_path / "mine.yaml"
    text = (
        "trainer:\n  callbacks+:\n  - class_path: Timer\n  logger: {class_path: CSVLogger, init_args: {save_dir: x}}\n"
    )
    file.write_text(text + "model:\n  rank: 3\n")
    check_first("fit", ["--config", str(file)])
    file.write_text(text + "model:\n  rnk: 3\n")
    expect_error(lambda: check_first("fit", ["--config", str(file)]), "unknown option 'model.rnk'", "'model.rank'")


def test_a_run_whose_rows_are_gone_is_left_to_the_run(tmp_path, monkeypatch):
    """It may be finished, and says so then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    check_first("fit", ["--config", "demo", "--run", "mine", "--data.source", "gone.jsonl"])
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        check_first("fit", ["--config", "demo", "--run", "other", "--data.source", "gone.jsonl"])


def test_options_of_a_kept_run_are_not_held_against_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    for verb in ("validate", "plan"):
        check_first(verb, ["--run", "mine", "--data.batch_tokens", "4"])


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "plan"])
@pytest.mark.parametrize("asked", ["short", "all"])
def test_help_fits_80_columns_and_names_no_class_of_lightning(verb, asked):
    text = help_of(verb, asked)
    assert max(map(len, text.splitlines())) <= 80
    assert "Logger(" not in text and "TensorBoardLogger" not in text and ":func:" not in text
    names = {option.name for option in options_of(verb)}
    shown = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert shown - {"config"} <= names and ("ckpt_path" in shown) == (verb in ("validate", "test"))
    if asked == "all":
        assert shown - {"config"} == names
    elif verb == "fit":
        assert shown == {"config", *MATTER} and len(MATTER) == 20


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        (["-h"], "short"), (["--model.rank", "3", "--help"], "short"), (["--help=all"], "all"),
        (["--help", "all"], "all"),
        (["--help.all"], "all"), ([], None), (["--trainer.logger.help", "CSVLogger"], None),
    ],
)  # fmt: skip
def test_how_help_is_asked_for(args, asked):
    assert help_asked(args) == asked


@pytest.mark.parametrize("args", [["fit", "--help"], ["fit", "--model.rnak", "8"]])
def test_help_and_a_misspelt_option_need_nothing_heavy(args):
    code = f"import sys; from lit_qlora.cli import main; main({args}); "
    code += "print({'torch', 'lightning', 'transformers', 'peft', 'datasets', 'huggingface_hub'} & {*sys.modules})"
    took_s = []
    for _ in range(3):  # the quickest counts: what else the machine does is not measured
        before = _children_s()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.endswith("set()\n")
        took_s.append(_children_s() - before)
        if took_s[-1] < 1:
            break
    assert min(took_s) < 1


def _children_s() -> float:
    """Seconds of the processor that ended children took: beside others, seconds by the clock say little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_first_line_comes_before_what_takes_seconds(tmp_path):
    args = [sys.executable, str(ROOT / "main.py"), "fit", "--trainer.max_steps", "1"]
    with subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        assert process.stdout
        assert process.stdout.readline().startswith("  load  ")
        waited = time.monotonic() - started
        process.kill()
    assert waited < 2  # 0.3 s where nothing else runs; an import of torch alone takes longer than this bound
