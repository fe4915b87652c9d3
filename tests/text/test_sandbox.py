"""A chat template that would take forever, or fill the memory, is refused at once; what templates do is left alone."""

import time

import pytest

from lit_qlora.text import jinja
from tests.expect import check_line

TALK = [{"role": "user", "content": "a {12345} %*d"}, {"role": "assistant", "content": "b"}]


def render(source, messages=TALK):
    return jinja.render(jinja.compile_template(source), messages, "<s>", "</s>", True)


BITS = "it computes a number of more than 20,000 bits"
LONG = "it loops or calls too often"
LARGE = "it makes something of more than 1,000,108 characters"
WIDE = "it writes a format with a field of five digits or more"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LONG),
        ("{% set r = range(999) %}" + "{% for i in r %}" * 3 + "x" + "{% endfor %}" * 3, LONG),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", LONG),
        ("{{ 'a' * 10000000000 }}", LARGE),
        ("{{ 10000000000 * messages }}", LARGE),
        ("{{ 10 ** (10 ** 9) }}", BITS),
        ("{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", LARGE),
        ("{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", LARGE),
        ("{{ 'a'.ljust(10000000000) }}", LARGE),
        ("{{ 'a' | center(10000000000) }}", LARGE),
        ("{{ ('a' * 999999) | replace('a', 'b' * 999999) }}", LARGE),
        ("{{ ('a' * 999999).replace('a', 'b' * 999999) }}", LARGE),
        ("{{ (['a' * 99999] * 99999) | join }}", LARGE),
        ("{{ ''.join(['a' * 99999] * 99999) }}", LARGE),
        ("{% set x %}{% for i in range(9999) %}{{ 'abc' * 999999 }}{% endfor %}{% endset %}", LARGE),
        ("{{ '%9999999999d' % 1 }}", WIDE),
        ("{{ '%*d' % (9999999999, 1) }}", WIDE),
        ("{{ '%9999999999d' | format(1) }}", WIDE),
        ("{{ '{:9999999999}'.format(1) }}", WIDE),
        ("{{ '{0:{1}}'.format('a', 999999999) }}", WIDE),
        ("{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = 'ab' in x %}{% endfor %}", LONG),
        ("{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x == x[:] %}{% endfor %}", LONG),
        ("{% set x = 'a b ' * 99999 %}{% for i in range(99999) %}{% set y = x | title %}{% endfor %}", LONG),
        ("{% for i in range(99999) %}{% set x = 7 ** 300000 %}{% endfor %}", BITS),
        ("{{ [1] | slice(10 ** 9) | list }}", "it uses the filter slice, which chat templates have no need of"),
        ("{{ [1] | batch(10 ** 9, 0) | list }}", "it uses the filter batch, which chat templates have no need of"),
        ("{{ 'a b' | wordwrap(1, wrapstring='x' * 99999) }}",
         "it uses the filter wordwrap, which chat templates have no need of"),
        ("{{ [[1], [2]] | map('pprint') | join }}", "it uses the filter pprint, which chat templates have no need of"),
        ("{{ lipsum(n=10 ** 7) }}", "'lipsum' is undefined"),
        ("{{ cycler('a').next() }}", "'cycler' is undefined"),
        ("{{ '\\t'.expandtabs(10 ** 9) }}", "it calls expandtabs, which chat templates have no need of"),
        ("{{ ('a' * 9999).translate({97: 'b' * 99999}) }}", "it calls translate, which chat templates have no need of"),
        ("{{ (1).to_bytes(10 ** 9) }}", "it calls to_bytes, which chat templates have no need of"),
        ("{{ 'a'.encode().zfill(10 ** 9) }}", "it calls encode, which chat templates have no need of"),
        ("{{ ('{a}' * 9999).format_map({'a': 'x' * 9999}) }}", LARGE),
        ("{{ messages | tojson(indent=10 ** 9) }}", "it writes JSON with an indent or a separator of more than 64"),
        ("{{ messages | tojson(separators=('a' * 9999, 'b')) }}",
         "it writes JSON with an indent or a separator of more than 64"),
        ("{{ ('a\\n' * 9999) | indent(9999) }}", LARGE),
        ("{{ ('a\\n' * 9999) | indent('x' * 9999) }}", LARGE),
        ("{{ ('%(a)s' * 9999) % {'a': 'x' * 9999} }}", LARGE),
        ("{{ ('{0}' * 9999).format('x' * 9999) }}", LARGE),
        ("{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}", LONG),
        ("{% set n = namespace(l={}) %}{% for i in range(60) %}{% set n.l = {1: n.l, 2: n.l} %}{% endfor %}", LONG),
        ("{% set n = namespace(l=()) %}{% for i in range(60) %}{% set n.l = (n.l, n.l, 1) %}{% endfor %}", LONG),
        ("{% set n = namespace(l={}) %}{% for i in range(60) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}x", LONG),
        ("{% set n = namespace() %}{% for i in range(60) %}{% set n.l = namespace(a=n.l, b=n.l) %}{% endfor %}{{ n }}",
         "it writes a namespace"),
        ("{% set n = namespace(l=2) %}{% for i in range(999) %}{% set n.l = n.l * n.l %}{% endfor %}", BITS),
        ("{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}", LONG),
        ("{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}", LONG),
        ("{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x.find('b') %}{% endfor %}", LONG),
        ("{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x | upper %}{% endfor %}", LONG),
    ],
)  # fmt: skip
def test_what_would_take_forever_or_fill_the_memory_is_refused_with_its_line(source, problem, monkeypatch):
    monkeypatch.setattr(jinja, "MAX_WORK", jinja.MAX_WORK // 10)  # which shows as much, in less time
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^line") as caught:
        render("\n" + source)
    check_line(str(caught.value), problem, begins="line 2 ")
    assert time.monotonic() - start < 20  # a second or less, where nothing else runs


def test_a_text_that_grows_too_long_is_refused():
    with pytest.raises(ValueError, match="can't be rendered: it makes something of more than 1,000,108 characters"):
        render("{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 1 + 2 * 3 ** 2 }} {{ 'ab' * 3 }} {{ [1] * 2 }} {{ 2.5 * 2 }} {{ 2 ** -1 }}", "19 ababab [1, 1] 5.0 0.5"),
        ("{{ 'x' ~ 1 ~ 'y' }}{% if 'x' ~ 1 == 'x1' %}z{% endif %}{{ ('a' ~ 'b') | upper }}", "x1yzAB"),
        ("{{ '%s-%5d' % ('a', 1) }} {{ '{:>3}'.format('b') }} {{ '%d' | format(3) }}", "a-    1   b 3"),
        ("{{ messages[0].content.split('{')[1] }} {{ 'aba'.replace('a', 'c') }}", "12345} %*d cbc"),
        ("{{ messages | map(attribute='role') | join('+') }} {{ ','.join(['p', 'q']) }}", "user+assistant p,q"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for m in messages if m.role == 'user' %}{{ m.role }}{% else %}none{% endfor %}", "user"),
        ("{% for key, value in messages[0].items() %}{{ key }} {% endfor %}", "role content "),
        ("{% for a in [1, [2]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "12"),
        ("{% for m in messages[::-1] | reverse %}{{ m.role[0] }}{% break %}{% endfor %}", "u"),
        ("{{ messages[1:] | tojson }} {{ {'a': [1, 'x']} | tojson(indent=1) }}",
         '[{"role": "assistant", "content": "b"}] {\n "a": [\n  1,\n  "x"\n ]\n}'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first | title }}",
         "A {12345} %*d"),
        ("{{ [3, 1, 2] | sort | join(',') }} {{ {'b': 1, 'a': 2} | dictsort | first }}", "1,2,3 ('a', 2)"),
        ("{{ ['a', 'a'] | unique | list }} {{ 'x' | indent(2, true) }}", "['a']   x"),
        ("{% for a, b in [(1, 2), [3, 4]] %}{{ a ~ b }}{% endfor %}{% set (p, q) = (5, 6) %}{{ p }}{{ q }}", "123456"),
        ("{{ (messages[1:] | first).content }}{{ ('abc'[1:] ~ none ~ 1.5) }}", "bbcNone1.5"),
        ("{{ '{{\"a\": {} }}'.format(1) }} {{ '{\"a\": {\"b\": %s}}' % 2 }}", '{"a": 1 } {"a": {"b": 2}}'),
        ("{{ 'a' in 'abc' }}{{ 1 < 2 <= 3 }}{{ messages[0].role != 'x' and 'x' not in 'abc' }}", "TrueTrueTrue"),
        ("{% if 'x' in features %}x{% elif 'x' not in features %}none{% endif %}", "none"),
        ("{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}", "2"),
        ("{% if strftime_now is defined %}today{% else %}26 Jul 2024{% endif %}", "26 Jul 2024"),
    ],
)  # fmt: skip
def test_what_templates_do_is_left_alone(source, text):
    assert render(source) == text


def test_bounds_grow_with_what_is_said():
    talk = [{"role": "user", "content": "x" * 3_000_000}]
    source = "{% for m in messages %}{{ m.content | trim ~ m.content + m.content.strip() ~ m.content }}{% endfor %}"
    assert len(render(source, talk)) == 12_000_000
    many = [{"role": "user", "content": "x"}] * 5000
    assert len(render("{% for m in messages %}{{ m.content.strip().strip() }}{% endfor %}" + " " * 3000, many)) == 8000


def test_a_long_conversation_has_room_in_a_long_template():
    talk = [
        {"role": "user", "content": "x\n" * 2500},
        {"role": "assistant", "content": "</think>\n" + "y " * 2500},
    ] * 100
    source = "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\\n').rstrip() | trim %}"
    source += (
        "{% if c.startswith('x') and 'z' not in c and messages | length > 1 %}{{ '<' ~ c | replace('x', 'w') ~ '>' }}"
    )
    source += "{% else %}{{ c.replace('y', 'v') + eos_token }}{% endif %}{% endfor %}"
    assert len(render(source + "{# " + "long " * 1500 + "#}", talk)) > 900_000


def test_compiling_many_templates_uses_nothing_up():
    for number in range(30):
        jinja.compile_template("{{ '" + "x" * 500_000 + "' }}" + str(number))
    assert render("{{ 'x' * 999999 }}") == "x" * 999999
