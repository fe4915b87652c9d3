"""The chat format in Jinja and in Go: what they render, and what they refuse. The ids are tests/data's."""

import json

import pytest
from jinja2 import Environment

from lit_qlora.text.formats import make_format
from lit_qlora.text.llama2 import INST_TAGS


class RefusedError(Exception):
    pass


def jinja(messages, system=None):
    def refuse(text):
        raise RefusedError(text)

    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(make_format(system=system).chat_template())
    return template.render(messages=messages, bos_token="<s>", eos_token="</s>", raise_exception=refuse)


def said(*contents, system=None):
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)
    ]


def test_a_dialog_as_text():
    assert jinja(said(" a\n", "b", "c", system="S")) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n a [/INST] b </s><s>[INST] c [/INST]"
    )


def test_the_system_text_of_training_stands_where_none_is_brought():
    own = 'say "\\n"\n\N{SLIGHTLY SMILING FACE}'
    assert jinja(said("a"), own) == f"<s>[INST] <<SYS>>\n{own}\n<</SYS>>\n\na [/INST]"
    assert jinja(said("a", system="S"), own) == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]"


@pytest.mark.parametrize("mark", [*INST_TAGS, "<s>", "</s>"])
@pytest.mark.parametrize("messages", [said("x{}y"), said("a", "{}", "b"), said("a", system="{}")])
def test_what_could_forge_a_turn_is_refused(mark, messages):
    hostile = json.loads(json.dumps(messages).replace("{}", mark))
    with pytest.raises(RefusedError, match="could forge a turn"):
        jinja(hostile)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system", "assistant"], ["user", "system"]])
def test_turns_that_do_not_alternate_are_refused(roles):
    with pytest.raises(RefusedError, match="must alternate"):
        jinja([{"role": role, "content": "a"} for role in roles])
