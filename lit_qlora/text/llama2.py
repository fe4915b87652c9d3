"""Owns the Llama 2 chat format: conversations as the model and other programs see them.

`segments` is used by training and chat alike: BOS is before each prompt and EOS after each answer, as ids. Rows in
which both are written out are read by `llama2_rows`. Knows no file, no token ids.
"""

import hashlib
import json
from typing import Any

from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn
from lit_qlora.text.formats import Piece, PromptFormat

INST_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

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

_SAMPLE = Conversation((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")), "e")


class Llama2(PromptFormat):
    """The Llama 2 chat format, as Meta's code writes it; what each part does is `PromptFormat`'s."""

    name = "llama2-chat"
    opens_in_space = False
    title = "the Llama 2 format"
    version = title

    def _written(self, conversation: Conversation) -> list[Piece]:
        """`segments`, with BOS before each prompt and EOS after each answer."""
        pieces = []
        for text, is_answer in segments(conversation):
            said = Piece(text, is_answer, "stretch")
            pieces += [said, Piece(self.spelled.eos, True, "token")] if is_answer else [*self._begin, said]
        return pieces

    @property
    def tags(self) -> list[str]:
        """`INST_TAGS`, whatever the tokenizer."""
        return [*INST_TAGS]

    @property
    def identity(self) -> str:
        """The format's name, and a sha256 of the text that it makes of a sample."""
        return f"{self.name} {hashlib.sha256(repr(segments(_SAMPLE)).encode()).hexdigest()}"

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """The empty key, as before there were other formats: rows cached then are found again."""
        return ()

    def described(self, file: str) -> str:
        """The description, without the file, which this format does not need."""
        return "the Llama 2 chat format"

    def left_out(self, where: str, why: Exception) -> str:
        """The message without the place, since there is only one reason."""
        return "rows left out: a Llama 2 tag inside a turn"

    @property
    def assumption(self) -> str:
        """The words for an adapter without a chat template, with how to give another format."""
        return f"{self.title} is used; for another, put its chat_template.jinja there"

    def notes(self, of_base: str | None = None) -> list[str]:
        """A word on a base that was made for other prompts."""
        from lit_qlora.text.own_template import Template

        if of_base is None:
            return []
        try:
            own = Template(source=of_base, tokens=self.tokens)
            if _joined_text(own.pieces(_SAMPLE)) == _joined_text(self.of(own.spelled).pieces(_SAMPLE)):
                return []
        except (ValueError, UserError):  # no system text, or no use at all, which it says where it is asked for
            pass
        return [f"prompts in {self.title}; the base has a chat template of its own, which data.template base takes"]

    def chat_template(self) -> str:
        """The chat template, with BOS and EOS written out: a template's text is encoded as a whole."""
        default = json.dumps(self.system, ensure_ascii=False) if self.system else "none"
        # Of a tokenizer without BOS, a template sees no bos_token.
        jinja = _JINJA if self.spelled.bos else _JINJA.replace("bos_token, ", "").replace("bos_token ~ ", "")
        return jinja.replace("DEFAULT_SYSTEM", default).replace("FORBIDDEN", json.dumps(INST_TAGS))

    @property
    def tokenizer_remedy(self) -> str:
        """The remedy of every format, and one for tokenizers other than Llama 2's."""
        return f"{super().tokenizer_remedy}, or train with a data.template such as chatml"

    def go_template(self) -> str:
        """The format by hand, for its system text stands within the first question."""
        return _GO.replace("<s>", self.spelled.bos).replace("</s>", self.spelled.eos)


def segments(conversation: Conversation) -> list[tuple[str, bool]]:
    """A conversation as Meta's code writes it, without BOS and EOS: prompts and answers, which are True, by turns.

    ``[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST]`` then ``{answer} ``, and so on: the
    system text stands in the first prompt only. An open prompt ends on a prompt.

    Args:
        conversation: an open or an answered one.
    """
    written = []
    for index, turn in enumerate(conversation.turns):
        content = turn.content
        if index == 0 and conversation.system:
            content = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n{content}"
        content = content.strip()
        is_answer = turn.role == "assistant"
        written.append((f"{content} " if is_answer else f"[INST] {content} [/INST]", is_answer))
    return written


def _joined_text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces).replace(" ", "")
