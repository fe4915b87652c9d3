"""main.py evaluate: validate's own figures, row by row; letters as the plain model has them; mistakes in one line."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_qlora import demo
from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.data.batching import BatchPlan, collate
from lit_qlora.tools import evaluate as module
from lit_qlora.tools.scoring.intervals import Compared, Figure
from lit_qlora.tools.scoring.rows import Scoring

ROOT = Path(__file__).parents[2]
NAMES = ["Silas", "Mara", "Odo", "Fenn", "Lily", "Brim"]
QUESTIONS = [
    [f"Who says that {NAMES[i % 6]} is{' not' * (i % 4)} the keeper?", *(NAMES * 2)[i % 6 : i % 6 + 4], "ABCD"[i % 4]]
    for i in range(14)
]


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """A folder beside the trained run, with two subjects of questions and their examples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained.parent)
    for name, rows in (("test/law_test", QUESTIONS[:6]), ("test/lamp_lore_test", QUESTIONS[6:])):
        write(f"{name}.csv", rows)
    for name in ("law", "lamp_lore"):
        write(f"dev/{name}_dev.csv", [["1?", "a", "b", "c", "d", "D"]] * 6)
    return tmp_path


def write(name, rows):
    Path(name).parent.mkdir(exist_ok=True)
    with Path(name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def evaluate(capsys):
    """Runs the verb; returns what it writes, and its lines."""

    def evaluate(*options):
        Path("figures.json").unlink(missing_ok=True)
        capsys.readouterr()
        assert main(["evaluate", *options, "--output", "figures.json"]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        return json.loads(Path("figures.json").read_text()), shown.out.splitlines()

    return evaluate


@pytest.fixture
def scored(capsys):
    """What validate or test says of loss, perplexity and accuracy over all rows, as text."""

    def scored(*command):
        capsys.readouterr()
        limits = ["--trainer.limit_val_batches", "1.0"]  # the trained run was content with two batches
        assert main([*command, *limits]) == 0
        return re.findall(r"/\w+  +([\d.]+)$", capsys.readouterr().out, re.M)

    return scored


def same(figures, side, wanted):
    """To six digits of what is printed."""
    found = [figures["held_out"][name][side]["value"] for name in ("loss", "perplexity", "accuracy")]
    assert len(wanted) == 3
    return all(abs(one - float(other)) <= 1.5e-6 * max(1, one) for one, other in zip(found, wanted, strict=True))


def test_bare_it_is_validate_s_adapter_and_base(here, evaluate, scored):
    figures, lines = evaluate()
    assert figures["base"] == "demo" and figures["held_out"]["conversations"] == 84
    assert same(figures, "adapter", scored("validate"))
    assert same(figures, "base", scored("validate", "--ckpt_path", "base"))
    assert not same(figures, "base", scored("validate"))
    loss = figures["held_out"]["loss"]
    assert loss["difference"]["value"] == pytest.approx(loss["adapter"]["value"] - loss["base"]["value"])
    assert loss["difference"]["high"] < 0
    for row in (figures["held_out"][name][side] for name in ("loss", "accuracy") for side in ("base", "adapter")):
        assert row["low"] < row["value"] < row["high"]
    assert lines[0] == "model  demo, and with runs/demo/adapter; precision 32-true"
    assert lines[1].startswith(" data  validation: 84 conversations of demo (test), 1,329 tokens scored")
    assert lines[-3].startswith(f"loss        {loss['base']['value']:#.6g} [")


def test_of_too_few_there_is_no_interval(here, evaluate):
    rows = demo.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)
    why = "       without brackets: fewer than 10 {} are too few for an interval"
    for count in (9, 10):
        Path("mine.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
        figures, lines = evaluate("--source", "mine.jsonl", "--draws", "100")
        assert (why.format("conversations") in lines) == (count == 9)
        assert any("[" in line for line in lines[-3:]) == (count == 10)
        assert (figures["held_out"]["loss"]["difference"]["low"] is None) == (count == 9)
    _, lines = evaluate("--mmlu", "test", "--draws", "100")
    assert why.format("questions") in lines and "       in brackets: 95 % intervals" in lines[2]
    assert ["[" in line for line in lines[-3:]] == [False, False, True]  # 8, 6, and all 14


def test_columns_are_as_wide_as_what_stands_in_them(capsys):
    wide, narrow = Figure(123456.0, 1234567.0, 123456789.0), Figure(1.0, 0.0, 2.0)
    module._table("", {"a": Compared(wide, wide, narrow), "bc": Compared(*[narrow] * 3)}, ".4f", ".4f")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "a   " + "123456.0000 [1234567.0000, 123456789.0000]  " * 2 + "1.0000 [0.0000, 2.0000]"
    for line in (lines[0].replace("adapter - base", "1.0000 ["), lines[2]):
        assert line.index("1.0000 [", 50) == lines[1].index("1.0000 [", 90)
    assert lines[0].index("adapter") == lines[1].index("123456.0000 [", 5)


def test_on_a_terminal_a_table_has_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    figure, change = Figure(0.1234, 0.1, 0.2), Figure(-0.0123, -0.1, 0.02)
    rows = {
        "high school government and politics (193)": Compared(figure, figure, change),
        "all": Compared(*[figure] * 3),
    }
    module._table("accuracy (questions)", rows, ".4f", ".4f")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["high", "school", "government", "0.1234", "0.1234", "-0.0123"]
    assert lines[2].split("  ")[-1] == "[-0.1000, 0.0200]"
    assert lines[1].index("-0.0123") == lines[2].index("[-0.1000") == lines[0].index("adapter - base")


def test_another_file_is_test_s(here, evaluate, scored):
    rows = demo.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    Path("mine.jsonl").write_text("".join(rows), encoding="utf-8")
    figures, _ = evaluate("--source", "mine.jsonl")
    assert figures["held_out"]["conversations"] == 40
    assert same(figures, "adapter", scored("test", "--data.test_source", "mine.jsonl"))
    again, _ = evaluate("--adapter", "runs/demo/adapter", "--source", "mine.jsonl", "--batch_tokens", "2000")
    assert same(again, "adapter", scored("test", "--data.test_source", "mine.jsonl"))


def test_in_bf16_and_packed_it_is_validate_s_too(here, evaluate, scored):
    """Rounded so, figures depend on which rows stand together: they stand as in validate."""
    shutil.copytree("runs/demo", "packed", symlinks=True)
    config = yaml.safe_load(Path("packed/config.yaml").read_text())
    config["data"] |= {"packing": True, "batch_tokens": 1024}
    config["trainer"] |= {"precision": "bf16-mixed"}
    Path("packed/config.yaml").write_text(yaml.safe_dump(config))
    figures, lines = evaluate("--run", "./packed", "--draws", "100")
    assert "precision bf16-mixed" in lines[0]
    assert same(figures, "adapter", scored("validate", "--run", "./packed"))
    config["trainer"] |= {"precision": "16-mixed"}
    Path("packed/config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", "--run", "./packed"]) == 2
    figures, _ = evaluate("--run", "./packed", "--precision", "auto", "--draws", "100")
    assert same(figures, "adapter", scored("validate", "--run", "runs/demo"))


@pytest.mark.parametrize("packed", [False, True])
def test_each_conversation_has_its_own_sums_in_its_own_place(trained, packed):
    """Against the whole logits of peft's own model, a conversation at a time."""
    chosen = choose_adapter(str(trained))
    if packed:  # and a conversation's first token is scored for the second, too
        chosen = chosen._replace(options=chosen.options | {"data": chosen.options["data"] | {"train_on": "all"}})
    scoring, data = Scoring(chosen, None, None), module._held_out(chosen, None, None)
    data.plan = BatchPlan(tokens=1024, packed=True) if packed else BatchPlan(3)
    base, adapter = scoring.held_out(data, "validate")
    model = scoring.module.peft_model.eval()
    for row, example in enumerate(data._rows["validation"].examples):
        if row % 9:
            continue
        batch = collate([(0, example)], 1)
        for sums in (base, adapter):
            with torch.no_grad(), model.disable_adapter() if sums is base else torch.no_grad():
                logits = model(input_ids=batch.input_ids).logits[0][batch.positions]
            nats = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").item()
            hits = int((logits.argmax(1) == batch.targets).sum())
            assert sums[row].tolist() == pytest.approx([nats, hits, len(batch.targets)], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("style", "shots"), [("plain", 5), ("chat", 0)])
def test_letters_are_scored_as_by_the_plain_model(here, evaluate, answerer, style, shots):
    options = ["--shots", "5", "--examples", "dev"] if shots else []
    figures, lines = evaluate("--mmlu", "test", "--style", style, "--batch_tokens", "700", *options)
    chosen = choose_adapter("runs/demo")
    subjects = module._read_questions("test", shots, "dev" if shots else None)
    asked = module._encode_questions(chosen, subjects, style)
    assert asked.names == ["lamp_lore", "law"]
    right = {"base": [], "adapter": []}
    for side, hits in right.items():
        with answerer.without_adapter() if side == "base" else torch.no_grad(), torch.no_grad():
            for prompts, answers in zip(asked.prompts, asked.answers, strict=True):
                for ids, answer in zip(prompts, answers, strict=True):
                    nats = answerer.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
                    hits.append(int(nats[asked.letters].argmax()) == answer)
    found = figures["mmlu"]
    assert (found["questions"], found["shots"], found["style"]) == (14, shots, style)
    for side, hits in right.items():
        of_each = [found["accuracy"][name][side]["value"] for name in ("lamp_lore", "law", "all")]
        assert of_each == pytest.approx([sum(hits[:8]) / 8, sum(hits[8:]) / 6, sum(hits) / 14])
    assert f" data  14 questions, {shots}-shot, {style}" in lines
    assert [line[:14].strip() for line in lines[-3:]] == ["lamp lore (8)", "law (6)", "all (14)"]


def test_four_logits_a_question_in_fp32_whatever_the_precision(trained):
    """One in some hundred of near letters would come out equal in bf16, and the first of them be taken."""
    scoring = Scoring(choose_adapter(str(trained)), "bf16-mixed", None)
    first, second = (scoring.choices([[1, 5, 9]] * 3 + [[1, 7]], [10, 11, 12, 13], 6) for _ in range(2))
    for side in (0, 1):  # the base is still the base once the adapter has computed
        assert (first[side] == second[side]).all()
    assert (first[0] != first[1]).any()
    for found in first:
        assert found.shape == (4, 4)
        assert found[0].tolist() == found[2].tolist() != found[3].tolist()
        assert (torch.from_numpy(found).bfloat16().double().numpy() != found).all()


@pytest.mark.slow
def test_the_docs_command_prints_nothing_but_its_tables(here, environment):
    command = "evaluate --mmlu test --shots 5 --examples dev"
    assert f"\npython main.py {command}\n" in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *command.split()], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("model  demo, and with runs/demo/adapter; precision 32-true")


LONG = [["word " * 400, "a", "b", "c", "d", "A"]]


@pytest.mark.parametrize(
    ("options", "place", "option", "words"),
    [
        (["--source", "nope.jsonl"], "nope.jsonl", None, ["no such file"]),
        (["--mmlu", "nope.csv"], None, "mmlu", ["nope.csv"]),
        (["--mmlu", "long.csv"], "long.csv:2", None, ["a prompt of "]),
        (["--mmlu", "test", "--shots", "5"], None, "shots", ["5 needs examples", "--examples FILE"]),
        (["--mmlu", "test", "--shots", "3"], None, "shots", ["0, 5", "got 3"]),
        (["--mmlu", "test", "--examples", "dev"], None, "examples", ["shots is 0", "--shots 5"]),
        (["--mmlu", "test", "--examples", "test/", "--shots", "5"], None, "examples", ["test/", "themselves"]),
        (["--shots", "5"], None, "shots", ["no questions", "--mmlu FILE"]),
        (["--adapter", "runs/demo/adapter"], None, "source", ["an adapter folder", "--source FILE"]),
        (["--adapter", "runs/demo"], None, None, ["runs/demo is no adapter", "adapter_config.json"]),
        (["--output", "runs"], None, "output", ["runs exists already"]),
        (["--output", "no/f.json"], None, "output", ["no folder no"]),
        (["--output", ""], None, "output", ["exists already"]),
        (["--output", "a\0b"], None, "output", ["can't be a file"]),
        (["--precision", "16-mixed"], None, "precision", ["CUDA"]),
        (["--max_length", "4"], None, "max_length", ["at least 8", "got 4"]),
        (["--max_length", "8"], None, "max_length", ["within 8 tokens"]),
        (["--max_length", "1025"], None, "max_length", ["at most 1,024", "max_position_embeddings of demo"]),
        (["--draws", "9"], None, "draws", ["at least 100", "got 9"]),
        (["--run", "./nope"], None, "run", ["nope is no run folder"]),
    ],
)
def test_mistakes_are_one_line(here, expect_error, options, place, option, words):
    write("long.csv", [QUESTIONS[0], *LONG])
    if options == ["--max_length", "8"]:
        options += ["--source", "demo"]
    expect_error(["evaluate", *options], *words, option=option, place=place)
    assert not Path("no").exists()
