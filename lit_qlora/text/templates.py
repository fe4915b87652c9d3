"""Owns prompt formats in other programs' template languages: Jinja for transformers and vLLM, Go for Ollama.

They must give the very ids that training had; of the Llama 2 format: BOS before each prompt, EOS after each answer,
every stretch between two of them encoded by itself. Knows no tokens.
"""

import json

from lit_qlora.text.llama2 import TAGS
from lit_qlora.text.own_template import Template

# A message that holds a tag could forge a turn; one that holds a special token would become it, for a template is
# text that is encoded as a whole. Training refuses the first and spells out the second; here both are refused.
_JINJA = """\
{%- set default_system = DEFAULT_SYSTEM %}
{%- for message in messages %}
{%- for tag in FORBIDDEN + [bos_token, eos_token] %}
{%- if tag in message['content'] %}{{ raise_exception('a message holds ' ~ tag ~ ', which could forge a turn') }}\
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else default_system %}
{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages %}
{%- for message in turns %}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
{{- raise_exception('user and assistant must alternate, the user first') }}
{%- endif %}
{%- if message['role'] == 'assistant' %}
{{- ' ' ~ (message['content'] | trim) ~ ' ' ~ eos_token }}
{%- elif loop.first and system %}
{{- bos_token ~ '[INST] ' ~ (('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message['content']) | trim) ~ ' [/INST]' }}
{%- else %}
{{- bos_token ~ '[INST] ' ~ (message['content'] | trim) ~ ' [/INST]' }}
{%- endif %}
{%- endfor %}
"""

# Stands before a template of the user's own, which sees the messages that this makes: as training had them.
_OPENING = """\
{%- set lit_qlora = namespace(said=[]) %}
{%- for message in messages %}
{%- for mark in FORBIDDEN %}
{%- if mark in message['content'] %}{{ raise_exception('a message holds ' ~ mark ~ ', which could forge a turn') }}\
{%- endif %}
{%- endfor %}
{%- if message['role'] != 'system' or (message['content'] | trim) %}
{%- set lit_qlora.said = lit_qlora.said + [{'role': message['role'], 'content': message['content'] | trim}] %}
{%- endif %}
{%- endfor %}
{%- if DEFAULT_SYSTEM and not (messages and messages[0]['role'] == 'system') %}
{%- set lit_qlora.said = [{'role': 'system', 'content': DEFAULT_SYSTEM}] + lit_qlora.said %}
{%- endif %}
{%- set messages = lit_qlora.said %}
"""

# llama.cpp puts BOS at the very start by itself, so only later prompts write it.
_GO = """\
{{- $later := false }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if $later }}<s>{{ end }}[INST] {{ if $later }}{{ else if $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}{{ $later = true }}{{ .Content }} [/INST]
{{- else if eq .Role "assistant" }} {{ .Content }} </s>
{{- end }}
{{- end }}"""


def jinja_template(system: str | None = None) -> str:
    """The ``chat_template`` of a tokenizer; ``system`` stands where a conversation brings none."""
    default = json.dumps(system, ensure_ascii=False) if system else "none"
    return _JINJA.replace("DEFAULT_SYSTEM", default).replace("FORBIDDEN", json.dumps(TAGS))


def published(template: Template, system: str | None = None) -> str:
    """The ``chat_template`` of a tokenizer for prompts that ``template`` wrote; ``system`` as in `jinja_template`.

    Whatever messages it is given, the prompts are training's: white space around a message goes, and one that holds a
    special token or a text of the template's own is refused.
    """
    forbidden = json.dumps([*template.tags, *template.specials], ensure_ascii=False)
    default = json.dumps((system or "").strip(), ensure_ascii=False)
    return _OPENING.replace("FORBIDDEN", forbidden).replace("DEFAULT_SYSTEM", default) + template.source


def modelfile(weights: str, system: str | None = None) -> str:
    """Ollama's ``Modelfile`` for the GGUF file ``weights``, a name beside it.

    Ollama's templates can't trim: white space around a message stays, which training took away.

    Raises:
        ValueError: when ``system`` holds three quotes, which a Modelfile has no way to write.
    """
    lines = [f"FROM ./{weights}", f'TEMPLATE """{_GO}"""']
    if system:
        if '"""' in system:
            raise ValueError("the system text holds three quotes, which a Modelfile can't hold")
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"
