"""Samples: the same prompts each time, what the base says once, and how each answer ended."""

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_qlora.callbacks.samples import SampleAnswers
from lit_qlora.errors import UserError
from lit_qlora.figures.lines import read_lines
from lit_qlora.figures.record import Record
from lit_qlora.storage.run import RunFolder
from lit_qlora.text.conversation import Conversation, Turn

EOS = 2


class FakeModule:
    """Answers each prompt with the ids that were prepared; knows whether its adapter is on."""

    def __init__(self, adapter=None, is_first=True):
        self.adapter, self.is_first = adapter, is_first
        self.base = SimpleNamespace(context_tokens=1024)
        self.is_on = True
        self.peft_model = self
        self.asked = []
        self.answers = {}

    @contextlib.contextmanager
    def by_first_alone(self):
        yield self.is_first

    @contextlib.contextmanager
    def disable_adapter(self):
        self.is_on = False
        yield
        self.is_on = True

    def answer(self, prompts, stop_ids, sampling, is_over):
        assert stop_ids == [EOS] and not is_over([9])
        self.asked.append((self.is_on, prompts, sampling))
        return [self.answers.get((self.is_on, prompt[0]), [9, EOS]) for prompt in prompts]


class FakeBoard(TensorBoardLogger):
    """Keeps what is shown."""

    def __init__(self):
        self.shown = []

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda tag, text, step: self.shown.append((tag, text, step)))

    def log_metrics(self, metrics, step=None):
        pass


class FakeData:
    """Held-out prompts "1", "2", …; a prompt's only id is its number, an answer's text are its ids."""

    encoder = SimpleNamespace(
        stop_ids=[EOS],
        is_over=lambda stop: None,
        answer=lambda ids, stop: (" ".join(str(number) for number in ids if number != EOS), ids[-1:] == [EOS]),
        prompt=lambda conversation: [int(conversation.turns[-1].content)],
    )

    def held_out_prompts(self, count):
        return [(Conversation((Turn("user", str(number)),)), "reference") for number in range(1, 12)][:count]


def test_how_samples_are_drawn_is_as_in_chat(fake):
    module = FakeModule()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    SampleAnswers(count=1, **options).on_validation_end(fake, module)
    assert {(False, (("max_new_tokens", 128), *options.items()))} == {
        (is_on, tuple((name, getattr(sampling, name)) for name in ("max_new_tokens", *options)))
        for is_on, _, sampling in module.asked
    }


@pytest.mark.parametrize(
    ("options", "option"),
    [({"top_k": -1}, "top_k"), ({"stop": [""]}, "stop"), ({"min_p": 0.1}, "min_p")],
)
def test_what_cant_be_drawn_by_is_refused_with_its_option(options, option):
    with pytest.raises(UserError) as caught:
        SampleAnswers(**options)
    assert caught.value.option == f"samples.{option}"


@pytest.fixture
def lines():
    return []


@pytest.fixture
def board():
    return FakeBoard()


@pytest.fixture
def fake(lines, board):
    recorder = SimpleNamespace(log_metrics=lambda figures, step: lines.append((step, figures)))
    return SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        is_global_zero=True,
        global_step=0,
        loggers=[recorder, board],
        datamodule=FakeData(),
    )


def ends(ended, cut, limit=128, **beyond):
    """The figures of so many answers."""
    counts = {"samples/ended": ended, "samples/cut": cut, "samples/max_new_tokens": limit, **beyond}
    return counts | {"samples/stopped_share": ended / (ended + cut + sum(beyond.values()))}


def test_answers_that_ended_and_answers_that_were_cut_are_counted_apart(fake, lines):
    module = FakeModule()
    module.answers = {(False, 1): [9, 9], (False, 2): [9, 9], (False, 3): [9, 9], (True, 1): [9, 9], (True, 4): [EOS]}
    samples = SampleAnswers(count=4, max_new_tokens=2)
    samples.on_validation_end(fake, module)
    fake.global_step = 5
    samples.on_validation_end(fake, module)
    assert lines == [(0, ends(1, 3, limit=2)), (5, ends(3, 1, limit=2))]


def test_an_answer_ends_where_the_bases_context_does(fake, lines, board):
    module = FakeModule()
    module.base.context_tokens = 3  # of which a prompt takes one
    fake.global_step = 5
    module.answers = {(True, 1): [9, EOS], (True, 2): [7, 8, 6], (True, 3): [7, 8, EOS]}
    SampleAnswers(count=3, max_new_tokens=3).on_validation_end(fake, module)
    assert lines == [(5, ends(1, 0, limit=3, **{"samples/cut_by_context": 2}))]
    assert [sampling.max_new_tokens for _, _, sampling in module.asked] == [2, 2]  # no token beyond it is waited for
    assert board.shown[0][1].splitlines()[2:] == [
        "| 1 | 9 | 9 |",
        "| 2 | 9 | 7 8 *(cut by the base's context)* |",
        "| 3 | 9 | 7 8 *(cut by the base's context)* |",
    ]


def test_the_table_says_which_answers_were_cut(fake, board):
    module = FakeModule()
    fake.global_step = 5
    module.answers = {(False, 1): [7, 8], (True, 2): [7, 8]}
    SampleAnswers(count=2, max_new_tokens=2).on_validation_end(fake, module)
    rows = board.shown[0][1].splitlines()[2:]
    assert rows == ["| 1 | 7 8 *(cut at 2 tokens)* | 9 |", "| 2 | 9 | 7 8 *(cut at 2 tokens)* |"]


def test_prompts_are_fixed_and_the_base_is_asked_once(fake):
    module = FakeModule()
    samples = SampleAnswers(count=3, max_new_tokens=17)
    for fake.global_step in (0, 5, 10):
        samples.on_validation_end(fake, module)
    prompts = [[1], [2], [3]]
    # Before the first step a new adapter changes nothing: the base's answers are all there is.
    assert [(is_on, asked) for is_on, asked, _ in module.asked] == [(False, prompts), (True, prompts), (True, prompts)]
    assert {(sampling.max_new_tokens, sampling.temperature) for *_, sampling in module.asked} == {(17, 0.0)}


def test_a_resumed_run_asks_the_base_anew(fake, lines):
    module = FakeModule()
    module.answers = {(False, 1): [9]}
    fake.global_step = 5
    SampleAnswers(count=1).on_validation_end(fake, module)
    assert [is_on for is_on, *_ in module.asked] == [False, True]
    assert lines == [(5, ends(1, 0))]


def test_an_adapter_that_is_trained_on_answers_before_the_first_step(fake, lines):
    module = FakeModule(adapter="some/adapter")
    module.answers = {(False, 1): [9]}
    SampleAnswers(count=1).on_validation_end(fake, module)
    assert lines == [(0, ends(1, 0))]


def test_prompts_of_ones_own_are_asked_instead(fake):
    module = FakeModule()
    SampleAnswers(count=3, prompts=["7", "8"]).on_validation_end(fake, module)
    assert [asked for _, asked, _ in module.asked] == [[[7], [8]]]


def test_many_prompts_are_asked_in_parts(fake, lines):
    module = FakeModule()
    SampleAnswers(count=10).on_validation_end(fake, module)
    assert [len(asked) for _, asked, _ in module.asked] == [8, 2]
    assert lines == [(0, ends(10, 0))]


def test_none_are_asked_with_a_count_of_zero(fake, lines):
    module = FakeModule()
    for fake.global_step in (0, 5):
        SampleAnswers(count=0).on_validation_end(fake, module)
    assert module.asked == lines == []


def test_only_fit_samples_and_only_the_first_device(fake):
    module, other = FakeModule(), FakeModule(is_first=False)
    fake.state.fn = "validate"
    SampleAnswers().on_validation_end(fake, module)
    fake.state.fn = "fit"
    SampleAnswers().on_validation_end(fake, other)
    assert module.asked == other.asked == []


def test_the_table_shows_prompt_base_and_adapter(fake, board):
    module = FakeModule()
    module.answers = {(False, 1): [10, EOS], (True, 1): [11, 12, EOS]}
    samples = SampleAnswers(count=2)
    for fake.global_step in (0, 5):
        samples.on_validation_end(fake, module)
    table = "| prompt | base | adapter |\n|---|---|---|\n| 1 | 10 | 11 12 |\n| 2 | 9 | 9 |"
    assert board.shown == [("samples", table, 5)]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("a\nb\n\nc", "a<br>b<br><br>c"),
        ("a\r\nb\rc", "a<br>b<br>c"),  # Markdown takes each for an end of line, and so of the row
        (r"a\|b", r"a\\\|b"),
    ],
)
def test_no_text_breaks_the_table(fake, board, monkeypatch, text, cell):
    monkeypatch.setattr(
        FakeData, "encoder", SimpleNamespace(**{**vars(FakeData.encoder), "answer": lambda *_: (text, True)})
    )
    fake.global_step = 5
    SampleAnswers(count=1).on_validation_end(fake, FakeModule())
    assert board.shown[0][1].splitlines() == [
        "| prompt | base | adapter |",
        "|---|---|---|",
        f"| 1 | {cell} | {cell} |",
    ]


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        ({"count": -1}, "samples.count", ["0", "got -1"]),
        ({"max_new_tokens": 0}, "samples.max_new_tokens", ["at least 1", "got 0"]),
        ({"prompts": ["a", " "]}, "samples.prompts", ["got ['a', ' ']"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options, option, words, expect_error):
    expect_error(lambda: SampleAnswers(**options), *words, option=option)


def test_each_validation_has_a_line_of_all_answers_whole(fake, tmp_path):
    module = FakeModule()
    module.answers = {(False, 1): [10, EOS], (True, 1): [11, 12]}
    run = RunFolder(tmp_path)
    fake.loggers = [Record(run)]
    samples = SampleAnswers(count=2, max_new_tokens=2)
    for fake.global_step in (0, 5):
        samples.on_validation_end(fake, module)
    fake.loggers[0].finalize("success")
    base = [
        {"prompt": "1", "base": {"text": "10", "cut_by": None}},
        {"prompt": "2", "base": {"text": "9", "cut_by": None}},
    ]
    adapter = [{"text": "11 12", "cut_by": "samples/cut"}, {"text": "9", "cut_by": None}]
    after = [row | {"adapter": answer} for row, answer in zip(base, adapter, strict=True)]
    assert [*read_lines(run.samples)] == [
        {"step": 0, "max_new_tokens": 2, "answers": base}, {"step": 5, "max_new_tokens": 2, "answers": after}
    ]  # fmt: skip


def test_a_terminal_sees_how_far_slow_answers_are(fake, monkeypatch):
    """Ten answers of at most 20 tokens are two rounds; each token takes half a second here."""
    now, terminal = [1000.0], io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)

    class Slow(FakeModule):
        def answer(self, prompts, stop_ids, sampling, is_over):
            for length in (1, 2, 3, 4):
                now[0] += 0.5
                assert not any(is_over([9] * size) for size in (length, 1))  # a shorter answer beside it
            return super().answer(prompts, stop_ids, sampling, is_over)

    module = Slow(adapter="one")
    SampleAnswers(count=10, max_new_tokens=20).on_validation_end(fake, module)
    shown = [part for part in terminal.getvalue().split("\r") if part.strip()]
    assert [part.split("| ")[1].split(" [")[0] for part in shown[:2]] == ["2/40", "3/40"]
    assert "answers:  60%" in terminal.getvalue() and "| 24/40 [" in terminal.getvalue()
    assert not terminal.getvalue().rstrip("\r").split("\r")[-1].strip()  # gone at the end
