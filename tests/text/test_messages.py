import pytest

from lit_qlora.text import messages
from lit_qlora.text.conversation import Conversation, Turn
from tests.expect import check_line

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
    assert messages.parse([{a: b, c: d} for a, b, c, d in rows]) == (expected, (), (), ())


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("hi", ["a list of messages", "a text"]),
        ([], ["at least one turn"]),
        ([SYSTEM], ["at least one turn"]),
        ([USER, "yo"], ["turn 2", "an object", "a text"]),
        (
            [USER, {"role": "robot", "content": "yo"}],
            ["turn 2", "'robot'", "one of system, user, human, assistant, gpt, tool"],
        ),
        (
            [{"content": "hi", "by": "me"}],
            ["turn 1", "None", "['content', 'by']", "'role' and 'content'"],
        ),
        ([{"role": ["user"], "content": "hi"}], ["turn 1", "['user']"]),
        ([USER, {"role": "assistant"}], ["turn 2", "assistant", "null", "['role']", "'content'"]),
        ([USER, {"role": "assistant", "content": {"a": 1}}], ["turn 2", "assistant", "text", "one object"]),
        ([USER, {"role": "assistant", "content": [1]}], ["turn 2", "assistant", "text", "a list"]),
        ([{"role": "user", "text": "a"}], ["turn 1", "user", "null", "['role', 'text']", "'content'"]),
        ([{"role": "system", "content": 3}, USER], ["turn 1", "system", "text", "a number"]),
        ([USER, {"role": "assistant", "content": " \n"}], ["turn 2", "assistant", "empty"]),
        ([USER, ASSISTANT, {"from": "human", "value": ""}], ["turn 3", "user", "empty"]),
        ([USER, {"role": "assistant", "content": "yo", "weight": 0.5}], ["turn 2", "weight", "0.5", "0 ", "or 1 "]),
        ([{**USER, "from": "gpt"}], ["turn 1", "role and from", "one of the two"]),
        ([SYSTEM, ASSISTANT], ["only the assistant"]),
        ([USER, ASSISTANT, [1]], ["turn 3", "a role and a content", "a list"]),
    ],
)
def test_what_is_no_conversation_is_refused(rows, words):
    with pytest.raises(ValueError) as caught:
        messages.parse(rows)
    check_line(str(caught.value), *words)


def test_a_long_role_is_cut():
    with pytest.raises(ValueError, match="unknown role") as caught:
        messages.parse([{"role": "x" * 1000, "content": "hi"}])
    assert len(str(caught.value)) < 120


def turns(*contents: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if place % 2 else "user", content) for place, content in enumerate(contents))


@pytest.mark.parametrize(
    ("rows", "expected", "changed"),
    [
        ([USER, {"role": "user", "content": "you?"}, ASSISTANT], ["hi\n\nyou?", "yo"], [messages.JOINED["user"]]),
        ([USER, ASSISTANT, ASSISTANT, USER], ["hi", "yo\n\nyo", "hi"], [messages.JOINED["assistant"]]),
        ([ASSISTANT, USER, ASSISTANT], ["hi", "yo"], [messages.OPENING_LEFT_OUT]),
        ([ASSISTANT, ASSISTANT, USER], ["hi"], [messages.JOINED["assistant"], messages.OPENING_LEFT_OUT]),
        ([USER, {"role": "assistant", "content": None}, USER, ASSISTANT], ["hi\n\nhi", "yo"],
         [messages.WITHOUT_TEXT, messages.JOINED["user"]]),
        ([{"role": "user", "content": None}, ASSISTANT, USER, ASSISTANT], ["hi", "yo"], [messages.UNSEEN]),
        ([USER, ASSISTANT, {"role": "user", "content": None}, ASSISTANT], ["hi", "yo"], [messages.LAST_UNSEEN]),
        ([USER, ASSISTANT, {"role": "user", "content": float("nan")}, ASSISTANT], ["hi", "yo"], [messages.LAST_UNSEEN]),
    ],
)  # fmt: skip
def test_turns_of_one_role_are_joined_and_what_nobody_answers_is_left_out(rows, expected, changed):
    assert messages.parse(rows) == (Conversation(turns(*expected)), tuple(changed), (), ())


def test_messages_of_the_system_in_a_row_are_one_system_text():
    developer = {"role": "developer", "content": "be brief"}
    parsed = messages.parse([SYSTEM, developer, USER, ASSISTANT])
    assert parsed == (Conversation(ANSWERED, "be kind\n\nbe brief"), (messages.JOINED["system"],), (), ())
    assert messages.parse([developer, USER, ASSISTANT]) == (Conversation(ANSWERED, "be brief"), (), (), ())


def test_turns_that_are_joined_are_learned_only_if_each_is():
    rows = [USER, {**ASSISTANT, "weight": 0}, ASSISTANT, USER, ASSISTANT]
    parsed = messages.parse(rows)
    assert [turn.learned for turn in parsed.conversation.turns] == [True, False, True, True]
    assert parsed.changed == (messages.JOINED["assistant"], messages.PARTLY)
    both = [USER, {**ASSISTANT, "weight": 0}, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]
    assert messages.parse(both).changed == (messages.JOINED["assistant"],)


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        ("iA", ["image", messages.LAST_UNSEEN]),
        ("SiA", ["image", messages.LAST_UNSEEN]),
        ("iAiA", ["image", messages.LAST_UNSEEN]),
        ("AiA", ["image", messages.LAST_UNSEEN]),
        ("nA", [messages.LAST_UNSEEN]),
        ("n", [messages.LAST_UNSEEN]),
        ("c", [messages.CALLED]),
        ("ic", ["image", messages.CALLED, messages.LAST_UNSEEN]),
    ],
)
def test_where_no_question_has_a_text_nothing_is_left_and_it_is_counted(rows, changed):
    image = {"role": "user", "content": [{"type": "image", "image": "x"}]}
    known = {"i": image, "n": {**USER, "content": None}, "S": SYSTEM, "A": ASSISTANT}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    expected = tuple("rows with parts of type 'image', which are not learned" if x == "image" else x for x in changed)
    assert messages.parse([known.get(one, called) for one in rows]) == (None, expected, (), ())


def test_what_the_assistant_says_first_may_be_kept_after_a_turn_of_the_user_s():
    parsed = messages.parse([SYSTEM, ASSISTANT, USER], "(begins)")
    assert parsed == (Conversation(turns("(begins)", "yo", "hi"), "be kind"), (messages.OPENING_KEPT,), (), ())
    assert [turn.learned for turn in parsed.conversation.turns] == [False, True, True]
    assert messages.parse([ASSISTANT], "(begins)").conversation == Conversation(turns("(begins)", "yo"))
    assert messages.parse([USER, ASSISTANT], "(begins)") == (Conversation(ANSWERED), (), (), ())


@pytest.mark.parametrize("user", ["user", "human", "User", "HUMAN", "prompter"])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "model", "Bot", "Chatbot", "chatgpt", "AI"])
def test_roles_go_by_several_names(user, assistant):
    rows = [{"from": user, "value": "hi"}, {"from": assistant, "value": "yo"}]
    assert messages.parse(rows) == (Conversation(ANSWERED), (), (), ())


ASKED = {"role": "user", "content": "How warm is it?"}
REPLY = {"role": "assistant", "content": "18 degrees."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "warmth", "arguments": "{}"}}
WITH_RESULT = Conversation(turns("How warm is it?\n\n18", "18 degrees."))
TOOLS = (messages.CALLED, messages.ANSWERED_BY_TOOL)


@pytest.mark.parametrize(
    "rows",
    [
        [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "call_1", "name": "warmth", "content": "18"}, REPLY],
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "18"}, REPLY],
        [ASKED, {"role": "assistant", "tool_calls": [CALL]},
         {"role": "tool", "content": [{"type": "text", "text": "18"}]}, REPLY],
        [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "warmth", "arguments": "{}"}},
         {"role": "function", "name": "warmth", "content": "18"}, REPLY],
        [{"from": "human", "value": "How warm is it?"}, {"from": "function_call", "value": '{"name": "warmth"}'},
         {"from": "observation", "value": "18"}, {"from": "gpt", "value": "18 degrees."}],
        [{"from": "human", "value": "How warm is it?"}, {"from": "function-call", "value": '{"name": "warmth"}'},
         {"from": "function-response", "value": "18"}, {"from": "gpt", "value": "18 degrees."}],
    ],
    ids=["OpenAI", "blank", "no content", "functions", "ShareGPT", "Glaive"],
)  # fmt: skip
def test_a_tool_s_call_is_not_learned_and_its_result_stands_in_the_prompt(rows):
    assert messages.parse(rows)._replace(unused=()) == (WITH_RESULT, TOOLS, (), ())


def test_keys_of_tools_are_named_where_nothing_reads_them():
    result = {"role": "tool", "content": "18", "name": "warmth", "tool_call_id": "call_1", "tool_calls": [CALL]}
    rows = [{**ASKED, "function_call": CALL}, {"role": "assistant", "tool_calls": [CALL]}, result, REPLY]
    keys = ("function_call", "name", "tool_call_id", "tool_calls")
    assert messages.parse(rows).unused == tuple(f"key {key!r} of a turn" for key in keys)


def test_what_is_said_beside_a_call_is_learned_and_a_result_may_be_an_object():
    rows = [ASKED, {**ASSISTANT, "tool_calls": [CALL]}, {"role": "tool", "content": {"at": "noon", "is": 18}}, REPLY]
    expected = turns("How warm is it?", "yo", '{"at": "noon", "is": 18}', "18 degrees.")
    assert messages.parse(rows) == (Conversation(expected), TOOLS, (), ())


@pytest.mark.parametrize("content", ["42", ["42"], [{"type": "text", "text": "42"}]])
def test_a_tool_s_result_among_the_user_s_parts_stands_in_the_prompt(content):
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": content}]}
    read = messages.parse([USER, call, result, ASSISTANT])
    assert read.conversation == Conversation(turns("hi\n\n42", "yo"))
    assert messages.ANSWERED_BY_TOOL in read.changed
    assert "rows with parts of type 'tool_use', which are not learned" in read.changed
    nothing = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": None}]}
    assert messages.parse([USER, ASSISTANT, nothing, ASSISTANT]).conversation == Conversation(ANSWERED)


def test_a_tool_s_result_need_not_be_in_a_list_and_one_within_another_is_not_read():
    inner = {"type": "text", "text": "42"}
    read = messages.parse([{"role": "user", "content": {"type": "tool_result", "content": inner}}, ASSISTANT])
    assert read.conversation == Conversation(turns("42", "yo"))
    assert messages.ANSWERED_BY_TOOL in read.changed
    for _ in range(2000):
        inner = {"type": "tool_result", "content": [inner]}
    read = messages.parse([{"role": "user", "content": ["hi", inner]}, ASSISTANT])
    assert read.conversation == Conversation(turns("hi", "yo"))
    assert "rows with parts of type 'tool_result', which are not learned" in read.changed


def test_parts_of_a_content_are_joined_and_images_are_not_learned():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}
    words = [{"type": "text", "text": "Look."}, image, {"type": "input_text", "text": "What is it?"}]
    seen = ("rows with parts of type 'image_url', which are not learned",)
    rows = [{"role": "user", "content": words}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    assert messages.parse(rows) == (Conversation(turns("Look.\nWhat is it?", "yo")), seen, (), ())
    assert messages.parse([{"role": "user", "content": [image]}, ASSISTANT, USER, ASSISTANT]) == (
        Conversation(ANSWERED), (*seen, messages.UNSEEN), (), ()
    )  # fmt: skip
    # As parquet fills them up, and as they are without a type.
    filled = [{"type": "text", "text": "hi", "image_url": None}, {"type": "image", "text": None}]
    assert messages.parse([{"role": "user", "content": filled}, ASSISTANT]).conversation == Conversation(ANSWERED)
    for content in (["hi"], [{"text": "hi"}], {"type": "text", "text": "hi"}):
        assert messages.parse([{"role": "user", "content": content}, ASSISTANT]) == (Conversation(ANSWERED), (), (), ())


@pytest.mark.parametrize(
    "rows",
    [
        ["hi", "yo"],
        [{"input": "hi", "output": "yo"}],
        [{"human": "hi", "assistant": "yo"}],
        {"role": ["user", "assistant"], "content": ["hi", "yo"]},
        {"from": ["human", "gpt"], "value": ["hi", "yo"]},
    ],
)
def test_other_lists_of_turns_are_read(rows):
    assert messages.parse(rows) == (Conversation(ANSWERED), (), (), ())


def test_lists_of_other_lengths_lose_no_turn_in_silence():
    with pytest.raises(ValueError, match=r"one length.*'content': 3, 'role': 4"):
        messages.parse({"role": ["user", "assistant"] * 2, "content": ["a", "b", "c"]})


def test_keys_of_a_text_part_that_are_not_used_are_named():
    parts = [{"type": "text", "text": "b", "weight": 0, "index": None}, {"text": "c", "image_url": "x"}]
    rows = [USER, {"role": "assistant", "content": parts}, {"role": "user", "content": parts[0]}]
    parsed = messages.parse(rows)
    assert parsed.unused == ("key 'weight' of a part of a turn", "key 'image_url' of a part of a turn")


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("suaSua", ["u", "a", "S\n\nu", "a"]),
        ("suSa", ["u\n\nS", "a"]),
        ("uSaua", ["u\n\nS", "a", "u", "a"]),
        ("suaSSua", ["u", "a", "S\n\nS\n\nu", "a"]),
        ("suaSa", ["u", "a", "S", "a"]),
        ("suaS", ["u", "a", "S"]),
    ],
)
def test_what_the_system_says_later_stands_in_the_prompt(order, said):
    names = {"s": "system", "S": "system", "u": "user", "a": "assistant"}
    parsed = messages.parse([{"role": names[one], "content": one} for one in order])
    assert [turn.content for turn in parsed.conversation.turns] == said
    assert parsed.conversation.system == ("s" if order[0] == "s" else None)
    assert parsed.changed == (messages.SYSTEM_LATER,)


def test_a_system_text_that_is_given_twice_stands_once():
    parsed = messages.parse([SYSTEM, SYSTEM, {"role": "system", "content": "and brief"}, USER, ASSISTANT])
    assert parsed.conversation.system == f"{SYSTEM['content']}\n\nand brief"
    assert parsed.changed == (messages.SYSTEM_REPEATED, messages.JOINED["system"])


def test_a_system_text_that_is_repeated_before_each_turn_stands_once():
    rows = [SYSTEM, USER, {"role": "assistant", "content": "b"}] * 2
    parsed = messages.parse(rows)
    assert parsed.conversation.system == "be kind"
    assert len(parsed.conversation.turns) == 4
    assert parsed.changed == (messages.SYSTEM_REPEATED,)
    blank = messages.parse([*rows[:3], {"role": "system", "content": " "}, *rows[1:3]])
    assert (len(blank.conversation.turns), blank.changed) == (4, ())


def test_what_the_system_says_beside_an_image_is_no_question():
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    answer = {"role": "assistant", "content": "b"}
    later = {"role": "system", "content": "now"}
    parsed = messages.parse([USER, answer, later, image, answer])
    assert [turn.content for turn in parsed.conversation.turns] == [USER["content"], "b"]
    assert messages.LAST_UNSEEN in parsed.changed


def test_pairs_may_bring_a_system_text_and_say_what_is_learned():
    rows = [{"system": "be kind", "input": "a", "output": "b", "train": False}, {"input": "c", "output": "d", "id": 3}]
    parsed = messages.parse(rows)
    assert parsed == (Conversation(turns("a", "b", "c", "d"), "be kind"), (), ("key 'id' of a turn",), ())
    assert [turn.learned for turn in parsed.conversation.turns] == [True, False, True, True]


MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def user(*contents: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content} for content in contents]


@pytest.mark.parametrize(
    ("rows", "asked", "taken_off"),
    [
        (user("<s>a</s>", "<s>b</s>"), "a\n\nb", ("<s>", "</s>")),
        (user("<|im_start|>user\na<|im_end|>", "b"), "a\n\nb", ("<|im_start|>user", "<|im_end|>")),
        (user([{"type": "text", "text": "a</s>"}, {"type": "text", "text": "b</s>"}]), "a\nb", ("</s>",)),
        (user(["<s>", "a", "b"]), "a\nb", ("<s>",)),
        (user(("a</s>", "<s>b")), "a\n\nb", ("</s>", "<s>")),
        (user(("</s>", "b")), "b", ("</s>",)),
        (user("a</s>b", "c"), "a</s>b\n\nc", ()),
        ([*user("a"), {"role": "system", "content": "b</s>"}], "a\n\nb", ("</s>",)),
    ],
)
def test_marks_are_taken_off_each_text_before_it_is_joined(rows, asked, taken_off):
    parsed = messages.parse([*rows, ASSISTANT], marks=MARKS)
    assert (parsed.conversation, parsed.taken_off) == (Conversation(turns(asked, "yo")), taken_off)


def test_marks_are_taken_off_each_answer_system_text_and_result_of_a_tool():
    answers = [{"role": "assistant", "content": text} for text in ("yo</s>", "ho</s>")]
    parsed = messages.parse([*user("hi"), *answers], marks=MARKS)
    assert (parsed.conversation, parsed.taken_off) == (Conversation(turns("hi", "yo\n\nho")), ("</s>",))
    system = [{"role": "system", "content": text} for text in ("<s>be kind</s>", "be brief</s>", "</s>")]
    parsed = messages.parse([*system, USER, ASSISTANT], marks=MARKS)
    assert (parsed.conversation, parsed.taken_off) == (Conversation(ANSWERED, "be kind\n\nbe brief"), ("<s>", "</s>"))
    # The same again stands once, with or without its mark.
    later = [*system[:1], USER, ASSISTANT, {"role": "system", "content": "be kind"}, USER, ASSISTANT]
    assert messages.parse(later, marks=MARKS).changed == (messages.SYSTEM_REPEATED,)
    called = [
        *user("hi"),
        {"role": "function_call", "content": "f()"},
        {"role": "tool", "content": "20</s>"},
        ASSISTANT,
    ]
    parsed = messages.parse(called, marks=MARKS)
    assert (parsed.conversation, parsed.taken_off) == (Conversation(turns("hi\n\n20", "yo")), ("</s>",))


def test_a_text_of_nothing_but_marks_is_named_by_its_own():
    with pytest.raises(ValueError, match=r"^turn 2: the assistant holds nothing but </s>$"):
        messages.parse([*user("<s>hi"), {"role": "assistant", "content": " </s> </s>"}], marks=MARKS)
