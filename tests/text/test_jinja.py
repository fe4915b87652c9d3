"""Jinja chat templates render as in transformers, in its sandbox; a mistake names its line."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lit_qlora.text import jinja

TEMPLATES = sorted((Path(__file__).parents[1] / "templates").glob("*.jinja"))
TALK = [
    {"role": role, "content": content}
    for role, content in (("user", "a <b> & 'c'"), ("assistant", "é\n{{ x }}"), ("user", "🙂"), ("assistant", "d"))
]


def test_a_template_that_asks_for_the_date_has_an_error_of_its_own():
    with pytest.raises(jinja.ClockError, match=r"^line 1 can't be rendered: strftime_now gives different prompts"):
        render("{{ strftime_now('%d') }}")
    with pytest.raises(ValueError, match="strftime_now gives") as caught:
        render("{{ raise_exception('strftime_now gives different prompts each day; write a date, or none') }}")
    assert type(caught.value) is jinja.RefusalError


def render(source, messages=TALK, add_generation_prompt=False):
    return jinja.render(jinja.compile_template(source), messages, "<s>", "</s>", add_generation_prompt)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_text_is_transformers_own(path, count):
    source = path.read_text(encoding="utf-8")
    theirs, _ = render_jinja_template(
        [TALK[:count]], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert [render(source, TALK[:count], True)] == theirs


def test_an_undefined_name_holds_nothing_as_in_transformers():
    """SmolLM3's template asks what the system text holds, before it knows whether there is one."""
    source = "{% if '/x' in system_message %}a{% else %}b{% endif %}{% if '/x' not in system_message %}c{% endif %}"
    theirs, _ = render_jinja_template([TALK], chat_template=source)
    assert [render(source)] == theirs == ["bc"]


def test_the_names_that_templates_lean_on():
    source = (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ {'ä': 1} | tojson }}{% if tools %}x{% endif %}"
        "{% if custom is defined or messages[0].tool_calls %}y{% endif %}"
    )
    assert render(source) == '3{"ä": 1}'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }", "line 2 is no valid Jinja: unexpected '}'"),
        ("\n\n{% if %}", "line 3 is no valid Jinja: Expected an expression, got 'end of statement block'"),
        (
            "{% for m in messages %}{{ m }}",
            "line 1 is no valid Jinja: Unexpected end of template. Jinja was looking for",
        ),
        ("a\n{{ x | unheard }}", "line 2 is no valid Jinja: No filter named 'unheard'."),
        (" \n", "expected a Jinja chat template, got nothing"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "it is nested too deeply"),
        ("{% if 1 %}" * 500 + "{% endif %}" * 500, "it is nested too deeply"),
        ("{{ " + "[" * 150 + "]" * 150 + " }}", "it is nested too deeply"),
    ],
)
def test_what_is_no_template_is_refused(source, message):
    with pytest.raises(ValueError) as caught:
        jinja.compile_template(source)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{{ bos }}", "line 2 can't be rendered: 'bos' is undefined"),
        ("{{ bos_token ~ bos }}", "line 1 can't be rendered: 'bos' is undefined"),
        (
            "\n\n{{ messages[0].contents | trim }}",
            "line 3 can't be rendered: 'dict object' has no attribute 'contents'",
        ),
        ("{% for m in mesages %}{% endfor %}", "line 1 can't be rendered: 'mesages' is undefined"),
        ("a\n{{ raise_exception('not so') }}", "line 2 can't be rendered: not so"),
        ("{{ messages[9].content }}", "line 1 can't be rendered: list object has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "line 1 can't be rendered: access to attribute '__class__' of 'str' object is"),
        ("{{ messages.append(1) }}", "line 1 can't be rendered: access to attribute 'append' of 'list' object is"),
        ("{% include 'x' %}", "line 1 can't be rendered: no loader for this environment specified"),
        (
            "{{ strftime_now('%d') }}",
            "line 1 can't be rendered: strftime_now gives different prompts each day; write a",
        ),
        ("{{ range(10**9) | list }}", "line 1 can't be rendered: Range too big."),
    ],
)
def test_what_can_t_be_rendered_is_refused(source, message):
    with pytest.raises(ValueError) as caught:
        render(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
