"""Options read off the sources are those of the parser, and what is found first is what would be found later."""

import errno
import os
import re
import resource
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from lit_qlora import cli, demo, precheck
from lit_qlora.cli import main
from lit_qlora.data import records
from lit_qlora.data.held_out import Parts
from lit_qlora.devices import asked
from lit_qlora.errors import UserError
from lit_qlora.model.base import split_names
from lit_qlora.options import plain
from lit_qlora.place import find_config
from lit_qlora.signatures import OF_LIGHTNING, UNKNOWN, classes_for, offered, options_of
from lit_qlora.storage.config_file import as_yaml
from lit_qlora.storage.lock import RunLock
from lit_qlora.storage.run import RunFolder
from lit_qlora.usage import MATTER, help_asked, help_of, help_of_class
from tests.expect import check_first

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
    ["--data.template=nope.jinja"], ["--data.template=base"], ["--model=x.yaml"], ["--trainer", "3"],
    ["--trainer.val_check_interval=1.5"], ["--trainer.limit_train_batches=0"],
    ["--trainer.limit_val_batches=-1"], ["--trainer.limit_test_batches=2.5"], ["--trainer.devices=0"],
    ["--trainer.devices=-1"], ["--trainer.devices=x"], ["--trainer.devices=[0,0]"], ["--trainer.num_nodes=0"],
    ["--trainer.accelerator=tpu"], ["--trainer.deterministic=maybe"], ["--save_every_steps=0"],
    ["--save_every_minutes=0"], ["--keep_checkpoints=1"], ["--max_time=1h"], ["--max_time=00:00:00:00"],
    ["--max_nonfinite_losses=0"], ["--early_stopping=0"], ["--early_stopping=2", "--trainer.limit_val_batches=0"],
    ["--seed_everything=-1"], ["--run=null"], ["--run=a://b"], ["--mirror= "], ["--samples.temperature=-1"],
    ["--samples.top_p=0.5"], ["--data.source=rows.yaml"], ["--data.train_on=all", "--data.batch_tokens=9"],
    ["--model.cuda_graphs=true", "--data.packing=true", "--data.batch_tokens=2000"],
    # Rows.
    ["--data.source=page.jsonl"], ["--data.source=empty.jsonl"], ["--data.source=torn.jsonl"],
    ["--data.source=utf16.jsonl"], ["--data.source=columns.jsonl"], ["--data.source=columns.csv"],
    ["--data.source=lfs.parquet"], ["--data.source=cut.jsonl.gz"], ["--data.source=late.jsonl"],
    ["--data.source=stray.jsonl", "--data.strict=true"], ["--data.source=good.jsonl", "--data.form=alpaca"],
    ["--data.source=good.jsonl", "--data.columns.user=questoin", "--data.columns.assistant=answer"],
    ["--data.source=good.jsonl", "--data.validation_source=empty.jsonl"],
    ["--data.source=good.jsonl", "--data.validation_share=0"],
    ["--data.source=good.jsonl", "--data.validation_source=good.jsonl"],
    ["--data.source=[good.jsonl, columns.jsonl]"], ["--data.source=split"], ["--data.source=good.jsonl:test"],
    # Classes.
    ["--trainer.callbacks=EarlyStoping"], ["--trainer.callbacks+=early_stopping"], ["--trainer.logger=wandb"],
    ["--trainer.callbacks=nomodule.Nothing"],
    ["--trainer.callbacks=CSVLogger"], ["--trainer.callbacks={class_path: EarlyStoping}"],
    ["--trainer.callbacks=[Timer, EarlyStoping]"], ["--trainer.plugins=MixedPrecison"],
    ["--trainer.callbacks=EarlyStopping"], ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitr=val/loss"],
    ["--trainer.callbacks={class_path: EarlyStopping, init_args: {patience: x, monitor: a}}"],
    ["--trainer.logger=CSVLogger", "--trainer.logger.nam=x"],
    # The run's folder.
    ["--run=./good.jsonl"], ["--run=./split"],
]  # fmt: skip

GOOD = '{"text": "### Human: a%d### Assistant: b"}\n'
FILES = {
    "rows.yaml": b"",
    "page.jsonl": b"<!doctype html><p>Sign in",
    "empty.jsonl": b"",
    "torn.jsonl": b'{"text": "### Human: a### Assis\n',
    "utf16.jsonl": '{"text": "a"}'.encode("utf-16"),
    "columns.jsonl": b'{"frage": "a", "antwort": "b"}\n' * 3,
    "columns.csv": b"a,b\n1,2\n",
    "lfs.parquet": b"version https://git-lfs.github.com/spec/v1\n",
    "cut.jsonl.gz": b"\x1f\x8b\x08\x00cut",
    "late.jsonl": "".join(GOOD % n if n % 8 else "{}\n" for n in range(1, 400)).encode(),
    "stray.jsonl": b'{"a": 1}\n' + "".join(GOOD % n for n in range(30)).encode(),
    "good.jsonl": "".join(GOOD % n for n in range(30)).encode(),
    "split/test.jsonl": GOOD.encode(),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of rows, most of them wrong, in the current folder; nothing may be added to them."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    yield
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")}
    assert {name for name in found if not name.startswith("runs")} == {*FILES, "split"}


BY_OTHERS = [
    ["--data.form=nope"],  # which the parser says otherwise, as it does the next ones
    ["--trainer.callbacks=lightning.pytorch.callbacks.EarlyStoping"],
    ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks.patience", "x"],
    ["--trainer.callbacks.monitor=x", "--model.rank=0"],
    [
        "--trainer.devices=3",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.accelerator=cpu",
    ],  # each of three processes
]


@pytest.mark.parametrize("args", [*MISTAKES, *BY_OTHERS], ids=" ".join)
def test_a_mistake_is_found_first(args, files):
    with pytest.raises(UserError):
        check_first("fit", args)


@pytest.mark.parametrize(
    "verb, args, option, words",
    [
        ("inspect", ["--accept=bos,nope"], "accept", ("accept: expected some of unread,", "got 'nope'")),
        ("validate", ["--trainer.limit_val_batches=0"], "trainer.limit_val_batches", ("to score", "got 0")),
        ("validate", ["--ckpt_path=nope"], "ckpt_path", ("nope: expected a folder", "give best, last, base")),
        ("test", ["--ckpt_path", "a.ckpt"], None, ("a.ckpt is a file",)),
    ],
)  # fmt: skip
def test_a_mistake_of_another_verbs_own_option_is_found_first(
    verb, args, option, words, tmp_path, monkeypatch, expect_error
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("seed_everything: 1\n")
    expect_error(lambda: check_first(verb, args), *words, option=option)


@pytest.mark.parametrize(
    ("verb", "arg", "likely"),
    [
        ("fit", "--data.template=bse", "'base'"), ("fit", "--data.template=page.jsnl", "'page.jsonl'"),
        ("fit", "--model.optimizer=adamw8bit", "'adamw_8bit'"), ("fit", "--trainer.accelerator=cpuu", "'cpu'"),
        ("fit", "--trainer.gradient_clip_algorithm=nrm", "'norm'"), ("fit", "--data.packing=ture", "'true'"),
        ("fit", "--model.cuda_graphs=atuo", "'auto'"), ("fit", "--model.base=dmo", "'demo'"),
        ("fit", "--data.source=dmo", "'demo'"),
        ("inspect", "--accept=speciall", "'special'"),
    ],
)  # fmt: skip
def test_a_value_that_is_nearly_one_of_a_list_is_answered_by_that_one(verb, arg, likely, files):
    with pytest.raises(UserError) as caught:
        check_first(verb, [arg])
    assert f"did you mean {likely}?" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "option", "place", "words"),
    [
        (["--data.source=asked.jsonl"], None, "asked.jsonl", ["nothing answered: 2"]),
        (["--data.template=asked.jsonl"], "data.template", None, ["asked.jsonl holds no Jinja"]),
        (["--model.rank"], "model.rank", None, ["has no value", "--model.rank VALUE"]),
        (["--model.rank="], "model.rank", None, ["expected a whole number, got ''"]),
        (["--data.batch_tokens= "], "data.batch_tokens", None, ["expected a whole number or none, got ' '"]),
        (["--model.alpha=null"], "model.alpha", None, ["expected a number, got null"]),
        (["--config"], "config", None, ["has no value", "--config VALUE"]),
        (["--model"], "model", None, ["is no option but a section"]),
        (["--data.seed=3"], "data.seed", None, ["it is always seed_everything"]),
        (["--data.tokenizer", "x"], "data.tokenizer", None, ["it is always model.base"]),
        (["--run=/proc/x"], "run", None, ["/proc/x can't be written"]),
        (["--run=/dev/null/x"], "run", None, ["/dev/null/x can't be written"]),
    ],
)
def test_what_came_late_or_in_the_parsers_words(args, option, place, words, tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n' * 2)
    expect_error(lambda: check_first("fit", args), *words, option=option, place=place)


@pytest.mark.parametrize("value", ["", "{a: 1}", "# c"])
def test_no_value_is_answered_in_jsonargparses_words(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = []
    for one in options_of("fit"):
        try:
            check_first("fit", [f"--{one.name}={value}"])
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 40 and not [
        words for words in messages if re.search(r"<class|typing|Subtypes|Got value", words)
    ]


@pytest.mark.parametrize("option", ["--data.source", "--run", "--model.base", "--data.template"])
def test_a_link_that_leads_to_itself_is_one_line(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert main(["fit", option, "./loop"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "loop" in line


def test_a_link_to_itself_is_reported_by_the_systems_number_too():
    """Python's pathlib raises no error of its own from 3.13 on."""
    assert "x.jsonl: a link that leads to itself" in cli._of_a_path(OSError(errno.ELOOP, "many", "x.jsonl"))


@pytest.mark.parametrize("option", ["data.source", "run", "model.base", "config", "mirror"])
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "may not read it"), (errno.ENOTCONN, "mount it again"), (errno.EIO, "mount it again")],
)
def test_a_path_that_may_not_be_followed_or_whose_drive_is_gone_is_one_line(
    option, number, words, tmp_path, monkeypatch, capsys
):
    path, follow = tmp_path / "drive" / "x.yaml", os.stat
    path.parent.mkdir()

    def refuse(asked, *args, **options):
        if str(asked).startswith(str(path)):
            raise OSError(number, "no", str(asked))
        return follow(asked, *args, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "stat", refuse)
    status = main(["fit", f"--{option}", str(path)])
    monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith(f"error: {path}")
    assert words in line


def test_a_folder_that_is_gone_from_under_the_command_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "is not there any more: cd into it" in cli._of_a_path(FileNotFoundError(errno.ENOENT, "no such file"))
    monkeypatch.chdir(tmp_path)
    assert cli._of_a_path(FileNotFoundError(errno.ENOENT, "no such file")) is None


@pytest.mark.parametrize("row", ["2", "9999", "rows.jsonl:5", "other.jsonl:1"])
def test_a_row_to_show_that_is_not_there_is_found_first(row, tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    one, two, three = (f'{{"prompt": "{text}", "response": "a"}}' for text in "qrs")
    (tmp_path / "rows.jsonl").write_text(f"{one}\n\n{two}\n{three}\n")
    source = ["--data.source", "rows.jsonl", "--row"]
    expect_error(lambda: check_first("inspect", [*source, row]), "no such row", "rows.jsonl", option="row")
    for there in ("1", "3", "rows.jsonl:4"):
        check_first("inspect", [*source, there])
    expect_error(lambda: check_first("inspect", ["--row", "9999"]), "no such row", "of demo", option="row")


def test_a_row_to_show_may_be_of_any_part(tmp_path, monkeypatch, expect_error):
    """The row may be of the source's own held-out rows, or of another source's; and where not all can be read early,
    any."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, count in (("mine/train", 1), ("mine/validation", 2), ("other", 4)):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "q", "response": "a"}\n' * count)
    other = ["--data.validation_source=other.jsonl"]
    for more, there, not_there in (([], "2", "3"), (other, "other.jsonl:4", "5")):
        args = ["--data.source=mine", *more, "--row"]
        check_first("inspect", [*args, there])
        expect_error(lambda: check_first("inspect", [*args, not_there]), "no such row", option="row")  # noqa: B023
    Parts("owner/name").check_row("9")
    monkeypatch.setattr(records, "EARLY_BYTES", 1)
    Parts("mine").check_row("9")


def test_a_base_that_the_hub_has_not_is_found_first(monkeypatch, expect_error):
    asked = []
    monkeypatch.setattr(
        "lit_qlora.model.base._ask_hub", lambda name: asked.append(name) or (demo.BASE / "config.json", set())
    )
    expect_error(lambda: check_first("fit", ["--model.base=a/b", "--model.rank=500"]), "of a/b", option="model.rank")
    check_first("fit", ["--model.base=a/b"])
    check_first("plan", ["--model.base=NousResearch/Llama-2-7b-hf"])
    assert asked == ["a/b", "a/b"]


def test_a_gpu_asked_for_without_a_driver_is_found_first(monkeypatch, expect_error):
    monkeypatch.setattr(asked, "has_driver", lambda: False)
    call = lambda: check_first("fit", ["--trainer.accelerator=gpu"])  # noqa: E731
    expect_error(call, "torch sees no CUDA GPU here", option="trainer.accelerator")
    check_first("plan", ["--trainer.accelerator=gpu"])


@pytest.mark.slow
@pytest.mark.parametrize("args", MISTAKES, ids=" ".join)
def test_it_is_the_parsers_own_mistake_in_the_same_words(args, files, monkeypatch, capsys):
    assert main(["fit", *args]) == 2
    first = capsys.readouterr().err
    monkeypatch.setattr(precheck, "check_first", lambda *_: 1)
    assert main(["fit", *args]) == 2
    assert capsys.readouterr().err == first


@pytest.mark.parametrize(
    "args",
    [
        [], ["--config", "colab_t4"], ["--config=demo"], ["-c", "demo"],
        ["--data.batch_tokens=400", "--data.packing=true"],
        ["--trainer.callbacks+=Timer"], ["--trainer.callbacks=[Timer, lit_qlora.callbacks.samples.SampleAnswers]"],
        ["--trainer.callbacks=json.decoder.JSONDecoder"],
        ["--trainer.logger=true"], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"], ["--model={rank: 3}"],
        ["--trainer.logger=false"], ["--data.system=--x y"], ["--samples.prompts+=a"], ["--print_config"],
        ["--model.target_modules=[q_proj,v_proj]"], ["--data.source=a/b"],
        ["--trainer.gradient_clip_val=null"], ["--data.form=auto"], ["--model.learning_rate=1e-4"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.init_args.save_dir=x", "--trainer.logger.name", "y"],
        ["--trainer.callbacks+=Timer", "--trainer.callbacks.interval=epoch", "--trainer.callbacks+=ModelSummary"],
        ["--trainer.callbacks=os.path.Bar"], ["--trainer.plugins=LightningEnvironment"],
        ["--trainer.callbacks=lightning.pytorch.callbacks.Timer"],
        ["--trainer.logger=WandbLogger", "--trainer.logger.projct=x"],
        ["--data.source=stray.jsonl"], ["--data.source=good.jsonl"],
        ["--data.source=[good.jsonl, demo]"], ["--data.source=good.jsonl", "--data.validation_source=stray.jsonl"],
        ["--trainer.devices=2", "--trainer.accumulate_grad_batches=2", "--trainer.accelerator=cpu"],
        ["--trainer.devices=auto"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_the_parser_takes_or_alone_can_judge_passes(args, files):
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


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {callbacks: [{class_path: mine.Kept}]}",
        "trainer.logger.class_path: mine.Kept",
        "trainer: {logger.class_path: mine.Kept, logger.init_args: {x: {class_path: mine.Kept}}}",
    ],
)
@pytest.mark.parametrize("more", [[], ["--trainer.logger.save_dir", "x"]])
def test_the_first_look_imports_nothing_that_a_config_names(text, more, tmp_path, monkeypatch):
    """The config may be a stranger's, and spell the name in any way."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("class Kept: ...\n")
    (tmp_path / "own.yaml").write_text(text)
    check_first("fit", ["--config", str(tmp_path / "own.yaml"), "--data.source", "demo", *more])
    assert "mine" not in sys.modules


@pytest.fixture
def begun(tmp_path, monkeypatch, parser_of):
    """A run of the demo's config that has begun, and the settings of its first start."""
    monkeypatch.chdir(tmp_path)
    parser = parser_of("fit")
    found = parser.parse_args(["--config", find_config("demo"), "--run", "mine"])
    config = yaml.safe_load(parser.dump(plain(found)))
    config["model"]["target_modules"] = split_names(config["model"]["target_modules"])
    run = RunFolder(Path("runs/mine"))
    run.path.mkdir(parents=True)
    run.metrics.touch()
    run.config.write_text(as_yaml({name: value for name, value in config.items() if name not in ("run", "config")}))
    return run


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ([], None), (["--model.rank=16"], None), (["--trainer.max_epochs=9", "--samples.count=3"], None),
        (["--data.source=./demo"], "missing"), (["--model.rank=4"], "model.rank: 16 -> 4"),
        (["--data.columns.user=x", "--data.columns.assistant=y"], ": data.columns.assistant: None -> y; data.columns"),
        (["--model.target_modules=q_proj,v_proj"], "model.target_modules: all-linear -> ['q_proj', 'v_proj']"),
        (["--data.template=chatml"], "data.template: None -> {#- ChatML"),
        (["--data.batch_tokens=2000"], "data.batch_tokens: None -> 2000"),
        (["--seed_everything=7", "--model.learning_rate=0.5"], "model.learning_rate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [["--config", "demo"], []], ids=["whole", "kept"])
def test_settings_of_another_run_are_found_first(begun, args, changed, config, expect_error):
    call = lambda: check_first("fit", [*config, "--run", "mine", *args])  # noqa: E731
    if changed is None:
        call()
    elif changed == "missing":
        expect_error(call, "no such file", place="./demo")
    else:
        expect_error(call, "runs/mine was started with other settings: ", changed, option="run")


@pytest.mark.parametrize("verb", ["fit", "plan", "validate"])
def test_a_damaged_config_of_a_run_is_found_first(begun, verb, expect_error):
    begun.config.write_text("a: [\n")
    words = ("no valid YAML", "put a copy of it back, or remove it and give fit all options")
    expect_error(lambda: check_first(verb, ["--run", "mine"]), *words, place="runs/mine/config.yaml:2")


def test_mistakes_need_nothing_heavy_whatever_the_verb(files, begun):
    """Rows to score, adapters, questions and pages: all of it in one process, which ends without PyTorch."""
    commands = [
        ["test", "--run", "mine", "--data.test_source", "columns.jsonl"],
        ["validate", "--run", "mine", "--data.validation_source", "empty.jsonl"],
        ["inspect", "--data.source", "page.jsonl"],
        ["plan", "--data.source", "nowhere.jsonl"],
        ["inspect", "--html", "nowhere/a.html"],
        ["fit", "--run", "mine", "--model.rank", "4"],
        ["fit", "--mirror", "page.jsonl"],
        ["evaluate", "--adapter", "nope", "--source", "columns.jsonl"],
        ["chat", "--adapter", "nope", "--prompt", "x"],
        ["predict", "--prompts", "columns.jsonl", "--output", "new.jsonl"],
        ["evaluate", "--run", "mine", "--mmlu", "columns.csv"],
    ]
    code = f"import sys; from lit_qlora.cli import main; print([main(args) for args in {commands}], end=' '); "
    code += "print({'torch', 'lightning', 'transformers', 'peft', 'datasets', 'numpy'} & {*sys.modules})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{[2] * len(commands)} set()\n"
    assert done.stderr.count("\n") == len(commands)


def test_rows_are_looked_at_unless_the_run_that_a_fit_chooses_is_finished(files, begun, expect_error):
    """A fit without a name takes the first of runs/demo, runs/demo-2, … that has these settings."""
    begun.path.rename("runs/demo")
    Path("runs/demo/finished.json").touch()
    broken = ["--data.source", "columns.jsonl"]
    expect_error(lambda: check_first("fit", broken), "no column", place="columns.jsonl:1")
    copytree("runs/demo", "runs/demo-2")
    second = Path("runs/demo-2/config.yaml")
    second.write_text(second.read_text().replace("source: demo", "source: columns.jsonl"))
    check_first("fit", broken)
    expect_error(lambda: check_first("inspect", broken), "no column", place="columns.jsonl:1")
    expect_error(lambda: check_first("fit", [*broken, "--model.rank", "4"]), "no column", place="columns.jsonl:1")
    expect_error(lambda: check_first("plan", broken), "no column", place="columns.jsonl:1")
    check_first("plan", ["--data.source", "someone/rows"])


def test_a_run_in_use_is_found_first(begun, expect_error):
    check_first("fit", ["--config", "demo", "--run", "mine"])
    with RunLock(begun.path):
        expect_error(lambda: check_first("fit", ["--run", "mine"]), "runs/mine is in use by process")
        check_first("plan", ["--config", "demo", "--run", "mine"])
    check_first("fit", ["--run", "mine"])


def test_a_run_whose_rows_are_gone_is_left_to_the_run(tmp_path, monkeypatch):
    """The run may be finished, and says so then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        check_first("fit", ["--config", "demo", "--run", "mine", "--data.source", "gone.jsonl"])
    (tmp_path / "runs" / "mine" / "finished.json").touch()
    check_first("fit", ["--config", "demo", "--run", "mine", "--data.source", "gone.jsonl"])
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        check_first("fit", ["--config", "demo", "--run", "other", "--data.source", "gone.jsonl"])


def test_options_of_a_kept_run_are_not_held_against_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("seed_everything: 1\n")
    for verb in ("validate", "plan"):
        check_first(verb, ["--run", "mine", "--data.batch_tokens", "4"])


def test_names_of_columns_are_added_to_those_of_a_kept_run(tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    config = "model.base: demo\ndata.columns: {user: Frage, assistant: Antwort}\n"
    (tmp_path / "runs" / "mine" / "config.yaml").write_text(config)
    (tmp_path / "rows.jsonl").write_text('{"Q": "a", "Antwort": "b"}\n' * 3)
    args = ["--run", "mine", "--data.validation_source", "rows.jsonl"]
    check_first("validate", [*args, "--data.columns.user", "Q"])
    expect_error(lambda: check_first("validate", args), "Frage", option="data.columns.user", place="rows.jsonl")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "plan", "inspect"])
@pytest.mark.parametrize("asked", ["short", "all"])
def test_help_fits_80_columns_and_names_no_class_of_lightning(verb, asked):
    text = help_of(verb, asked)
    assert max(map(len, text.splitlines())) <= 80
    assert "Logger(" not in text and "TensorBoardLogger" not in text and ":func:" not in text
    assert "…" not in text and ("unread, nothing, end" in text) == (verb == "inspect")
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
        (["--help.all"], "all"), (["--help=al"], "short"), ([], None),
    ],
)  # fmt: skip
def test_how_help_is_asked_for(args, asked):
    assert help_asked(args) == asked


def test_the_help_of_a_class_has_its_arguments():
    lines = help_of_class(["--trainer.callbacks.help", "EarlyStopping"]).splitlines()
    assert lines[0] == "usage: --trainer.callbacks EarlyStopping [--trainer.callbacks.NAME VALUE ...]"
    assert " ".join(lines[2:4]).split() == [
        "--trainer.callbacks.monitor", "VALUE", "quantity", "to", "be", "monitored", "(required)",
    ]  # fmt: skip
    assert any("number of checks with no improvement" in line for line in lines) and max(map(len, lines)) <= 80
    assert "--trainer.logger.save_dir VALUE   folder; default: the run's" in help_of_class(
        ["--trainer.logger.help=CSVLogger"]
    )
    for option, known in OF_LIGHTNING.items():
        assert known and all(
            f" {one}," in " ".join(help_of_class([f"--{option}.help"]).split()) for one in offered(option)
        )
        for one in offered(option):
            text = help_of_class([f"--{option}.help", one])
            assert text.startswith(f"usage: --{option} {one}") and text.splitlines().count("") <= 2
    assert help_of_class(["--trainer.logger", "CSVLogger"]) is None
    its_path = "lightning.pytorch.loggers.CSVLogger"
    assert help_of_class(["--trainer.logger.help", its_path]) == help_of_class(["--trainer.logger.help=CSVLogger"])
    assert help_of_class(["--trainer.logger.help", "--run"]) == help_of_class(["--trainer.logger.help"])
    assert "It passes others on" in help_of_class(["--trainer.logger.help", "WandbLogger"])
    bare = "usage: --trainer.plugins LightningEnvironment\n\nIt has no arguments.\n"
    assert help_of_class(["--trainer.plugins.help", "LightningEnvironment"]) == bare


@pytest.mark.parametrize(
    ("option", "one"), [("logger", "Logger"), ("plugins", "ClusterEnvironment"), ("plugins", "AsyncCheckpointIO")]
)
def test_a_base_class_and_a_plugin_without_effect_are_not_offered(option, one):
    assert one in classes_for(f"trainer.{option}") and one not in offered(f"trainer.{option}")


@pytest.mark.parametrize(
    ("args", "option", "words"),
    [
        (["--trainer.logger.help", "CSVLoger"], "trainer.logger.help", ["'CSVLoger'", "did you mean 'CSVLogger'?"]),
        (
            ["--trainer.logger.help", "my.CSVLogger"],
            "trainer.logger.help",
            ["expected one of CSVLogger,", "my.CSVLogger"],
        ),
        (["--trainer.callbacks.help=my.Own"], "trainer.callbacks.help", ["expected one of DeviceStatsMonitor,"]),
        (["--model.help"], None, ["unknown option 'model.help'", "--help=all"]),
    ],
)
def test_the_help_of_what_is_no_class_is_refused(args, option, words, expect_error):
    expect_error(lambda: help_of_class(args), *words, option=option)


@pytest.fixture(scope="module")
def torch_s():
    """Seconds that an import of torch takes the processor: a machine may be slow."""
    before = _children_s()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return _children_s() - before


@pytest.mark.parametrize("args", [["fit", "--help"], ["fit", "--model.rnak", "8"], ["fit", "--trainer.logger.help"]])
def test_help_and_a_misspelt_option_need_nothing_heavy(args, torch_s):
    code = f"import sys; from lit_qlora.cli import main; main({args}); "
    heavy = "'torch', 'lightning', 'transformers', 'peft', 'datasets', 'huggingface_hub', 'jinja2'"
    code += f"print({{{heavy}}} & {{*sys.modules}})"
    took_s = []
    for _ in range(8):  # the quickest counts: what else the machine does is not measured
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
        if took_s[-1] < torch_s / 2:
            break
    assert min(took_s) < torch_s / 2


def _children_s() -> float:
    """Seconds of the processor that ended children took: beside others, seconds by the clock say little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_first_line_comes_before_what_takes_seconds(tmp_path):
    args = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "fit", "--trainer.max_steps", "1"]
    with subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        said = [*takewhile(lambda line: not line.startswith("  load  "), process.stdout)]
        process.kill()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said if line.startswith("import time:")}
    assert {"argparse", "lit_qlora"} <= imported
    assert not {"torch", "lightning", "transformers", "peft", "datasets", "numpy"} & imported
