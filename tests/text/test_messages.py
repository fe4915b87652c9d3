import pytest

from lit_qlora.text import messages
from lit_qlora.text.conversation import Conversation, Turn

ANSWERED = (Turn("user", "hi"), Turn("assistant", "yo"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("role", "user", "content", "hi")], Conversation((Turn("user", "hi"),))),
        (
            [("role", "user", "content", "hi"), ("role", "assistant", "content", "yo")],
            Conversation(ANSWERED),
        ),
        ([("from", "human", "value", "hi"), ("from", "gpt", "value", "yo")], Conversation(ANSWERED)),
        ([("from", "user", "value", "hi"), ("from", "assistant", "value", "yo")], Conversation(ANSWERED)),
        (
            [
                ("role", "system", "content", "be kind"),
                ("role", "user", "content", "hi"),
                ("role", "assistant", "content", "yo"),
            ],
            Conversation(ANSWERED, "be kind"),
        ),
        (
            [
                ("from", "system", "value", " "),
                ("from", "human", "value", "hi"),
                ("from", "gpt", "value", "yo"),
            ],
            Conversation(ANSWERED, None),
        ),
    ],
)
def test_both_dialects_are_read(rows, expected):
    assert messages.parse([{a: b, c: d} for a, b, c, d in rows]) == expected


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("hi", "expected a list of messages, got str"),
        ([], "a conversation needs at least one turn"),
        ([SYSTEM], "a conversation needs at least one turn"),
        ([USER, "yo"], "turn 2: expected an object with a role and a content, got str"),
        (
            [USER, {"role": "tool", "content": "yo"}],
            "turn 2: unknown role 'tool', expected one of system, user, human, assistant, gpt",
        ),
        (
            [{"content": "hi"}],
            "turn 1: unknown role None, expected one of system, user, human, assistant, gpt",
        ),
        (
            [{"role": ["user"], "content": "hi"}],
            "turn 1: unknown role ['user'], expected one of system, user, human, assistant, gpt",
        ),
        (
            [USER, {"role": "assistant", "content": None}],
            "turn 2: the assistant's content is text, got NoneType",
        ),
        ([{"role": "user"}], "turn 1: the user's content is text, got NoneType"),
        ([{"role": "system", "content": 3}, USER], "turn 1: the system's content is text, got int"),
        ([USER, {"role": "assistant", "content": " \n"}], "turn 2: a turn of the assistant is empty"),
        ([USER, ASSISTANT, {"from": "human", "value": ""}], "turn 3: a turn of the user is empty"),
        (
            [USER, {"role": "assistant", "content": "yo", "weight": 0.5}],
            "turn 2: its weight is 0.5, expected 0 (context only) or 1 (learned)",
        ),
        (
            [{**USER, "from": "gpt"}],
            "turn 1: role and from hold different things, expected one of the two",
        ),
        ([ASSISTANT], "turn 1 is the assistant's, expected the user's"),
        ([SYSTEM, USER, USER], "turns 1 and 2 are both the user's; join the two into one"),
        ([USER, ASSISTANT, ASSISTANT], "turns 2 and 3 are both the assistant's; join the two into one"),
        ([SYSTEM, SYSTEM, USER], "two messages of the system stand before the first turn; join the two into one"),
        ([USER, SYSTEM], "turn 2: the system speaks, which it may only before the first turn"),
    ],
)
def test_what_is_no_conversation_is_refused(rows, message):
    with pytest.raises(ValueError) as caught:
        messages.parse(rows)
    assert str(caught.value) == message


def test_a_long_role_is_cut():
    with pytest.raises(ValueError, match="unknown role") as caught:
        messages.parse([{"role": "x" * 1000, "content": "hi"}])
    assert len(str(caught.value)) < 120
