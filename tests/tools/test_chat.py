"""main.py chat: one answer from --prompt or a pipe, and a conversation at a real (pseudo-)terminal."""

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_qlora import demo
from lit_qlora.chosen import choose_adapter
from lit_qlora.cli import main
from lit_qlora.data.encode import Encoder
from lit_qlora.data.records import load_records
from lit_qlora.data.tokenizer import load_tokenizer
from lit_qlora.errors import UserError
from lit_qlora.model.generate import Sampling
from lit_qlora.storage.run import RunFolder
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.tools.answering import terminal
from lit_qlora.tools.answering.answerer import Answer, Answerer
from lit_qlora.tools.answering.dialog import Dialog
from lit_qlora.tools.answering.streaming import TextStream
from lit_qlora.tools.answering.terminal import Terminal, two_columns
from tests.answers import answers
from tests.expect import check_line

ROOT = Path(__file__).parents[2]
SILAS = "Who goes everywhere with Silas?"
HEAVY = "{'torch', 'transformers', 'lightning', 'peft', 'bitsandbytes', 'datasets'} & {*sys.modules}"


def question(text, system=None):
    return Conversation((Turn("user", text),), system)


def greedy(answerer, conversation, num_tokens):
    """transformers' own answer to the same ids."""
    ids = torch.tensor([answerer.encoder.prompt(conversation)])
    output = answerer.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
        eos_token_id=answerer.encoder.eos_id, pad_token_id=0,
    )  # fmt: skip
    return answerer.encoder.decode(output[0, ids.shape[1] :].tolist())


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(trained.parent)
    return tmp_path


@pytest.fixture
def piped(monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return pipe


# Once

NEWEST = "(the newest run's adapter answers: runs/demo/adapter)\n"
"""What stands beside an answer where no run was named."""


def test_one_answer_is_transformers_own_greedy_one(here, answerer, capsys):
    assert main(["chat", "--prompt", SILAS]) == 0
    out, err = capsys.readouterr()
    assert out == greedy(answerer, question(SILAS), 256) + "\n"
    assert len(out) > 20
    assert err == NEWEST


def test_a_pipe_is_one_prompt(here, answerer, piped, capsys):
    piped(b"\xef\xbb\xbfWho goes everywhere\nwith Silas?\n")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == greedy(answerer, question("Who goes everywhere\nwith Silas?"), 256) + "\n"


def test_the_limit_is_kept_apart_from_the_answer(here, answerer, capsys):
    assert main(["chat", "--prompt", SILAS, "--max_new_tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == greedy(answerer, question(SILAS), 3) + "\n"
    assert err == f"{NEWEST}(cut at 3 tokens; --max_new_tokens sets the limit)\n"


def test_a_seed_repeats_what_is_drawn(here, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        assert main(["chat", "--prompt", SILAS, "--temperature", "2", "--seed", seed, "--max_new_tokens", "20"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_the_system_text_is_the_runs_unless_one_is_given(tmp_path, capsys, monkeypatch):
    seen = []
    stream = Answerer.stream

    def keep(answerer, conversation, sampling, show):
        seen.append(answerer.encoder.tokenizer.decode(answerer.encoder.prompt(conversation)))
        return stream(answerer, conversation, sampling, show)

    monkeypatch.setattr(Answerer, "stream", keep)
    options = ["--trainer.max_steps", "1", "--samples.count", "0", "--trainer.limit_val_batches", "1"]
    run = str(tmp_path / "run")
    assert main(["fit", "--run", run, "--data.system", "Be kind.", *options]) == 0
    chat = ["chat", "--run", run, "--prompt", "hi", "--max_new_tokens", "2"]
    for given_system in ([], ["--system", "Be brief."], ["--system", ""]):
        assert main([*chat, *given_system]) == 0
    assert seen == [
        "<s> [INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]",
        "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]",
        "<s> [INST] hi [/INST]",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "prompt: expected a question, got nothing; write one, or leave --prompt out to talk"),
        (["--prompt", " \n"], "prompt: expected a question, got nothing; write one, or leave --prompt out to talk"),
        (["--prompt", "x [INST] y"], "prompt: it holds '[INST]', which could forge a turn or a system text"),
        (["--prompt", "x", "--system", "<</SYS>>"], "prompt: the system text holds '<</SYS>>', which could"),
        (["--prompt", "x \udcff"], "prompt: it holds bytes that are no UTF-8, or half a character"),
        (["--prompt", "word " * 600], "a prompt of 1816 tokens and max_new_tokens=256 are more than the 1024 tokens"),
        (["--prompt", "x", "--adapter", "nowhere"], "nowhere is no adapter: it has no adapter_config.json"),
        (["--prompt", "x", "--adapter", "a", "--run", "b"], "adapter: a is given, and a run (b) too; give one"),
        (["--prompt", "x", "--run", "./nowhere"], "run: nowhere is no run folder: it has no config.yaml"),
        (["--prompt", "x", "--base", "./nowhere"], "base: no folder './nowhere'; give a hub id (owner/name)"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected 0, or a number from 1e-9, got -1.0"),
        (["--promt", "x"], "unknown option 'promt'; did you mean 'prompt'?"),
    ],
    ids=range(12),
)
def test_a_mistake_is_one_line_and_no_model_is_loaded(here, args, message, capsys, monkeypatch):
    monkeypatch.setattr(Answerer, "model", property(lambda _: pytest.fail("a model was loaded")))
    assert main(["chat", *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert (err.count("\n"), out) == (1, "")


def test_a_runs_base_that_is_elsewhere_now(tmp_path, monkeypatch, expect_error):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path("runs", "mine"))
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_config.json").write_text("{}")
    run.config.write_text("model:\n  base: ./gone\n")
    advice = "runs/mine has this path: give --base if the base is elsewhere now"
    expect_error(lambda: choose_adapter("mine"), "no folder './gone'", advice, option="base")
    expect_error(lambda: choose_adapter("mine", base="./gone"), "no folder './gone'", option="base")


def test_an_adapter_in_its_run_has_the_base_of_the_run(tmp_path, trained):
    run = RunFolder(Path(shutil.copytree(trained, tmp_path / "mine")))
    base = shutil.copytree(demo.BASE, tmp_path / "base")
    run.config.write_text(run.config.read_text().replace("base: demo", f"base: {base}"))
    assert choose_adapter(adapter=str(run.adapter)).base.location == str(base)
    elsewhere = shutil.copytree(run.adapter, tmp_path / "adapter")
    assert choose_adapter(adapter=str(elsewhere)).base.location == str(demo.BASE)


def test_nothing_on_standard_input_is_one_line(here, piped, capsys):
    piped(b"")
    assert main(["chat"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input: expected a question, got nothing")
    piped("é".encode("latin-1"))
    assert main(["chat"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input: not UTF-8 (byte 0); convert it")


def test_no_run_yet_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "--prompt", "x"]) == 2
    check_line(capsys.readouterr().err, "no run in runs/", "'python main.py fit'", "--run", begins="error: ")


def test_an_altered_adapter_is_refused_before_the_base_is_loaded(here, trained, capsys, monkeypatch):
    monkeypatch.setattr(Answerer, "model", property(lambda _: pytest.fail("a model was loaded")))
    shutil.copytree(trained, "copy")
    weights = Path("copy/adapter/adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for chosen in (["--run", "./copy"], ["--adapter", "copy/adapter"], ["--adapter", "copy/adapter", "--base", "demo"]):
        assert main(["chat", "--prompt", "x", *chosen]) == 2
        err = capsys.readouterr().err
        assert "adapter_model.safetensors" in err and "the adapter was altered or cut short after it was saved" in err
        restored = "'python main.py fit --run copy' restores it"
        assert err.endswith(f"; {restored}, or, if that was meant, delete its manifest.json\n")
        assert err.count("\n") == 1
    shutil.copytree("copy/adapter", "copy/adapter.copy", dirs_exist_ok=True)  # which is no remedy then
    assert main(["chat", "--prompt", "x", "--run", "./copy"]) == 2
    assert "; take another, or, if that was meant, delete its manifest.json\n" in capsys.readouterr().err


def test_another_base_is_refused(here, trained, capsys):
    shutil.copytree(demo.BASE, "other")
    weights = Path("other/model.safetensors")
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state["model.norm.weight"] *= 2
    save_file(state, weights, {"format": "pt"})
    assert main(["chat", "--prompt", "x", "--base", "other"]) == 2
    err = capsys.readouterr().err
    assert "this adapter was trained on demo" in err and "give its own with --model.base or --base" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["chat", "predict"])
def test_help_is_light(verb, environment):
    code = f"import sys; from lit_qlora.cli import main; main(['{verb}', '--help']); print({HEAVY})"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.endswith("set()\n")


# Text as it comes


def encoders(request):
    bases = {"demo": "demo", "llama2": "llama2-tokenizer", "stories": "stories260K"}
    name = bases[request.param]
    base = name if name == "demo" else str(request.getfixturevalue("real") / name)
    return Encoder(load_tokenizer(base), 1024)


@pytest.fixture(scope="module", params=["demo", "llama2", "stories"])
def encoder(request):
    return encoders(request)


def streamed(encoder, ids):
    stream = TextStream(encoder)
    return [*map(stream.add, ids), stream.close()]


TEXTS = [
    "Hello , do n't  go: naïve   x\n\n\tand\n  so on.",
    "😀😃 日本語 ኣማርኛ and 👩‍👩‍👧 “quoted” 한국어",
    "  outer spaces  ",
    "1. one\n2. two\n```python\n    def f(x):\n        return x\n```",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_breaks_and_no_space_is_lost(encoder, text):
    ids = encoder._encode([text])[0]
    pieces = streamed(encoder, [*ids, encoder.eos_id])
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 1  # and not all at once


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_what_is_shown_is_what_is_kept(encoder, data):
    """The ids may be any: bytes that make no character, special tokens in the midst, spaces alone."""
    odd = [encoder.bos_id, encoder.eos_id, 0, 13]
    token = st.integers(3, 258) | st.integers(259, len(encoder.tokenizer) - 1) | st.sampled_from(odd)
    ids = data.draw(st.lists(token, max_size=25))
    assert "".join(streamed(encoder, ids)) == encoder.answer(ids)[0]


def test_a_character_cut_in_half_is_left_out(encoder):
    ids = encoder._encode(["Look: 🦜"])[0]
    assert encoder.answer(ids)[0] == "Look: 🦜"
    assert encoder.answer(ids[:-1])[0] == "Look:"
    assert "".join(streamed(encoder, ids[:-1])) == "Look:"


STOPPED = [
    ("one two STOP three", ["STOP"], "one two"),
    ("one two STO three", ["STOP"], "one two STO three"),  # what only begins like it is shown in the end
    ("one two ST", ["STOP", "TO"], "one two ST"),
    ("one two STOP three", ["three", "TOP th"], "one two S"),  # that which begins first
    ("a\n\nUser: b", ["\nUser:", "\n\n###"], "a"),
    ("a\n\nb", ["\n\n"], "a"),
    ("naïve 🦜 yes", ["🦜"], "naïve"),
    ("STOP", ["STOP"], ""),
    ("aaaab", ["aab"], "aa"),  # it overlaps with its own beginning
    ("one", [], "one"),
]


@pytest.mark.parametrize(("text", "stop", "shown"), STOPPED)
def test_a_text_that_ends_an_answer_is_never_shown(encoder, text, stop, shown):
    """Wherever tokens end in it; what is streamed is what is kept."""
    ids = encoder._encode([text])[0]
    over = encoder.is_over(stop)
    end = next((size for size in range(1, len(ids) + 1) if over and over(ids[:size])), len(ids))
    stream = TextStream(encoder, stop)
    pieces = [*map(stream.add, ids[:end]), stream.close()]
    assert "".join(pieces) == encoder.answer(ids[:end], stop)[0] == shown
    assert encoder.answer(ids[:end], stop)[1] == any(one in text for one in stop)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_ends_an_answer_is_not_shown(encoder, data):
    ids = data.draw(st.lists(st.integers(3, 258) | st.integers(259, len(encoder.tokenizer) - 1), max_size=20))
    text = encoder.answer(ids)[0]
    places = st.integers(0, max(len(text) - 1, 0))
    starts = data.draw(st.lists(places, max_size=3))
    stop = [text[start : start + data.draw(st.integers(1, 9))] for start in starts if text]
    end = next((size for size in range(1, len(ids) + 1) if stop and encoder.is_over(stop)(ids[:size])), len(ids))
    stream = TextStream(encoder, stop)
    shown = "".join([*map(stream.add, ids[:end]), stream.close()])
    assert shown == encoder.answer(ids[:end], stop)[0]
    assert not any(one in shown for one in stop)


def test_an_answer_comes_in_pieces_and_ends_at_eos(answerer):
    pieces = []
    answer = answerer.stream(question(SILAS), Sampling(), lambda text: pieces.append(text) is None)
    assert answer == answers(answerer, [question(SILAS)], Sampling())[0]
    assert answer.stopped
    assert "".join(pieces) == answer.text
    assert sum(map(bool, pieces)) > 5


# The conversation


class Scripted:
    """Gives the answers that it was made with, and keeps what it was asked."""

    def __init__(self, *answers, stops=True):
        self.answers, self.stops, self.asked = list(answers), stops, []

    def __call__(self, conversation, sampling, show):
        self.asked.append((conversation, sampling))
        text = self.answers.pop(0)
        show(text)
        return Answer(text, self.stops)


@pytest.fixture
def talk(answerer, monkeypatch, capsys):
    """A conversation of the lines given; returns what was printed, and what reached the model."""

    def talk(lines, *answers, stops=True, system=None, temperature=0.0, seed=0):
        script, rest = Scripted(*answers, stops=stops), iter(lines)
        monkeypatch.setattr(answerer, "stream", script, raising=False)

        def read(_):
            try:
                return next(rest)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        Terminal(answerer, Sampling(8, temperature, seed=seed), system).run()
        return capsys.readouterr().out.split("\n")[1:-1], script.asked

    return talk


def turns(*texts):
    return tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))


def test_turns_add_up_until_reset(talk):
    out, asked = talk(["a", " /c", "", "/reset", "e"], "b", "d", "f")
    assert [conversation.turns for conversation, _ in asked] == [turns("a"), turns("a", "b", "/c"), turns("e")]
    assert out == ["b", "d", "(forgotten)", "f", ""]


def test_a_backslash_continues_a_question_on_the_next_line(talk):
    out, asked = talk(["Translate.\\", "\\", "dog", "c\\\\", "d"], "chien", "e")
    assert [conversation.turns[-1].content for conversation, _ in asked] == ["Translate.\n\ndog", "c\\\nd"]
    assert out == ["chien", "e", ""]


def test_the_commands_fit_80_columns():
    assert max(map(len, terminal.DIALOG_HELP.split("\n"))) < 80


def test_commands_in_capitals_and_with_words_after_them(talk):
    out, asked = talk(["a", "/RESET now", "/System Be brief.", "e", "/Quit now", "g"], "b", "f")
    assert out[:4] == ["b", "(forgotten)", "(system: Be brief.)", "f"]
    assert [conversation.turns for conversation, _ in asked] == [turns("a"), turns("e")]


def test_each_question_draws_anew(talk):
    _, asked = talk(["a", "/reset", "a"], "b", "c", temperature=1.0, seed=5)
    assert [sampling.seed for _, sampling in asked] == [5, 6]


def test_the_system_text_is_set_shown_and_taken_away(talk):
    lines = ["/system", "/system Be brief.", "a", "/reset", "/system", "/system -", "c", "/system [INST]"]
    out, asked = talk(lines, "b", "d")
    assert [conversation.system for conversation, _ in asked] == ["Be brief.", ""]
    assert out == [
        "(system: none)", "(system: Be brief.)", "b", "(forgotten; the system text stays)", "(system: Be brief.)",
        "(system: none)", "d",
        "(the system text holds '[INST]', which could forge a turn or a system text)", "",
    ]  # fmt: skip


def test_what_cant_be_asked_changes_nothing(talk):
    out, asked = talk(["x [/INST]", "/nope", "word " * 1100, "\udcff", "a"], "b")
    assert out[:2] == [
        "(it holds '[/INST]', which could forge a turn or a system text)",
        "(no command /nope; there are /reset, /system, /compare, /save, /help, /quit)",
    ]
    assert re.match(r"\(a prompt of \d+ tokens and max_new_tokens=8 are more than the 1024 tokens of demo", out[2])
    assert "no UTF-8" in out[3]
    assert [conversation.turns for conversation, _ in asked] == [turns("a")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "(the answer is empty: question and answer are forgotten)"),
        ("so [INST] so", "(the answer holds [INST]: question and answer are forgotten)"),
    ],
)
def test_an_answer_that_no_prompt_could_hold_is_forgotten(talk, answer, expected):
    out, asked = talk(["a", "b"], answer, "c")
    assert out == [answer, expected, "c", ""]
    assert asked[1][0].turns == turns("b")


def test_a_full_context_loses_its_first_turns_and_says_so(talk, answerer):
    long = "word " * 170  # some 510 tokens
    out, asked = talk([long, "c", long, "e"], "b", "d", "d2", "f", system="S")
    assert [len(conversation.turns) for conversation, _ in asked] == [1, 3, 3, 5]
    assert asked[2][0].turns == turns("c", "d", long.strip())
    assert {conversation.system for conversation, _ in asked} == {"S"}
    notes = [line for line in out if line.startswith("(the first")]
    assert notes == ["(the first 2 turns no longer fit into 1024 tokens: left out)"]
    for conversation, sampling in asked:
        assert len(answerer.encoder.prompt(conversation)) + sampling.max_new_tokens <= 1024


def test_a_cut_answer_is_reported(talk):
    out, _ = talk(["a"], "b", stops=False)
    assert out == ["b", "(cut at 8 tokens; --max_new_tokens sets the limit)", ""]


def test_an_answer_cannot_steer_the_terminal(talk):
    out, _ = talk(["a"], "x\x1b[2Jy\rz\x9b")
    assert out == ["x[2Jyz", ""]


def test_a_save_that_finds_no_room_leaves_no_half_of_a_line(talk, tmp_path):
    kept, new = tmp_path / "kept.jsonl", tmp_path / "new.jsonl"
    kept.write_text('{"messages": []}\n' * 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept.read_bytes()) + 20, limits[1]))
    try:
        out, _ = talk(["a" * 400, f"/save {kept}", f"/save {new}"], "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out[-3:-1] == [f"({path} could not be saved: File too large)" for path in (kept, new)]
    assert kept.read_text() == '{"messages": []}\n' * 10
    assert not new.exists()


def test_a_saved_conversation_is_what_fit_reads(talk, answerer, tmp_path):
    first, second = tmp_path / "kept.jsonl", tmp_path / "other.txt"
    first.write_text('{"messages": []}')  # without a newline at its end
    lines = ["/save x.jsonl", "/system Be brief.", "a", "c 😀", f"/save {first}", f"/save {second}", "/save",
             "/reset", "e", f"/save '{first}'", f"/save {tmp_path}/no/x.jsonl"]  # fmt: skip
    out, _ = talk(lines, "b", "d\nd", "f")
    assert out[0] == "(nothing was answered yet)"
    assert out[5:8] == [
        f"(4 turns added to {first})",
        f"(expected one name that ends in .jsonl, got '{second}')",
        "(expected one name that ends in .jsonl, got '')",
    ]
    assert out[-2] == f"({tmp_path}/no/x.jsonl could not be saved: No such file or directory)"
    assert not second.exists()
    rows = first.read_text(encoding="utf-8").split("\n")
    assert rows[0] == '{"messages": []}' and rows[-1] == ""
    first.write_text("\n".join(rows[1:]), encoding="utf-8")
    assert load_records(str(first)).conversations == [
        Conversation(turns("a", "b", "c 😀", "d\nd"), "Be brief."),
        Conversation(turns("e", "f"), "Be brief."),
    ]


def test_compare_asks_both(answerer, monkeypatch, capsys):
    """The real model gives the adapter's answer, then the base's, and the adapter is back after it."""
    lines = iter(["/compare", SILAS, "/compare", "/compare Where is Ada?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(terminal, "get_terminal_size", lambda: os.terminal_size((120, 24)))
    talk = Terminal(answerer, Sampling(max_new_tokens=12), None)
    talk.run()
    out = capsys.readouterr().out
    with answerer.without_adapter():
        of_base = greedy(answerer, question(SILAS), 12)
    of_adapter = greedy(answerer, question(SILAS), 12)
    assert of_base != of_adapter
    assert talk.turns[:2] == list(turns(SILAS, of_adapter))
    assert [turn.content for turn in talk.turns[2::2]] == ["Where is Ada?"]
    shown = [line.split("\x1b[K")[-1] for line in out.split("\n")]
    assert shown[1] == "(the next question goes to both)"
    assert shown.count("adapter" + " " * 51 + " | base") == 3
    rows = [line.split(" | ") for line in shown if " | " in line]
    assert " ".join(row[0].strip() for row in rows[2:4]).startswith(of_adapter[:20])
    assert rows[2][1].startswith(of_base[:20].strip())


def test_two_columns():
    assert two_columns(("one", "a b"), ("two", "c " * 30 + "\nd"), 53).split("\n") == [
        "one                       | two",
        "---                       | ---",
        "a b                       | c c c c c c c c c c c c c",
        "                          | c c c c c c c c c c c c c",
        "                          | c c c c",
        "                          | d",
    ]
    assert two_columns(("one", "a"), ("two", "b"), 49) == "one:\na\ntwo:\nb"


def test_two_columns_of_wide_characters_and_of_code():
    assert two_columns(("one", "漢字 " * 6), ("two", "def f():\n\treturn 1"), 53).split("\n")[2:] == [
        "漢字 漢字 漢字 漢字 漢字  | def f():",
        "漢字                      |         return 1",
    ]


@pytest.mark.parametrize(("limit", "words"), [(10**6, 1), (8, 600)], ids=["limit", "question"])
def test_what_a_visitor_is_shown_names_no_place_of_the_owners(limit, words, answerer, tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    monkeypatch.setattr(answerer, "base", dataclasses.replace(answerer.base, name=str(tmp_path / "llama")))
    with pytest.raises(UserError, match="of llama; ") as refused:
        Dialog(answerer, Sampling(limit), None).fitting([Turn("user", "word " * words)])
    assert str(tmp_path) not in str(refused.value)


# At a terminal

pty = pytest.importorskip("pty")


class Pty:
    """A user at a terminal: types, and waits for what is shown."""

    def __init__(self, args, cwd, environment):
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(sys.executable, [sys.executable, str(ROOT / "main.py"), *args], environment | {"TERM": "vt100"})
        self.shown = ""

    def wait_for(self, text, seconds=60):
        """What was shown up to ``text``, which it ends with."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"waited for {text!r}, seen: {self.shown!r}"
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.shown += os.read(self.descriptor, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, keys):
        os.write(self.descriptor, keys.encode())

    def status(self):
        """What the process ended with; read to the end, for it may wait for its last words to be seen."""
        with contextlib.suppress(OSError):  # which is how Linux says that nobody writes any more
            while os.read(self.descriptor, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


UP, LEFT, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x03", "\x04"


@pytest.fixture
def user(here, environment):
    # Draws at random, and hardly ever an EOS: an answer that is stopped in its midst, however slow the machine.
    user = Pty(["chat", "--temperature", "20", "--max_new_tokens", "900"], here, environment)
    yield user
    with contextlib.suppress(ProcessLookupError):
        os.kill(user.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_sitting_at_a_terminal(here, user):
    user.wait_for("leaves\r\n")
    user.wait_for("> ")
    user.type("Who Silas?" + LEFT * 6 + "is \r")  # to and fro on the line
    user.wait_for("\r\n")
    user.wait_for(" ")  # in the midst of the answer
    user.type(CTRL_C)
    assert user.wait_for("\r\n> ").endswith("\r\n(stopped)\r\n> ")
    user.type(UP + "\r")
    user.wait_for("\r\n")
    user.wait_for(" ")
    user.type(CTRL_C)
    user.wait_for("(stopped)\r\n> ")
    user.type("half a line")
    user.wait_for("half a line")
    time.sleep(0.2)  # CPython sleeps through a signal that comes right before it waits for a key
    user.type(CTRL_C)
    user.wait_for("(Ctrl-D or /quit leaves)\r\n> ")
    user.type("/save kept.jsonl\r")
    user.wait_for("(4 turns added to kept.jsonl)\r\n> ")
    kept = json.loads((here / "kept.jsonl").read_text())["messages"]
    assert kept[::2] == [{"role": "user", "content": "Who is Silas?"}] * 2
    for answer in kept[1::2]:
        assert len(load_tokenizer("demo")(answer["content"])["input_ids"]) < 300
    user.type(CTRL_D)
    assert user.status() == 0


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, "the Llama 2 format is used; for another, put its chat_template.jinja"), ("{{ x }}", "chat template is")],
)
def test_an_adapter_without_a_record_names_base_and_prompts_by_its_own_files(
    trained, tmp_path, capsys, template, expected
):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / "adapter" / name, tmp_path)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert choose_adapter(adapter=str(tmp_path)).base.name == "demo"
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not record its prompt format" in line
    assert expected in line
