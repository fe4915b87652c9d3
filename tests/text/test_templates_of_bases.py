"""Chat templates of the shapes that published bases have: what is asked and learned, literally."""

from pathlib import Path
from typing import NamedTuple

import pytest

from lit_qlora.errors import UserError
from lit_qlora.text import jinja
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import SpecialTokens
from lit_qlora.text.own_template import Template
from tests.text.test_formats import by_ollama


class Shape(NamedTuple):
    """A template, its special tokens (BOS and EOS first), and a talk of two rounds as it writes it.

    In ``written``, what is learned stands between « and ».
    """

    source: str
    specials: tuple[str, ...]
    written: str
    system: str | None = None
    """The same talk's beginning with the system text ``S``; None where it takes none."""


LOOP = "{{ bos_token }}{% for m in messages %}"
CHATML = ("", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
ROLE = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
THOUGHTS = "<think>\n\n</think>\n\n"
SHAPES = {
    "mistral, spaces around": Shape(
        LOOP + "{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('user and assistant only') }}{% endif %}"
        "{% endfor %}",
        ("<s>", "</s>"),
        "<s> [INST] a [/INST]« b</s>» [INST] c [/INST]« d</s>»",
    ),
    "mistral, brackets as tokens": Shape(
        LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>[INST] a[/INST]« b</s>»[INST] c[/INST]« d</s>»",
    ),
    "gemma": Shape(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content | trim) + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n«b<end_of_turn>»\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n«d<end_of_turn>»",
    ),
    "llama 3.1": Shape(
        "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d') %}"
        "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' + system + "
        "'<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "(m.content | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«b<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«d<|eot_id|>»",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\nS<|eot_id|>",
    ),
    "phi 3": Shape(
        LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|user|>\na<|end|>\n<|assistant|>\n«b<|end|>»\n<|user|>\nc<|end|>\n<|assistant|>\n«d<|end|>»",
        "<|system|>\nS<|end|>\n<|user|>\n",
    ),
    "deepseek": Shape(
        LOOP + "{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        "{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ("<s>", "</s>"),
        "<s>User: a\n\nAssistant:« b</s>»User: c\n\nAssistant:« d</s>»",
        "<s>S\n\nUser: ",
    ),
    "smollm2, qwen 2.5: a system text by default": Shape(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + ROLE + "{% endfor %}" + ASKS + "{% endif %}",
        CHATML,
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "qwen 3: thoughts before the last answer, none if switched off": Shape(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n' + "
        "(m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}{% else %}" + ROLE
        + "{% endif %}{% endfor %}" + ASKS + "{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "qwen 3, as it finds the last answer": Shape(
        "{% set ns = namespace(open=true, last=messages|length - 1) %}{% for m in messages[::-1] %}"
        "{% set index = (messages|length - 1) - loop.index0 %}{% if ns.open and m.role == 'user' and m.content is "
        "string and not m.content.startswith('<tool_response>') %}{% set ns.open = false %}"
        "{% set ns.last = index %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% set thoughts = m.reasoning_content or '' %}{% set said = m.content %}"
        "{% if '</think>' in said %}{% set thoughts = said.split('</think>')[0] %}"
        "{% set said = said.split('</think>')[-1] %}{% endif %}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}"
        "{{ '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
        + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "smollm3 without its date: thoughts before each answer, none if switched off": Shape(
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' and not enable_thinking %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}{% else %}" + ROLE
        + "{% endif %}{% endfor %}" + ASKS + "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        CHATML,
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«b<|im_end|>»\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "deepseek r1, distilled: asks with thoughts opened, writes none; the last answer behind closed ones": Shape(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endfor %}{{ bos_token + ns.system }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end of sentence|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ("<|begin of sentence|>", "<|end of sentence|>", "<|User|>", "<|Assistant|>"),
        "<|begin of sentence|><|User|>a<|Assistant|>b<|end of sentence|>"
        f"<|User|>c<|Assistant|>{THOUGHTS}«d<|end of sentence|>»",
        "<|begin of sentence|>S<|User|>",
    ),
    "qwq: asks with thoughts opened, writes answers without; the last answer behind closed ones": Shape(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + "
        "m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% else %}" + ROLE + "{% endif %}{% endfor %}"
        + ASKS + "{{ '<think>\n' }}{% endif %}",
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "qwen 3, made to think: asks with thoughts opened, writes them before the last answer": Shape(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n' + "
        "(m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>\n' }}{% else %}" + ROLE
        + "{% endif %}{% endfor %}" + ASKS + "{{ '<think>\n' }}{% endif %}",
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "an own one whose answers hold their thoughts": Shape(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' + m.content + "
        "'<|im_end|>\n' }}{% else %}" + ROLE + "{% endif %}{% endfor %}" + ASKS + "{{ '<think>\n' }}{% endif %}",
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n«b<|im_end|>»\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n«d<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
    ),
    "smollm3: a date, a mode, thoughts before each answer, none if switched off": Shape(
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% set mode = '/think' if enable_thinking else '/no_think' %}"
        "{% if messages[0].role == 'system' %}{% set asked = messages[0].content %}"
        "{% set given = asked.replace('/think', '').rstrip() %}{% endif %}"
        "{% if '/override' in asked %}{{ given }}{% endif %}{% set given = given if given else '' %}"
        "{%- set today = strftime_now( \"%d-%B-%Y\" ) -%}"
        "{{ '<|im_start|>system\n## Metadata\nToday: ' ~ today ~ '\nMode: ' ~ mode ~ '\n' ~ given ~ "
        "'<|im_end|>\n' }}{% if xml_tools or tools %}{{ 'tools' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}" + ROLE + "{% elif m.role == 'assistant' %}"
        "{% generation %}{% if mode == '/think' %}" + ROLE + "{% else %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
        "{% endgeneration %}{% endif %}{% endfor %}" + ASKS
        + "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        CHATML,
        "<|im_start|>system\n## Metadata\nToday: 01-January-2026\nMode: /no_think\n<|im_end|>\n"
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«b<|im_end|>»\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}«d<|im_end|>»",
        "<|im_start|>system\n## Metadata\nToday: 01-January-2026\nMode: /no_think\nS<|im_end|>\n<|im_start|>user\n",
    ),
}  # fmt: skip
TALK = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate("abcd"))


def template_of(shape: Shape) -> Template:
    bos, eos, *_ = shape.specials
    return Template(source=shape.source, tokens=SpecialTokens(bos, eos, tuple(filter(None, shape.specials))))


def written(template: Template, conversation: Conversation) -> str:
    """The text of a conversation, with « and » around what is learned, as `Encoder` decides it."""
    last = len(conversation.turns) // 2 if template.learns_last_only(conversation) else 1
    text, answers, was_answer = "", 0, False
    for piece in [*template.pieces(conversation), None]:
        is_answer = piece is not None and piece.is_answer
        answers += is_answer and not was_answer
        text += "»" if was_answer and not is_answer and answers >= last else ""
        text += "«" if is_answer and not was_answer and answers >= last else ""
        text += piece.text if piece else ""
        was_answer = is_answer
    return text


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_asked_and_learned(name):
    shape = SHAPES[name]
    template = template_of(shape)
    template.check()
    assert written(template, Conversation(TALK)) == shape.written
    for turns in (1, 3):  # chat asks for it after the very text that came before it in training
        asked = "".join(piece.text for piece in template.pieces(Conversation(TALK[:turns])))
        before_last, _, _ = written(template, Conversation(TALK[: turns + 1])).rpartition("«")
        assert before_last.replace("«", "").replace("»", "") == asked
    if shape.system is None:
        assert any("can't write a system text" in line for line in template.notes())
    else:
        assert written(template, Conversation(TALK, "S")).startswith(shape.system)


def test_where_earlier_answers_are_written_otherwise_it_is_reported():
    reported = {
        name: [line for line in template_of(one).notes() if "only the last" in line] for name, one in SHAPES.items()
    }
    assert [name for name, lines in reported.items() if lines] == [name for name in SHAPES if "last answer" in name]


def test_a_user_who_publishes_the_template_asks_without_thoughts():
    """Whatever other programs say by default, the prompt is training's."""
    for shape in SHAPES.values():
        opening = template_of(shape).chat_template()
        assert opening.count("{%- set enable_thinking = false %}") == ("enable_thinking" in shape.source)


@pytest.mark.parametrize("source", [
    # A prompt that opens what is no thought.
    LOOP + ROLE + "{% endfor %}" + ASKS + "{{ '<answer>\n' }}{% endif %}",
    # Thoughts before the last answer, and a prompt that lacks them.
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and "
    "m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}{% endfor %}" + ASKS + "{% endif %}",
])  # fmt: skip
def test_what_no_prompt_leads_to_is_refused(source, expect_error):
    template = template_of(Shape(source, CHATML, ""))
    error = expect_error(template.check, "add_generation_prompt", option="data.template")
    assert isinstance(error, UserError)


@pytest.mark.parametrize("name", SHAPES)
def test_ollama_asks_in_the_form_that_was_learned_or_is_refused(name):
    template = template_of(SHAPES[name])
    if "last answer" in name:  # a prompt that differs from turn to turn
        with pytest.raises(ValueError, match="which Ollama's templates can't have"):
            template.modelfile(Path("x.gguf"))
        return
    for system in (None, "S") if SHAPES[name].system else (None,):
        for turns in (1, 3):
            asked = Conversation(TALK[:turns], system)
            assert by_ollama(template, asked) == "".join(piece.text for piece in template.pieces(asked))


THINKING = [name for name in SHAPES if "thoughts opened" in name]


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_that_a_prompt_opens_are_closed_for_others_too(name):
    """Published, the template asks as training did; and the report says so."""
    template = template_of(SHAPES[name])
    assert any("they are closed at once" in line for line in template.notes())
    for turns in (1, 3):
        asked = "".join(piece.text for piece in template.pieces(Conversation(TALK[:turns])))
        assert asked.endswith(f"{THOUGHTS}") and asked.count("<think>") == 1
        messages = [{"role": turn.role, "content": turn.content} for turn in TALK[:turns]]
        bos, eos, *_ = SHAPES[name].specials
        assert jinja.render(jinja.compile_template(template.chat_template()), messages, bos, eos, True) == asked
    closed = [line for one in SHAPES for line in template_of(SHAPES[one]).notes() if "closed at once" in line]
    assert len(closed) == len(THINKING)


def test_an_answer_whose_thoughts_the_template_takes_out_is_refused():
    template = template_of(SHAPES[THINKING[0]])
    with pytest.raises(ValueError, match="it changes messages"):
        template.pieces(Conversation((TALK[0], Turn("assistant", "so\n</think>\n\nb"))))


SMOLLM3 = SHAPES["smollm3: a date, a mode, thoughts before each answer, none if switched off"]


def test_a_date_that_is_always_today_s_is_one_day_for_all():
    """SmolLM3's template writes the date: what was learned would be asked otherwise on another day."""
    template = template_of(SMOLLM3)
    assert "always 01 January 2026" in " ".join(template.notes())
    published = template.chat_template()
    assert "strftime_now" not in published
    asked = "".join(piece.text for piece in template.pieces(Conversation(TALK[:1])))
    messages = [{"role": "user", "content": "a"}]
    assert jinja.render(jinja.compile_template(published), messages, "", "<|im_end|>", True) == asked
    # What an adapter records is the base's own template, from which the same follows again.
    assert template.source == SMOLLM3.source
    again = Template.from_record(template.record(), "adapter").of(template.spelled)
    assert again.pieces(Conversation(TALK)) == template.pieces(Conversation(TALK))
    # One that has a date of its own takes that.
    own = template_of(SHAPES["llama 3.1"])
    assert "26 Jul 2024" in "".join(piece.text for piece in own.pieces(Conversation(TALK[:1])))
    assert not any("date" in line for line in own.notes())


@pytest.mark.parametrize("clock", ["strftime_now(format)", "strftime_now('%d' ~ '%B')", "strftime_now | string"])
def test_a_date_whose_format_is_not_written_out_is_refused(clock, expect_error):
    source = (
        "{% set format = '%d' %}{{ '<|im_start|>system\n' + " + clock + " + '<|im_end|>\n' }}{% for m in messages %}"
    )
    template = template_of(Shape(source + ROLE + "{% endfor %}" + ASKS + "{% endif %}", CHATML, ""))
    expect_error(template.check, "strftime_now gives different prompts each day", option="data.template")
