"""The verb inspect, as a user gives it: true figures, faults that are named with their rows, nothing written."""

import errno
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lit_qlora import demo
from lit_qlora.cli import main
from lit_qlora.columns import columns
from lit_qlora.data import batching
from lit_qlora.data.encode import Encoder
from lit_qlora.data.faults import KINDS
from lit_qlora.storage.files import SaveError
from lit_qlora.tools.inspecting.verdict import Judge
from lit_qlora.wording import number_of
from tests.data.talks import write
from tests.llama3_like import write_base
from tests.small_bases import save_base


@pytest.fixture
def inspect(capsys, monkeypatch, tmp_path):
    """Runs the verb in an empty folder; returns its lines."""
    monkeypatch.chdir(tmp_path)

    def inspect(*args, status=0):
        capsys.readouterr()
        found = main(["inspect", *args])
        shown = capsys.readouterr()
        assert found == status, shown
        assert (shown.err == "") == (status < 2)
        lines = (shown.out or shown.err).rstrip("\n").split("\n")
        # A path stays whole, in a line of its own where it has to.
        assert status == 2 or max(columns(line) for line in lines if not re.fullmatch(r" *\S*/\S*", line)) <= 80
        return lines

    return inspect


def talk(*said: str, system: str | None = None, **more: object) -> dict[str, object]:
    """A row of messages, the user first."""
    rows = [{"role": "system", "content": system}] if system else []
    rows += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(said)]
    return {"messages": rows, **more}


GOOD = [talk(f"What is {number}?", f"It is {number}.") for number in range(30)]
CHATML = Path(__file__).parents[1] / "templates" / "chatml.jinja"


def figures(lines: list[str]) -> dict[str, list[int]]:
    """The table at the top: a title, training, held out."""
    found = (re.fullmatch(r"(.{30}) *([\d,]+) *([\d,]+)", line) for line in lines)
    return {one[1].strip(): [int(value.replace(",", "")) for value in one.groups()[1:]] for one in found if one}


def section(lines: list[str], beginning: str) -> list[str]:
    """The lines from the one with this beginning to the next blank one."""
    start = next(number for number, line in enumerate(lines) if line.startswith(beginning))
    return lines[start : lines.index("", start)]


def test_bare_it_shows_the_demo_and_finds_nothing_wrong(inspect, tmp_path):
    lines = inspect()
    assert figures(lines) == {
        "rows": [848, 84],
        "left out": [0, 0],
        "conversations in batches": [848, 84],
        "of them cut": [0, 0],
        "turns": [2056, 180],
        "tokens before any cut": [39738, 3565],
        "tokens in batches": [39738, 3565],
        "answer tokens, learned": [14666, 1329],
    }
    assert "  batch_size 4                             212       212      2.1%  <- this run" in lines
    assert "  the whole run: 212 steps" in lines
    assert lines[-2].startswith("verdict: as it should be")
    # Where the checkout's path is long, what follows it stands on the next line.
    assert "train.jsonl:3 (training): 43 tokens, 16 learned" in " ".join(line.strip() for line in lines)
    assert [*tmp_path.iterdir()] == []


def test_rows_are_shown_token_by_token(inspect):
    write("a.jsonl", *GOOD, talk("Who is </s> it?", "Ada.\n", "And\t漢?", "\x1b[2J"))
    lines = inspect("--data.source", "a.jsonl", "--row", "31", "--data.validation_share", "0.04")
    start = next(number for number, line in enumerate(lines) if line.startswith("a.jsonl:31 (training)"))
    shown = lines[start + 1 : lines.index("", start)]
    assert shown[0].startswith("  ignored  «<s>»| |[|I|N|S|T|]| ")
    text = "".join(line[11:] for line in shown[:-1]).replace("|", "")
    assert text == (
        "«<s>» [INST] Who is </s> it? [/INST] Ada. «</s>»«<s>» [INST] And⇥<0xE6><0xBC><0xA2>? [/INST] \\x1b[2J «</s>»"
    )
    assert [line[2:9] for line in shown if line[2:9].strip() in ("learned", "ignored")] == ["ignored", "learned"] * 2


# What is wrong


def planted(*rows: object) -> str:
    return write("a.jsonl", *GOOD[:15], *rows, *GOOD[15:])


LONG = "word " * 200
FAULTS = {
    "an answer that is cut": (talk("q", f"a {LONG}"), "end", "answer 1 is cut: the row has"),
    "a prompt that leaves no room for an answer": (talk(LONG, "a"), "nothing", "its prompt takes"),
    "an empty answer": (talk("q", " "), "unread", "a turn of the assistant is empty"),
    "nothing answered": (talk("q"), "nothing", "nothing answered"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "q"}]}, "unread", "wizard"),
    "a tag that forges a turn": (talk("q [/INST] yes", "a"), "unread", "[/INST]"),
    "half a character": (talk("q \ud800", "a"), "unread", "half a character"),
    "a space as sentencepiece writes it": (talk("q", "a▁b"), "lost", "'a▁b ' comes back as 'a b '"),
    "no object": ("hello", "unread", "expected an object"),
}


@pytest.mark.parametrize(("row", "kind", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_row(row, kind, words, inspect):
    lines = inspect("--data.source", planted(row), status=1)
    start = next(number for number, line in enumerate(lines) if line.endswith(f"(--accept {kind})"))
    assert lines[start] == f"{number_of(1, KINDS[kind])} (--accept {kind})"
    said = " ".join(line.strip() for line in lines[start + 1 :])
    assert said.startswith("a.jsonl:16: ") and words in said and said.endswith("verdict: 1 row is not as it should be")
    assert inspect("--data.source", "a.jsonl", "--accept", kind)[-2].startswith("verdict: as it should be")


def test_each_of_many_faults_is_named_with_its_row_and_why(inspect):
    """Even where fit refuses the file, for more than one row in ten is none."""
    rows = [row for good, (row, *_) in zip(GOOD, FAULTS.values(), strict=False) for row in (good, row)]
    lines = inspect("--data.source", write("a.jsonl", *rows), "--data.validation_share", "0.1", status=1)
    text = " ".join(line.strip() for line in lines)
    for number, (_, _, words) in enumerate(FAULTS.values(), 1):
        assert re.search(rf"a\.jsonl:{2 * number}: (turn \d: )?[^:]*{re.escape(words)}", text), words
    assert "fit refuses a source of which more than one row in ten can't be read" in text
    assert text.endswith(f"verdict: {len(FAULTS)} rows are not as they should be")
    for more in (["--accept", "unread"], ["--data.strict", "true"]):
        assert "a.jsonl:6: turn 2: a turn of the assistant is empty" in inspect(
            "--data.source", "a.jsonl", *more, status=2)[0]  # fmt: skip


def test_what_fit_says_of_format_and_rows_is_said_here_too(inspect):
    """The base has a template of its own; files and options that are not used are named on the page, too."""
    Path("many").mkdir()
    for name in ("train", "validation", "more"):
        write(f"many/{name}.jsonl", *(talk(f"{name} {number}?", "Yes.") for number in range(12)))
    write_base(Path("base"))
    share, base = ["--data.validation_share", "0.2"], ["--model.base", "base", "--data.max_length", "200"]
    lines = inspect("--data.source", "many", *share, *base, "--html", "a.html")
    text = " ".join(line.strip() for line in lines)
    assert "not read of many: more.jsonl held out: many (validation) validation_share 0.2 is not used, for " in text
    assert "the base has a chat template of its own, which data.template base takes" in text
    page = Path("a.html").read_text(encoding="utf-8")
    for words in ("not read of many: more.jsonl", "validation_share 0.2 is not used", "a chat template of its own"):
        assert words in page


def test_where_no_row_can_be_read_it_is_refused_as_by_fit(inspect):
    source = write("a.jsonl", *({"x": number} for number in range(30)))
    assert "a.jsonl:1: no column" in inspect("--data.source", source, status=2)[0]


def test_a_question_that_nobody_answered_is_not_too_long(inspect):
    text = " ".join(line.strip() for line in inspect("--data.source", planted(talk("q")), status=1))
    assert "a.jsonl:16: nothing answered where nothing is answered, mend or delete them" in text


def test_what_is_held_out_of_a_small_file_is_named(inspect):
    source = write("a.jsonl", *(talk(f"q{number}", f"a{number}") for number in range(6)))
    lines = inspect("--data.source", source)
    assert "training: a.jsonl" in lines
    assert [line for line in lines if re.fullmatch(r"held out: a\.jsonl, held out \(a\.jsonl:[1-6]\)", line)]


def test_several_rows_are_all_named(inspect):
    source = write("a.jsonl", *(talk(f"q{number}", f"{number} {LONG}") for number in range(40)))
    text = " ".join(line.strip() for line in inspect("--data.source", source, status=1))
    named = {*map(int, re.findall(r"a\.jsonl:(\d+): answer 1 is cut", text))}
    named |= {*map(int, re.search(r"also a\.jsonl: ([\d, ]+)", text)[1].replace(",", "").split())}
    assert named == {*range(1, 41)}


def base_with(tmp_path: Path, change) -> str:
    """A copy of the demo's base, with another tokenizer.json."""
    folder = shutil.copytree(demo.BASE, tmp_path / "base")
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(rules)
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    return str(folder)


def test_a_token_that_text_makes_is_named(inspect, monkeypatch):
    """The encoder here takes a special token's spelling for the token, as tokenizers do unless they are asked."""
    monkeypatch.setattr(
        Encoder, "_encode", lambda self, texts: self.tokenizer(texts, add_special_tokens=False).input_ids
    )
    lines = inspect("--data.source", planted(talk("What is </s> for?", "An end.")), status=1)
    start = lines.index("1 row whose text makes the id of a special token (--accept special)")
    assert lines[start + 1] == "    a.jsonl:16: '</s>', id 2, in '] What is </s> for? '"


def test_characters_that_a_tokenizer_changes_are_named(inspect, tmp_path):
    def lower(rules):
        rules["normalizer"] = {"type": "Lowercase"}

    base = base_with(tmp_path, lower)
    source = write(
        "a.jsonl", *(talk(f"what is {number}?", f"it is {number}.") for number in range(3)), talk("q", "Ada")
    )
    args = ["--model.base", base, "--data.source", source, "--data.max_length", "160"]
    text = " ".join(line.strip() for line in inspect(*args, status=1))
    assert "4 rows of which tokens lose something" in text  # [INST] is text, too
    assert "a.jsonl:4: '[INST] q [/' comes back as '[inst] q [/'" in text


def test_of_several_sources_each_says_what_it_gave_and_lost(inspect):
    write("a.jsonl", *GOOD[:12], talk("q", " "))
    write("b.jsonl", *(talk(f"Who is {number}?", "x") for number in range(8)), talk("q", "a", "and then?"))
    lines = inspect("--data.source", "[a.jsonl, b.jsonl]", "--row", "b.jsonl:2", "--html", "page.html", status=1)
    text = " ".join(" ".join(lines).split())
    assert figures(lines)["rows"][0] + figures(lines)["rows"][1] == 22
    given = [
        sum(map(int, re.findall(rf"^ +(\d+) of {name}(?:,|$)", "\n".join(lines), re.M)))
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert given == [12, 9]
    assert "of a.jsonl, 1 row left out" in text and "1 unanswered last turn dropped (b.jsonl" in text
    assert "a.jsonl:13: turn 2: a turn of the assistant is empty" in text
    assert any(line.startswith("b.jsonl:2 (") for line in lines)
    assert "of a.jsonl, 1 row left out" in Path("page.html").read_text(encoding="utf-8")


def test_a_letter_and_its_accent_are_one_character_or_two(inspect, tmp_path):
    def compose(rules):
        rules["normalizer"] = {"type": "NFC"}

    config = json.loads((demo.BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = write("a.jsonl", *GOOD[:3], talk("Cafe\u0301?", "Gro\u0308\u00dfe."))
    args = ["--data.source", source, "--data.max_length", "160"]
    base = base_with(tmp_path, compose)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # Llama's class has no normalizer
    Path(base, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert inspect("--model.base", base, *args)[-2].startswith("verdict: as it should be")
    rules = json.loads(Path(base, "tokenizer.json").read_text(encoding="utf-8"))
    Path(base, "tokenizer.json").write_text(json.dumps({**rules, "normalizer": {"type": "NFKC"}}), encoding="utf-8")
    write("a.jsonl", *GOOD[:3], talk("q", "\ufb01ne"))
    text = " ".join(line.strip() for line in inspect("--model.base", base, *args, status=1))
    assert "a.jsonl:4: '\ufb01ne ' comes back as 'fine '" in text


def test_a_base_whose_turns_end_in_another_token_than_eos(inspect, tmp_path):
    write_base(tmp_path / "l3")
    source = write("a.jsonl", *GOOD[:3], talk("a", "b", "c", "d"))
    args = ["--model.base", "l3", "--data.source", source, "--data.max_length", "512"]
    lines = inspect(*args, "--data.template", "base", "--row", "4")
    assert lines[-2].startswith("verdict: as it should be")
    assert lines.count("  learned  b|«<|eot_id|>»") == lines.count("  learned  d|«<|eot_id|>»") == 1


def test_a_base_without_bos_needs_none(inspect, tmp_path):
    save_base(tmp_path / "qwen", "qwen2.5", "qwen")
    source = write("a.jsonl", *GOOD[:3], talk("a", "b", "c", "d"))
    args = ["--model.base", "qwen", "--data.source", source, "--data.max_length", "256", "--data.template", "chatml"]
    lines = inspect(*args, "--row", "4")
    assert lines[-2].startswith("verdict: as it should be")
    assert any(line.startswith("  ignored  «<|im_start|>»|user|") for line in lines)


def test_plain_text_is_learned_whole(inspect):
    source = write("a.jsonl", *({"text": f"{number} is a number."} for number in range(5)))
    lines = inspect("--data.source", source, "--data.train_on", "all", "--row", "2")
    assert "  ignored  «<s>»" in lines and lines[-2].startswith("verdict: as it should be")


def test_a_long_plain_text_is_divided_and_is_as_it_should_be(inspect):
    source = write("a.jsonl", *({"text": f"{number} is a number. " * 20} for number in range(5)))
    options = ["--data.source", source, "--data.train_on", "all", "--data.max_length", "32"]
    lines = inspect(*options)
    assert lines[-2].startswith("verdict: as it should be")
    assert "texts longer than data.max_length 32, divided" in " ".join(" ".join(lines).split())
    assert [line.split() for line in lines if line.startswith("  of them cut")] == [["of", "them", "cut", "0", "0"]]
    before, within = (next(line.split()[-2:] for line in lines if line.startswith(f"tokens {words}"))
                      for words in ("before any cut", "in batches"))  # fmt: skip
    assert before == within
    for more in (["--data.batch_tokens", "64"], ["--data.batch_tokens", "64", "--data.packing", "true"]):
        assert inspect(*options, *more)[-2].startswith("verdict: as it should be")


def test_a_bar_counts_the_rows(inspect, monkeypatch):
    bars = []

    def bar(label, iterable, total, **_):
        seen = list(iterable)
        bars.append((label, total, len(seen)))
        return seen

    monkeypatch.setattr("lit_qlora.tools.inspecting.look.progress_bar", bar)
    source = write("a.jsonl", *({"prompt": f"{number}?", "completion": "b"} for number in range(20)))
    inspect("--data.source", source)
    assert bars == [("training rows", 19, 19), ("held out rows", 1, 1)]


TURN = (
    "{{ '### ' ~ message['role'] ~ ': ' ~ message['content'] ~ (eos_token if message['role'] == 'assistant') ~ '\n' }}"
)
PROMPT = "{% if add_generation_prompt %}{{ '### assistant:' }}{% endif %}"
LOOP = f"{{% for message in messages %}}{TURN}{{% endfor %}}{PROMPT}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "it begins with none"),
        ("{{ bos_token ~ bos_token }}" + LOOP, "another one is token 2"),
        (
            "{{ bos_token }}"
            + LOOP.replace("'### assistant:'", "bos_token ~ '### assistant:'").replace(
                "{{ '### '", "{{ (bos_token if message['role'] == 'assistant') ~ '### '"
            ),
            "another one is token",
        ),
    ],
    ids=["none", "two", "inside"],
)
def test_a_template_with_other_than_one_bos_is_named(template, words, inspect):
    Path("a.jinja").write_text(template)
    source = write("a.jsonl", *GOOD[:4])
    lines = inspect("--data.source", source, "--data.template", "a.jinja", status=1)
    text = " ".join(line.strip() for line in lines)
    assert f"4 {KINDS['bos']} (--accept bos) a.jsonl:" in text and words in text
    assert "verdict: 4 rows are not as they should be" in text


@pytest.mark.parametrize("bos", ["{{ bos_token }}", "{% if not loop.index0 % 2 %}{{ bos_token }}{% endif %}"])
def test_one_bos_for_a_text_or_for_each_prompt_is_as_it_should_be(bos, inspect):
    is_first = not bos.startswith("{%")
    template = bos + LOOP if is_first else LOOP.replace("{{ '### ' ~ m", bos + "{{ '### ' ~ m")
    Path("a.jinja").write_text(template)
    source = write("a.jsonl", *GOOD[:4], talk("a", "b", "c", "d"))
    lines = inspect("--data.source", source, "--data.template", "a.jinja", "--rows", "0")
    assert lines[-2].startswith("verdict: as it should be")


def test_a_template_that_teaches_no_end_is_refused_as_by_fit(inspect):
    Path("a.jinja").write_text("{{ bos_token }}" + LOOP.replace("eos_token if", "'' if"))
    (line,) = inspect("--data.source", write("a.jsonl", *GOOD), "--data.template", "a.jinja", status=2)
    assert line.startswith("error: data.template: ") and "EOS" in line and "never learns to stop" in line


def test_a_system_text_that_a_template_drops_is_named(inspect):
    turns = LOOP.replace("{% for", "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}{% for")
    Path("a.jinja").write_text("{{ bos_token }}" + turns)
    lines = inspect("--data.source", planted(talk("q", "a", system="Be kind.")), "--data.template", "a.jinja", status=1)
    text = " ".join(line.strip() for line in lines)
    assert (
        "1 row that can't be learned from (--accept unread) a.jsonl:16: with a conversation of 2 turns and a system"
        in text
    )
    assert "is written 0 times" in text


def test_what_is_meant_to_be_so_is_counted_and_no_fault(inspect):
    rows = [
        {"messages": [*talk("q", "a")["messages"][:1], {"role": "assistant", "content": "a", "weight": 0}]},
        talk("What is </s> for?", "An end."),
        talk("q", "a", "and then?"),
        talk("q", "a", id=3),
    ]
    lines = inspect("--data.source", planted(*rows))
    text = " ".join(" ".join(section(lines, "dropped, cut, not used")).split())
    for words in (
        "1 row left out: no answer is to be learned",
        "1 unanswered last turn dropped",
        "column 'id' (1)",
        "1 row with a special token spelled out, learned as letters alone, such as </s> in a.jsonl:17",
    ):
        assert words in text
    assert lines[-2].startswith("verdict: as it should be")


def test_rows_that_a_column_names_for_another_split_are_counted_and_no_fault(inspect):
    rows = [talk(f"q{number}", f"a{number}", split="dev" if number % 3 else "train") for number in range(12)]
    lines = inspect("--data.source", planted(*rows))
    text = " ".join(" ".join(section(lines, "dropped, cut, not used")).split())
    assert "8 rows left out: column 'split' says validation" in text
    assert lines[-2].startswith("verdict: as it should be")


def test_what_stands_otherwise_in_a_batch_is_named(inspect, monkeypatch):
    """The batches themselves are looked at, not what they should hold."""
    collate = batching.collate

    def shifted(examples, *others):
        examples = [(row, {**example, "labels": example["input_ids"]}) for row, example in examples]
        return collate(examples, *others)

    monkeypatch.setattr(batching, "collate", shifted)
    lines = inspect("--data.source", write("a.jsonl", *GOOD[:4]), status=1)
    assert f"4 {KINDS['question']} (--accept question)" in lines
    assert f"4 {KINDS['batch']} (--accept batch)" in lines


TOKENS = ["--data.batch_tokens", "256"]


@pytest.mark.parametrize("options", [[], TOKENS, [*TOKENS, "--data.packing", "true"]], ids=range(3))
def test_each_way_of_batching_is_read_as_it_is(options, inspect, monkeypatch):
    """An end that a batch leaves out is missed in it, packed or padded."""
    source = write("a.jsonl", *GOOD[:9], talk("q", "a", "b", "c"))
    assert inspect("--data.source", source, *options, "--rows", "0")[-2].startswith("verdict: as it should be")
    collate = batching.collate

    def without_ends(examples, *others):
        examples = [(row, {**example, "labels": [*example["labels"][:-1], -100]}) for row, example in examples]
        return collate(examples, *others)

    monkeypatch.setattr(batching, "collate", without_ends)
    lines = inspect("--data.source", source, *options, "--rows", "0", status=1)
    assert f"10 {KINDS['end']} (--accept end)" in lines


def test_padding_that_is_learned_is_named(inspect, monkeypatch):
    collate = batching.collate

    def learns_padding(examples, *others):
        batch = collate(examples, *others)
        width = batch.input_ids.shape[1]
        is_short = batch.input_ids[0, -1] == 0
        if not is_short:
            return batch
        more = torch.tensor([width - 2])
        return batch._replace(
            positions=torch.cat([batch.positions, more]), targets=torch.cat([batch.targets, more * 0])
        )

    monkeypatch.setattr(batching, "collate", learns_padding)
    source = write("a.jsonl", *GOOD[:3], talk("q", "a much longer answer " * 3))
    assert any(
        "with other tokens or labels in their batch than encoded" in line
        for line in inspect("--data.source", source, status=1)
    )


# Doubles


def test_doubles_are_named_with_both_rows(inspect):
    said = "The harbour of Umberby was built long ago, of grey stone, by people who came from Morrow in ten boats"
    held_out = write(
        "held.jsonl",
        talk("Where is it?", said),
        talk("And when?", f"{said}, all of them blue."),
        talk("What is 7?", "Eight."),
    )
    train = [*GOOD[:9], talk("where is it", f"  {said.upper()}!!"), talk("And when?", f"{said}, most of them blue.")]
    lines = inspect("--data.source", write("a.jsonl", *train), "--data.validation_source", held_out)
    assert [re.sub(" +", " ", line.strip()) for line in section(lines, "held-out conversations that")[1:]] == [
        "the same words 1",
        "held.jsonl:1 is like a.jsonl:10",
        "nearly the same words 1",
        "held.jsonl:2 is like a.jsonl:11",
        "the same first question, another answer 1",
        "held.jsonl:3 is like a.jsonl:8",
    ]


# Figures


def test_the_ways_of_batching_come_to_what_a_fit_does(inspect):
    """Steps as many as the run that is chosen in its turn has."""
    source = write("a.jsonl", *(talk("q", "word " * (number % 17 + 1)) for number in range(90)))
    common = [
        "--data.source",
        source,
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.max_epochs",
        "1",
        "--rows",
        "0",
    ]
    found = {}
    for line in section(inspect(*common), "batches of an epoch"):
        one = re.match(r"  (batch_\w+) ([\d,]+)(, packing)? +([\d,]+) +([\d,]+) +[\d.]+%", line)
        if one:
            found[(one[1], bool(one[3]))] = (one[2].replace(",", ""), int(one[5]))
    assert len(found) == 3
    for (name, packed), (value, steps) in found.items():
        lines = inspect(*common, f"--data.{name}", value, "--data.packing", str(packed).lower())
        assert f"  the whole run: {steps} steps" in lines
        (chosen,) = (line for line in lines if line.endswith("<- this run"))
        assert f" {steps} " in chosen


def test_only_the_steps_heed_a_limit(inspect):
    lines = inspect("--trainer.limit_train_batches", "5", "--trainer.max_epochs", "2")
    assert figures(lines)["conversations in batches"] == [848, 84]
    assert "  the whole run: 10 steps, with 5 of 212 micro-batches per epoch" in lines


def test_the_histogram_counts_every_conversation_and_marks_the_cap(inspect):
    rows = [*GOOD, talk("q", LONG), talk("q", LONG * 3)]
    lines = section(inspect("--data.source", write("a.jsonl", *rows), status=1), "length in tokens")
    cap = next(number for number, line in enumerate(lines) if line.startswith("  ---"))
    counts = [
        sum(int(one[1]) for line in some if (one := re.match(r" +[\d,]+ to +[\d,]+ +(\d+)", line)))
        for some in (lines[:cap], lines[cap:])
    ]
    assert counts == [30, 2]
    assert re.search(r"data\.max_length 160: 2 are longer, [\d,]+ tokens fall off", lines[-1])


# What is refused


@pytest.mark.parametrize(
    ("args", "option", "words"),
    [
        (["--rows", "-1"], "rows", "0 or more"),
        (["--row", "77"], "row", "no such row"),
        (["--row", "first"], "row", "a row's number, or FILE:NUMBER"),
        (["--row", "b.jsonl:1"], "row", "no such row"),
        (["--row", "31"], "row", "a turn of the assistant is empty"),
        (["--accept", "end,nonsense"], "accept", "nonsense"),
        (["--html", "a.jsonl"], "html", "no page of an inspection"),
        (["--html", "nowhere/a.html"], "html", "no folder"),
        (["--html", "."], "html", "file"),
        (["--data.max_lenght", "9"], None, "max_length"),
    ],
    ids=range(10),
)
def test_a_mistake_is_one_line(args, option, words, inspect):
    source = write("a.jsonl", *GOOD, talk("q", " "))
    before = Path(source).read_bytes()
    (line,) = inspect("--data.source", source, *args, status=2)
    assert words in line and (option is None or f"{option}: " in line)
    assert Path(source).read_bytes() == before


@pytest.mark.parametrize("row", ["3", "a.jsonl:3", "./a.jsonl:3"])
def test_a_row_is_found_by_its_number(row, inspect):
    lines = inspect("--data.source", write("a.jsonl", *GOOD), "--row", row)
    assert sum(line.startswith("a.jsonl:") for line in lines) == 1
    assert any(line.startswith("a.jsonl:3 (") for line in lines)


# The page

HOSTILE = "</div><script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\"> & &lt;b&gt;"


class Page(HTMLParser):
    """Collects what a page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.text, self.classes = list[str](), "", list[str]()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes += [value or "" for name, value in attrs if name == "class"]
        assert not [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_a_row_of_several_faults_of_a_kind_is_one_row_in_the_lines_and_on_the_page(inspect, monkeypatch):
    faults = Judge.faults
    monkeypatch.setattr(Judge, "faults", lambda *args: [one for one in faults(*args) for _ in range(2)])
    lines = inspect("--data.source", planted(talk("q", f"a {LONG}")), "--html", "page.html", status=1)
    assert any(line.startswith("1 row with an answer whose end is not learned (") for line in lines)
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<h3>row with an answer whose end is not learned: 1</h3>" in page
    assert page.count("answer 1 is cut: the row has ") == 2
    lines = inspect("--data.source", "a.jsonl", "--accept", "end", "--html", "page.html")
    accepted = "accepted: rows with an answer whose end is not learned: 1"
    assert accepted in lines and accepted in Path("page.html").read_text(encoding="utf-8")
    inspect("--accept", "end", "--html", "page.html")
    assert "accepted: " not in Path("page.html").read_text(encoding="utf-8")


def test_a_page_that_can_not_be_written_names_its_option(tmp_path, monkeypatch, capsys):
    def full(path, *_):
        raise SaveError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_qlora.tools.inspect.write_file", full)
    assert main(["inspect", "--data.source", write("a.jsonl", *GOOD), "--html", "page.html"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: html: page.html could not be saved: No space left on device (")


def test_the_page_holds_it_all_and_no_markup_of_the_rows(inspect, tmp_path):
    source = planted(talk(HOSTILE, f"a {LONG}"), {"messages": [{"role": "<script>stolen</script>", "content": "q"}]})
    status = {"status": 1}
    lines = inspect("--data.source", source, "--row", "16", "--html", "page.html", **status)
    assert lines[-1] == "page: page.html"
    page = Page()
    page.feed(Path("page.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "link", "iframe"} & {*page.tags}
    assert {"learned", " special", "verdict bad", "over"} <= {*page.classes}
    assert "<script>document.title='stolen'</script>" in page.text.replace("\n", "")
    assert "a.jsonl:16: answer 1 is cut" in page.text
    assert "2 rows are not as they should be" in page.text and "<script>stolen" in page.text
    assert "prefers-color-scheme: dark" in page.text
    inspect("--data.source", source, "--html", "page.html", **status)  # its own page may be written anew
    assert "a.jsonl:1 (training)" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page_and_runs_nothing_of_it(inspect, tmp_path):
    inspect("--data.source", planted(talk(HOSTILE, "a")), "--row", "16", "--html", "page.html")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    shown = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "<title>What is learned | lit-qlora inspect</title>" in shown
    page = Page()
    page.feed(shown)
    assert "script" not in page.tags and "as it should be" in page.text
