"""Owns a published tokenizer: files whose chat template gives the very ids of training. Knows no model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_qlora.data.encode import SPACE, Encoder
from lit_qlora.data.tokenizer import is_byte_level, load_tokenizer, tokenizer_rules
from lit_qlora.errors import UserError
from lit_qlora.text.conversation import Conversation, Turn

SPACE_BEFORE_EACH_STRETCH = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}

KEEP_SPACE_OF_THE_TEXT = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
"""A rule without which Metaspace takes a `SPACE` that a text begins with for the one that it adds itself."""

PROMPT_PROBES = (
    Conversation((Turn("user", "Hello"),)),
    Conversation((Turn("user", "What is 2 + 3?"), Turn("assistant", "It is 5."), Turn("user", "And 3 + 3?"))),
)
"""Prompts on which a tokenizer is tried when it is written."""


def config_ids(encoder: Encoder) -> dict[str, Any]:
    """The ids that begin, end and pad a text of ``encoder``'s, as config.json and generation_config.json name them."""
    ends = encoder.stop_ids
    return {
        "bos_token_id": encoder.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": encoder.eos_id,
    }


def write_tokenizer(folder: Path, encoder: Encoder, max_tokens: int) -> None:
    """Write a tokenizer, with what other programs need to use it.

    That is its chat template, also as a file of its own for programs that take one, and generation_config.json, with
    the ids that end an answer. Sampling options are left to the user.

    A template is encoded as one text. Training encodes each stretch between two special tokens by itself, with a
    space before its first word; so does Llama 2's own tokenizer.json, but not the class that transformers 5 makes
    of it, which puts that space at the very start alone (``[INST]`` after ``<s>`` would be other ids).

    Args:
        folder: an existing folder.
        encoder: of training, whose ids the tokenizer is to give.
        max_tokens: the context of the base.
    """
    tokenizer = encoder.tokenizer
    rules = tokenizer_rules(tokenizer)
    has_metaspace = (rules["pre_tokenizer"] or {}).get("type") == "Metaspace"
    if has_metaspace and encoder.prompt_format.opens_in_space:
        rules["pre_tokenizer"]["prepend_scheme"] = "always"  # where a stretch has no space already, as in training
        own = [rules["normalizer"]] if rules["normalizer"] else []
        rules["normalizer"] = {"type": "Sequence", "normalizers": [*own, KEEP_SPACE_OF_THE_TEXT]}
    elif has_metaspace:
        rules |= {"pre_tokenizer": None, "normalizer": SPACE_BEFORE_EACH_STRETCH}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        # Always where Llama 2's format may be published, else as in the base's own: llama.cpp knows a byte-level
        # tokenizer by the ids that it gives to one text.
        "add_bos_token": encoder.begins_with_bos if is_byte_level(rules) else encoder.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": encoder.prompt_format.chat_template(),
    }
    (folder / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")
    stops = json.dumps(config_ids(encoder), indent=2) + "\n"
    (folder / "generation_config.json").write_text(stops, encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def check_template(folder: Path, encoder: Encoder, conversations: Sequence[Conversation]) -> None:
    """Check that a written tokenizer gives the ids of training.

    Args:
        folder: holds the tokenizer and its chat template.
        encoder: of training.
        conversations: open prompts to try.

    Raises:
        UserError: for the first whose ids differ.
    """
    tokenizer = load_tokenizer(str(folder))
    for prompt in conversations:
        ids = tokenizer.apply_chat_template(messages(prompt), add_generation_prompt=True, return_dict=False)
        if ids != encoder.prompt(prompt):
            problem = f"its tokenizer gives {ids} through a chat template where training has {encoder.prompt(prompt)}"
            raise UserError(problem, option="base", remedy=encoder.prompt_format.tokenizer_remedy)


def messages(conversation: Conversation) -> list[dict[str, str]]:
    """A ``conversation`` as the list of messages that a chat template takes."""
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    return [*system, *({"role": turn.role, "content": turn.content} for turn in conversation.turns)]
