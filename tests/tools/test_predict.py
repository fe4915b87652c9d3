"""main.py predict: answers in the order of the prompts, the same however they were batched, cut or resumed."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora import demo
from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.model.generate import Sampling
from lit_qlora.storage.folders import MANIFEST
from lit_qlora.text import guanaco
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import make_format
from lit_qlora.tools import predict as module
from lit_qlora.tools.answering.answerer import Answer, Answerer
from lit_qlora.tools.answering.unfinished import Unfinished
from lit_qlora.tools.predict import batches_by_length, open_prompts, read_prompts
from tests.answers import answers
from tests.expect import check_line

ROOT = Path(__file__).parents[2]
ENOUGH = ["--max_new_tokens", "24"]


def questions(count):
    rows = demo.TEST.read_text(encoding="utf-8").splitlines()[:count]
    return [guanaco.parse(json.loads(row)["text"])[1]["content"] for row in rows]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """A folder with prompts, beside the trained run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained.parent)
    (tmp_path / "prompts.txt").write_text("\n".join(questions(12)) + "\n", encoding="utf-8")
    return tmp_path


def predict(*options, prompts="prompts.txt", output="answers.jsonl"):
    return main(["predict", "--prompts", prompts, "--output", output, *ENOUGH, *options])


def test_each_answer_stands_beside_its_prompt_as_if_answered_alone(here, answerer):
    assert predict("--batch_size", "5") == 0
    found = read("answers.jsonl")
    sampling = Sampling(max_new_tokens=24)
    alone = [answers(answerer, [Conversation((Turn("user", question),))], sampling)[0] for question in questions(12)]
    assert [line["prompt"] for line in found] == questions(12)
    assert [(line["answer"], line["stopped"]) for line in found] == alone
    assert len({line["answer"] for line in found}) > 6
    assert sum(line["stopped"] for line in found) > 6
    assert [path.name for path in here.glob(".answers*")] == [".answers.jsonl.made"]


def test_on_a_real_base(real, tmp_path):
    """Left padding changes nothing there either, with grouped-query attention and tied embeddings."""
    options = ["--samples.count", "0", "--trainer.limit_val_batches", "2", "--trainer.max_steps", "2"]
    options += ["--data.max_length", "512"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(demo.TRAIN.read_text().splitlines(keepends=True)[:64]))
    fit = ["fit", "--run", str(tmp_path / "run"), "--model.base", str(real / "stories260K"), "--data.source", str(rows)]
    assert main([*fit, *options]) == 0
    answerer = Answerer(choose_adapter(str(tmp_path / "run")))
    asked = [Conversation((Turn("user", text),)) for text in ["Once", "There was a girl called Lily.", "A big dog ran"]]
    sampling = Sampling(max_new_tokens=20)
    together = answers(answerer, asked, sampling)
    assert together == [answers(answerer, [one], sampling)[0] for one in asked]
    assert len(set(together)) == 3
    for one in asked:
        ids = torch.tensor([answerer.encoder.prompt(one)])
        greedy = answerer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        pieces = []
        answer = answerer.stream(one, sampling, lambda text: pieces.append(text) is None)  # noqa: B023
        assert answer.text == "".join(pieces) == answerer.encoder.decode(greedy[0, ids.shape[1] :].tolist())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_batches_hold_each_prompt_once_and_like_lengths(lengths, batch_size):
    batches = batches_by_length(lengths, batch_size)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    in_order = [lengths[place] for batch in batches for place in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_batches_are_the_ones_expected():
    assert batches_by_length([5, 9, 5, 1, 9], 2) == [[1, 4], [0, 2], [3]]


# Kills

TORN = b'[7, [["half an ans'


class Slow:
    """Stands in for the model: each answer is a function of its ids and its draw, and takes a moment."""

    @staticmethod
    def answer_ids(answerer, ids, sampling):
        time.sleep(0.004)
        return [Answer(f"{len(prompt)} {sum(prompt)} {sampling.seed % 1000}", True) for prompt in ids]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(Answerer, "answer_ids", Slow.answer_ids)


ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT if hasattr(os, "WNOWAIT") else 0
"""Asks whether a process has ended, and leaves it to be waited for."""


@pytest.mark.slow
def test_twenty_kills_change_nothing(here, slow, capsys):
    (here / "many.txt").write_text("\n".join(questions(80) * 2), encoding="utf-8")
    options = ["--batch_size", "4", "--temperature", "0.7"]
    assert predict(*options, prompts="many.txt", output="whole.jsonl") == 0
    target, part, calls = here / "answers.jsonl", here / ".answers.jsonl.part", here / "calls"
    calls.touch()
    chance, done, rounds, kills = random.Random(0), [0], 0, 0
    while kills < 20 or not target.exists():
        child = os.fork()
        if child == 0:
            os._exit(_counted(calls, options))
        if kills < 20:
            # Counted in batches, however slow the machine is: within the start, a batch, or its saving.
            batches = calls.stat().st_size + chance.randrange(8)
            while calls.stat().st_size < batches and not os.waitid(os.P_PID, child, ENDED):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        now = 41 * rounds + (41 if target.exists() else _lines(part))
        assert now >= done[-1]  # nothing that was put down is ever lost
        done.append(now)
        if target.exists():
            assert target.read_bytes() == (here / "whole.jsonl").read_bytes()
            rounds += 1
            if kills < 20:
                target.unlink()
                part.unlink(missing_ok=True)  # killed right after the renaming
    assert len({*done}) > 5  # the kills fell into the midst of it
    assert len(read("answers.jsonl")) == 160
    # A batch is made again only where a kill fell between its making and its line.
    assert 40 * rounds <= len(calls.read_text()) <= 40 * rounds + kills


def _counted(calls, options):
    def counted(answerer, ids, sampling):
        with calls.open("a") as file:
            file.write(".")
        return Slow.answer_ids(answerer, ids, sampling)

    Answerer.answer_ids = counted
    return predict(*options, prompts="many.txt")


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kills_of_the_real_thing(here, environment):
    """The process as a user starts it, with its model, killed after its second batch and within its start."""
    options = ["--temperature", "0.9", "--batch_size", "2"]
    assert predict(*options, output="whole.jsonl") == 0
    command = ["predict", "--prompts", "prompts.txt", "--output", "answers.jsonl", *ENOUGH, *options]
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *command], env=environment, cwd=here)
    deadline = time.monotonic() + 60
    while _lines(here / ".answers.jsonl.part") < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    begun = _lines(here / ".answers.jsonl.part")
    assert 3 <= begun < 7, "not killed in the midst"
    assert main(command) == 0
    assert (here / "answers.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_what_was_answered_is_not_answered_again(here, capsys, monkeypatch):
    asked = []
    real = Answerer.answer_ids

    def until_the_third(answerer, ids, sampling):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(ids)
        return real(answerer, ids, sampling)

    monkeypatch.setattr(Answerer, "answer_ids", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict("--batch_size", "3")
    with (here / ".answers.jsonl.part").open("ab") as file:
        file.write(TORN)
    monkeypatch.setattr(Answerer, "answer_ids", lambda *given: asked.append(given[1]) or real(*given))
    capsys.readouterr()
    assert predict("--batch_size", "3") == 0
    assert capsys.readouterr().err == "6 of 12 were answered before: resuming\n"
    assert len(asked) == 4
    assert len({tuple(prompt) for batch in asked for prompt in batch}) == len({*questions(12)})
    monkeypatch.setattr(Answerer, "answer_ids", real)
    assert predict("--batch_size", "3", output="whole.jsonl") == 0
    assert (here / "answers.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_asked_for_again(here, trained, capsys, monkeypatch):
    """Answers of the new one would be recorded as those of the one before."""
    adapter = Path(shutil.copytree(trained / "adapter", here / "adapter"))
    (adapter / MANIFEST).unlink()

    def replaced(answerer, ids, sampling):
        with (adapter / "adapter_config.json").open("a") as file:
            file.write("\n")
        return Slow.answer_ids(answerer, ids, sampling)

    monkeypatch.setattr(Answerer, "answer_ids", replaced)
    assert predict("--adapter", str(adapter)) == 2
    error = capsys.readouterr().err
    check_line(error, str(adapter), "replaced", "again", begins="error: predict: ")
    monkeypatch.setattr(Answerer, "answer_ids", Slow.answer_ids)
    assert predict("--adapter", str(adapter)) == 0
    assert capsys.readouterr().err == "", "nothing was kept, to be resumed"


def test_of_an_adapter_that_is_replaced_in_a_resume_the_answers_before_are_said_to_be_another_s(
    here, trained, capsys, monkeypatch
):
    adapter, answered = Path(shutil.copytree(trained / "adapter", here / "adapter")), []
    (adapter / MANIFEST).unlink()

    def once(*given):
        if answered:
            raise KeyboardInterrupt
        answered.append(given)
        return Slow.answer_ids(*given)

    def replaced(*given):
        with (adapter / "adapter_config.json").open("a") as file:
            file.write("\n")
        return Slow.answer_ids(*given)

    monkeypatch.setattr(Answerer, "answer_ids", once)
    with pytest.raises(KeyboardInterrupt):
        predict("--adapter", str(adapter))
    monkeypatch.setattr(Answerer, "answer_ids", replaced)
    capsys.readouterr()
    assert predict("--adapter", str(adapter)) == 2
    _, error = capsys.readouterr().err.splitlines()
    check_line(f"{error}\n", str(adapter), "8 answers are of the one before", "another name", begins="error: predict: ")
    assert predict("--adapter", str(adapter), output="others.jsonl") == 2, "it is replaced once more"
    monkeypatch.setattr(Answerer, "answer_ids", Slow.answer_ids)
    assert predict("--adapter", str(adapter), output="others.jsonl") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "0.5"], "temperature: 0.0 -> 0.5"),
        (["--seed", "3"], "seed: 0 -> 3"),
        (["--batch_size", "4"], "batch_size: 8 -> 4"),
        (["--max_new_tokens", "9"], "max_new_tokens: 24 -> 9"),
        ("prompts", "prompts: "),
        ("adapter", "adapter: "),
    ],
    ids=str,
)
def test_what_was_begun_for_something_else_is_refused(here, slow, change, message, capsys, monkeypatch):
    asked = []

    def fails(*given):
        if asked:
            raise KeyboardInterrupt
        asked.append(given)
        return Slow.answer_ids(*given)

    monkeypatch.setattr(Answerer, "answer_ids", fails)
    with pytest.raises(KeyboardInterrupt):
        predict()
    begun = (here / ".answers.jsonl.part").read_bytes()
    options = change if isinstance(change, list) else []
    if change == "prompts":
        (here / "prompts.txt").write_text("Another one\n")
    if change == "adapter":
        (here / "runs").unlink()
        assert (
            main(["fit", "--trainer.max_steps", "1", "--samples.count", "0", "--trainer.limit_val_batches", "1"]) == 0
        )
    monkeypatch.setattr(Answerer, "answer_ids", Slow.answer_ids)
    capsys.readouterr()
    assert predict(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: output: answers.jsonl was begun with other settings ({message}")
    assert error.endswith("); give those again, or another name, or delete .answers.jsonl.part\n")
    assert error.count("\n") == 1
    assert (here / ".answers.jsonl.part").read_bytes() == begun
    assert not (here / "answers.jsonl").exists()


@pytest.mark.parametrize("torn", [TORN, b'[1, ["b"]]', b'[1, "\xf0\x9f', b"\0" * 9])
def test_a_line_cut_short_spoils_none_that_comes_later(tmp_path, torn):
    unfinished = Unfinished(tmp_path / "out")
    with unfinished.open({}):
        unfinished.add(0, ["a"])
    with unfinished.path.open("ab") as file:
        file.write(torn)
    with unfinished.open({}) as done:
        assert done == {0: ["a"]}
        unfinished.add(1, ["\u2028 b"])
    with unfinished.open({}) as done:
        assert done == {0: ["a"], 1: ["\u2028 b"]}


def test_one_process_at_a_time(here, slow, capsys):
    unfinished = Unfinished(here / "answers.jsonl")
    with unfinished.open({"of": "another process"}):
        assert predict() == 2
    assert "another process is writing answers.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b"", b'{"prompts": "0', b"\0\0\0"])
def test_a_first_line_cut_short_is_no_beginning(here, slow, torn):
    (here / ".answers.jsonl.part").write_bytes(torn)
    assert predict() == 0
    assert len(read("answers.jsonl")) == 12


def test_a_file_of_somebody_else_stays(here, slow, capsys):
    (here / ".answers.jsonl.part").write_text("my thesis\n")
    assert predict() == 2
    assert "its first line does not name them" in capsys.readouterr().err
    assert (here / ".answers.jsonl.part").read_text() == "my thesis\n"


def test_a_full_disk_is_one_line_and_the_same_command_resumes(here, slow, capsys, monkeypatch):
    real, left = os.fsync, [3]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert predict("--batch_size", "2") == 2
    assert "answers.jsonl.part can't be written (No space left on device); the same" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", real)
    assert predict("--batch_size", "2") == 0
    assert len(read("answers.jsonl")) == 12


def test_a_line_that_finds_no_room_is_no_traceback_though_closing_tries_it_again(here, slow, capsys):
    resource = pytest.importorskip("resource")  # none on Windows
    assert predict("--batch_size", "2", output="whole.jsonl") == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        assert predict("--batch_size", "2") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (here / ".answers.jsonl.part").stat().st_size == 400
    check_line(
        capsys.readouterr().err, "answers.jsonl.part can't be written (File too large)", begins="error: output: "
    )
    assert predict("--batch_size", "2") == 0
    assert (here / "answers.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_chance_is_the_seeds_and_another_for_each_batch(here):
    (here / "same.txt").write_text("Who goes everywhere with Silas?\n" * 12)
    drawing = ["--temperature", "1.5", "--batch_size", "4"]
    for seed, output in (("0", "one.jsonl"), ("0", "again.jsonl"), ("1", "other.jsonl")):
        assert predict(*drawing, "--seed", seed, prompts="same.txt", output=output) == 0
    assert read("one.jsonl") == read("again.jsonl")
    assert read("one.jsonl") != read("other.jsonl")
    answers = [line["answer"] for line in read("one.jsonl")]
    assert answers[:4] != answers[4:8] != answers[8:]


# Prompts


def test_every_form_of_prompts(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet

    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    long = Conversation((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")), "Be brief.")
    short = Conversation((Turn("user", "x, y"),), "S")
    bare = Conversation((Turn("user", "z"),))
    rows = [{"messages": dialog}, {"prompt": "x, y", "system": "S"}, {"prompt": "z", "system": None}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    columns = dict.fromkeys(["messages", "prompt", "system"])
    pa.parquet.write_table(pa.Table.from_pylist([columns | row for row in rows]), tmp_path / "p.parquet")
    quoted = json.dumps(dialog).replace('"', '""')
    (tmp_path / "p.csv").write_text(f'prompt,system,messages\n,,"{quoted}"\n"x, y",S,\nz,,\n')
    for name in ("p.jsonl", "p.json", "p.parquet", "p.csv"):
        assert [conversation for _, conversation in open_prompts(read_prompts(tmp_path / name), make_format())] == [
            long,
            short,
            bare,
        ], name
    (tmp_path / "p.txt").write_text("\ufeffz\r\n\n  one\u2028line \n", encoding="utf-8")
    assert open_prompts(read_prompts(tmp_path / "p.txt"), make_format()) == [
        (f"{tmp_path}/p.txt:1", bare),
        (f"{tmp_path}/p.txt:3", Conversation((Turn("user", "one\u2028line"),))),
    ]
    (tmp_path / "only.csv").write_text("prompt\nz\n")
    assert [conversation for _, conversation in open_prompts(read_prompts(tmp_path / "only.csv"), make_format())] == [
        bare
    ]


def test_prompts_are_read_as_rows_to_train_on_are(tmp_path, capsys):
    turns = [{"role": "user", "content": "a</s>", "name": "Bo"}]
    rows = ["messages,prompt,system_prompt,id", f'"{turns}",b,S,7', ",c,,8"]
    (tmp_path / "p.csv").write_text("\n".join(rows))
    asked = [conversation for _, conversation in open_prompts(read_prompts(tmp_path / "p.csv"), make_format())]
    assert asked == [Conversation((Turn("user", "a"),), "S"), Conversation((Turn("user", "c"),))]
    assert capsys.readouterr().err == (
        "prompts: 1 row had special tokens written out at the edges of turns, which were taken off: </s> (1)\n"
        "prompts: 2 rows with what is not used: column 'id' (2), column 'prompt' beside 'messages' (1), "
        "key 'name' of a turn (1)\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: no JSON"):
        read_prompts(tmp_path / "p.jsonl")


def asked(*turns, system=None):
    roles = ("user", "assistant") * len(turns)
    return Conversation(tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False)), system)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
IMAGE = {"role": "user", "content": [{"type": "image"}]}


@pytest.mark.parametrize("row", [[IMAGE], [IMAGE, TALK[1]], [*TALK[:2], IMAGE], [*TALK[:2], IMAGE, TALK[1]]])
def test_a_question_that_is_only_an_image_is_refused_by_its_place(row, tmp_path, expect_error):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": row}))
    rows = read_prompts(tmp_path / "p.jsonl")
    expect_error(lambda: open_prompts(rows, make_format()), "no text", "'image'", place=f"{tmp_path}/p.jsonl:2")


LEFT = "prompts: 1 last answer left out, for each question is answered here\n"


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "note"),
    [
        (
            {"instruction": "a", "input": "i", "output": "b", "system": "S"},
            None,
            asked("a\n\ni", system="S"),
            "'output'",
        ),
        ({"instruction": "a", "context": "i", "response": "b"}, None, asked("a\n\ni"), "'response'"),
        ({"instruction": "a", "input": "", "history": [["x", "y"]]}, None, asked("x", "y", "a"), ""),
        ({"prompt": "a", "completion": "b"}, None, asked("a"), "'completion'"),
        ({"question": "a", "answer": "b"}, None, asked("a"), "'answer'"),
        ({"query": "a", "response": "b"}, None, asked("a"), "'response'"),
        ({"input": "a", "output": "b"}, None, asked("a"), "'output'"),
        ({"prompt": "a", "question": "z"}, None, asked("a"), "'question'"),
        ({"prompt": TALK[:1]}, None, asked("a"), ""),
        ({"conversations": [{"from": "human", "value": "a"}]}, None, asked("a"), ""),
        ({"messages": TALK}, None, asked("a", "b", "c"), ""),
        ({"messages": TALK[:2]}, None, asked("a"), LEFT),
        ({"messages": [IMAGE, TALK[1], *TALK[:2]]}, None, asked("a"), "without a text, left out"),
        ({"text": "### Human: a### Assistant: b"}, None, asked("a"), LEFT),
        ({"text": "<s>[INST] a [/INST] b </s>"}, None, asked("a"), LEFT),
        (
            {"Frage": "a", "Antwort": "b", "dazu": "c"},
            {"user": "Frage", "context": "dazu"},
            asked("a\n\nc"),
            "'Antwort'",
        ),
        ({"chat": TALK}, {"messages": "chat"}, asked("a", "b", "c"), ""),
    ],
)
def test_every_form_that_a_fit_reads_is_a_prompt(row, columns, prompt, note, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    rows = read_prompts(str(tmp_path / "p.jsonl"), columns)
    assert [found for _, found in open_prompts(rows, make_format(), columns)] == [prompt]
    said = capsys.readouterr().err
    assert note in said if note else said == ""


def test_prompts_come_from_wherever_rows_do(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ['{"prompt": "a"}\n', '{"prompt": "b"}\n']
    Path("parts").mkdir()
    for number, line in enumerate(lines):
        Path(f"parts/p{number}.jsonl").write_text(line)
    Path("both").mkdir()
    Path("both/train.jsonl").write_text(lines[0])
    Path("both/test.jsonl").write_text(lines[1])
    Path("p.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    Path("p.txt").write_text("a\nb\n")
    Path("parts/q0.txt").write_text("a\n")
    Path("parts/q1.txt").write_text("b\n")
    for source in ("parts/*.jsonl", "p.jsonl.gz", "p.txt", "parts/q*.txt", ["parts/p0.jsonl", {"path": "both"}]):
        assert [row.value for row in read_prompts(source)] == [{"prompt": "a"}, {"prompt": "b"}]
    assert capsys.readouterr().err == "prompts: test of both; not read: train\n"
    assert [row.value for row in read_prompts("both:train")] == [{"prompt": "a"}]
    for source, words in (
        ({"path": "p.txt", "share": 0.5}, "prompts.share: expected none"),
        ({"path": "p.txt", "pth": "x"}, "prompts: 'pth' is unknown"),
        ("no.jsonl", "no.jsonl: no such file"),
    ):
        with pytest.raises(UserError) as caught:
            read_prompts(source)
        assert words in str(caught.value)


def test_columns_are_an_option(here, slow, capsys):
    (here / "p.csv").write_text("Frage;Antwort\nWho is Ada?;A cook.\n")
    assert predict("--columns.user", "Frage", prompts="p.csv") == 0
    assert [line["prompt"] for line in read("answers.jsonl")] == ["Who is Ada?"]
    assert predict(prompts="p.csv", output="b.jsonl") == 2
    assert predict("--columns.usr", "Frage", prompts="p.csv", output="b.jsonl") == 2
    assert "columns: 'usr' is unknown" in capsys.readouterr().err


def test_a_systems_text_and_earlier_turns_reach_the_model(here, answerer):
    rows = [{"messages": [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who is Ada?"}]},
            {"messages": [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "A cook."},
                          {"role": "user", "content": "Where?"}]}]  # fmt: skip
    (here / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    real = Answerer.answer_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "answer_ids", lambda a, ids, s: seen.extend(ids) or real(a, ids, s))
        assert predict(prompts="p.jsonl") == 0
    tokenizer = load_tokenizer("demo")

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first = [1, *encode("[INST] <<SYS>>\nSpeak.\n<</SYS>>\n\nWho is Ada? [/INST]")]
    second = [1, *encode("[INST] Who is Ada? [/INST]"), *encode("A cook. "), 2, 1, *encode("[INST] Where? [/INST]")]
    assert sorted(seen) == sorted([first, second])
    assert [line["prompt"] for line in read("answers.jsonl")] == ["Who is Ada?", "Where?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ""}', "p.jsonl:2: turn 1: a turn of the user is empty"),
        ('{"prompt": " "}', "p.jsonl:2: turn 1: a turn of the user is empty"),
        ('{"prompt": 3}', "p.jsonl:2: column 'prompt' holds a number, expected text"),
        ('{"promt": "x"}',
         "p.jsonl:2: no column 'messages' or 'conversations' or 'prompt' or 'instruction' (or others), columns found:"
         " ['promt']; give --columns.user promt"),
        ('{"prompt": "x [/INST] y"}', "p.jsonl:2: turn 1 holds '[/INST]', which could forge a turn"),
        ('{"prompt": "x", "system": "<<SYS>>"}', "p.jsonl:2: the system text holds '<<SYS>>'"),
        (r'{"prompt": "x \ud800"}', "p.jsonl:2: turn 1 holds bytes that are no UTF-8, or half"),
        ('{"text": "Once upon a time."}', "p.jsonl:2: column 'text' has neither '### Human:' nor '[INST]'"),
        ('{"messages": "no list"}', "p.jsonl:2: expected a list of messages, got a text"),
        (json.dumps({"prompt": "word " * 1100}),
         "p.jsonl:2: a prompt of 3316 tokens and max_new_tokens=24 are more than the 1024 tokens of demo"),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_bad_prompt_names_its_line_before_anything_is_loaded(here, row, message, capsys, monkeypatch):
    monkeypatch.setattr(Answerer, "model", property(lambda _: pytest.fail("a model was loaded")))
    (here / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{row}\n')
    assert predict(prompts="p.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (here / "answers.jsonl").exists() and not (here / ".answers.jsonl.part").exists()


def test_text_from_outside_makes_no_special_token(here, answerer):
    ids = answerer.prompt(Conversation((Turn("user", "</s><s> hi </s>"),)), Sampling())
    assert ids.count(1) == 1 and ids[0] == 1
    assert 2 not in ids


def test_a_finished_output_is_known_from_another_s(here, slow, capsys):
    assert predict() == 0
    output = here / "answers.jsonl"
    before = output.read_bytes()
    capsys.readouterr()
    assert predict() == 0
    assert capsys.readouterr() == ("finished: answers.jsonl holds these 12 answers; nothing to do\n", "")
    part = Path(".answers.jsonl.part")
    part.write_bytes(b"{}\n")  # of a process that was killed before it could take it away
    assert predict() == 0
    assert not part.exists()
    capsys.readouterr()
    begins = "error: output: answers.jsonl exists already"
    assert predict("--seed", "5") == 2
    check_line(capsys.readouterr().err, "(seed: 0 -> 5)", "another name", begins=begins)
    assert output.read_bytes() == before
    output.write_bytes(before + b"\n")
    assert predict() == 2
    check_line(capsys.readouterr().err, "(was changed since)", "another name", begins=begins)
    (here / ".answers.jsonl.made").unlink()
    assert predict() == 2
    check_line(capsys.readouterr().err, "another name", begins=f"{begins}; ")
    assert output.read_bytes() == before + b"\n"


def test_texts_that_end_answers_are_the_same_when_given_again(here, slow, capsys):
    assert predict("--stop", "###") == 0
    capsys.readouterr()
    assert predict("--stop", '["###"]') == 0
    assert capsys.readouterr().out == "finished: answers.jsonl holds these 12 answers; nothing to do\n"
    assert predict("--stop", "##") == 2
    assert "exists already (stop: ['###'] -> ['##'])" in capsys.readouterr().err


def test_lines_where_there_is_no_terminal(here, slow, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0)
    assert predict("--batch_size", "5") == 0
    assert capsys.readouterr().err == "5 of 12 answered\n10 of 12 answered\n12 of 12 answered\n"


def test_a_bar_on_a_terminal_even_one_that_has_no_size(here, slow, monkeypatch):
    screen, terminal = pytest.importorskip("pty").openpty()
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        assert predict("--batch_size", "5") == 0
        assert "12/12" in os.read(screen, 10_000).decode()
    os.close(screen)


def test_too_much_for_the_memory_is_one_line(here, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Answerer, "answer_ids", full)
    assert predict() == 2
    assert capsys.readouterr().err.startswith("error: batch_size: too much for the memory: 8 prompts of up to ")
    with (here / ".answers.jsonl.part").open("ab") as file:
        file.write(TORN)
    monkeypatch.setattr(Answerer, "answer_ids", Slow.answer_ids)
    assert predict("--batch_size", "4") == 0, "nothing was answered in other batches"


@pytest.mark.parametrize("name", ["j", "j.doc"])
def test_an_ending_that_is_none_names_all_that_are(tmp_path, name):
    (tmp_path / name).write_text("hi\n")
    with pytest.raises(
        UserError, match=r"the ending is '(\.doc)?', expected one of \.txt, \.jsonl, \.json, \.csv, \.parquet"
    ):
        read_prompts(tmp_path / name)
