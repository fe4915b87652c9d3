import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lit_qlora.text import guanaco, messages
from lit_qlora.text.conversation import Conversation, Turn
from tests.expect import check_line

REAL = Path(__file__).parents[2].parent / "shared" / "real" / "guanaco"


def said(*contents: str, system: str | None = None) -> Conversation:
    turns = (Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(contents))
    return Conversation(tuple(turns), system)


def read(text: str) -> Conversation:
    return messages.parse(guanaco.parse(text)).conversation


def render(conversation: Conversation) -> str:
    """The row that `guanaco.parse` reads, if no turn holds a marker or ends on an opening quotation mark."""
    text = "".join(
        f"### {'Human' if turn.role == 'user' else 'Assistant'}: {turn.content.strip()}" for turn in conversation.turns
    )
    return f"{conversation.system.strip()}\n{text}" if conversation.system else text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("### Human: hi### Assistant: yo", said("hi", "yo")),
        ("### Human: hi", said("hi")),
        ("### Human: hi### Assistant:\n", said("hi")),
        ("### Human: a### Assistant: b### Human: c", said("a", "b", "c")),
        ("### Human: hi ### Assistant: yo", said("hi", "yo")),
        ("\n### Human:\nhi\n\n### Assistant:\nyo\n", said("hi", "yo")),
        ("### Human: ## a\n### b### Assistant:### yo", said("## a\n### b", "### yo")),
        ('### Human: say "hi"### Assistant: "yo"### Human: ok', said('say "hi"', '"yo"', "ok")),
        ("### Human: run\n```\nls\n```### Assistant: yo", said("run\n```\nls\n```", "yo")),
        (
            '### Human: what is "### Assistant:" for?### Assistant: it marks, as `### Human:` does',
            said('what is "### Assistant:" for?', "it marks, as `### Human:` does"),
        ),
        ("A kind helper.\n### Human: hi### Assistant: yo", said("hi", "yo", system="A kind helper.")),
        ("### System: Be kind.### Human: hi### Assistant: yo", said("hi", "yo", system="Be kind.")),
        ("\n### System:\nBe kind.\n### Human: hi### Assistant: yo", said("hi", "yo", system="Be kind.")),
        ("### System:### Human: hi### Assistant: yo", said("hi", "yo")),
        ("### Human: hi### Human: hello### Assistant: yo", said("hi\n\nhello", "yo")),
        ("### Human: hi### Assistant: a### Assistant: b", said("hi", "a\n\nb")),
        ("No ### System: here### Human: hi### Assistant: yo", said("hi", "yo", system="No ### System: here")),
    ],
)
def test_rows_are_read_by_the_rule_of_markers(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no '### Human:'"]),
        ("### human: hi", ["no '### Human:'"]),
        ("### Assistant: yo", ["only the assistant"]),
        ("### User: hi\n### Assistant: yo", ["no '### Human:'", "before '### Assistant:'"]),
        ("### Instruction: hi ### Assistant: a ### Human: b", ["no '### Human:'", "before '### Assistant:'"]),
        ("### Human: ### Assistant: yo", ["turn 1", "user", "empty"]),
        ("### Human: hi### Assistant:\n### Human: c", ["turn 2", "assistant", "empty"]),
    ],
)
def test_what_is_no_conversation_is_refused(text, words):
    with pytest.raises(ValueError) as caught:
        read(text)
    check_line(str(caught.value), *words)


def test_rendered():
    assert render(said(" a ", "b", "c")) == "### Human: a### Assistant: b### Human: c"
    assert render(said("a", "b", system="s")) == "s\n### Human: a### Assistant: b"


@given(data=st.data())
def test_what_is_rendered_is_read_back(conversations, data):
    conversation = data.draw(conversations)
    assume(not any(re.search(r"""(^|\s)["'`“„«]$""", turn.content) for turn in conversation.turns))
    assert read(render(conversation)) == conversation


@pytest.mark.skipif(not REAL.is_dir(), reason="no real rows beside the checkout")
def test_every_real_row_is_read_and_written_back():
    lines = (REAL / "openassistant_best_replies_eval_first259.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    found = [read(row) for row in rows]
    assert [render(conversation) for conversation in found] == rows
    assert Counter(len(conversation.turns) for conversation in found) == {2: 132, 4: 60, 3: 37, 5: 27, 6: 3}
    assert not any(conversation.system for conversation in found)
