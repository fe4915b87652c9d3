"""Owns the loading of a base's tokenizer, and the check that its ids are those of the base.

Knows no conversation, no prompt format, no weights.
"""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora import demo
from lit_qlora.errors import UserError, excerpt, first_line, one_line
from lit_qlora.storage.foreign import FLAG, Kind, check, one_of, read_object
from lit_qlora.storage.reach import stored_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_2_IDS = {"▁[": 518, "▁Hello": 15043}
"""Tokens that Llama 2's vocabulary has at these ids, and no other one."""
INST = [518, 25580, 29962]
"""The ids of the text "[INST]" by Meta's code."""

TEXT_PROBES = ("Hello world", "two  spaces", "x = 12345\n\n\tend", "Größe, 漢字 🙂")
"""Texts that show whether a class of the library gives the ids of the tokenizer.json that it was loaded from.

None begins with a space, which classes that put one there take for their own; `encode.Encoder` knows of that."""

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Special tokens, and what Llama calls them; BOS may lack, but Llama 2's."""


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, list | dict) and all(map(_is_token, parts)))


def _is_chat_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, dict) and {"name", "template"} <= {*part} for part in value)
    return isinstance(value, str | None)


_TOKEN = Kind("a text, null, or an object with a text as content", lambda value: value is None or _is_token(value))
_TOKENS = Kind("a list of tokens, or an object of them by name", _are_tokens)
_BY_ID = Kind(
    "an object of tokens by id, each an object with a text as content",
    lambda value: (
        isinstance(value, dict)
        and all(key.isdecimal() and isinstance(token, dict) and _is_token(token) for key, token in value.items())
    ),
)
_TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value))
_SIDE = one_of("left", "right")
TOKENIZER_KEYS = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), _TOKEN
    ),
    "added_tokens_decoder": _BY_ID,
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
    "auto_map": Kind(
        "an object, or a list of two",
        lambda value: isinstance(value, dict) or (isinstance(value, list) and len(value) == 2),
    ),
    "chat_template": Kind("a text, or a list of objects with name and template", _is_chat_template),
    "fast_tokenizer_files": _TEXTS,
    "model_input_names": _TEXTS,
    "init_inputs": Kind("an empty list", lambda value: value == []),
    "model_max_length": Kind("a number", lambda value: value is None or type(value) in (int, float)),
    "split_special_tokens": FLAG,
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
    "tokenizer_class": Kind("the name of a tokenizer", lambda value: value is None or _is_class(value)),
}
"""Keys of tokenizer_config.json with their kinds, for whose wrong values the library would fail deep inside."""


def _wrong(base: str, problem: str, remedy: str) -> UserError:
    return UserError(f"the tokenizer of {excerpt(base)} {problem}", option="model.base", remedy=remedy)


def load_tokenizer(base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``base``, a hub id or a local folder.

    With Llama 2's vocabulary it gives the ids of Meta's code, with another one those of tokenizer.json where there is
    one, whatever tokenizer_config.json says: the class that it names may have rules of its own, as transformers 5's
    LlamaTokenizer puts a space before a text, which Yi's does not.

    Raises UserError when there is none, when it comes as code, when it lacks an EOS, when its files hold
    what no tokenizer has, or when it has Llama 2's vocabulary and can't be brought to give Llama 2's ids.
    """
    tokenizer = _load(base)
    if not _is_llama_2(tokenizer):
        return tokenizer if _is_as_saved(tokenizer) else _load(base, "PreTrainedTokenizerFast")
    if not _is_as_meta(tokenizer):
        # Early conversions name LLaMATokenizer, for which the library takes its plainest class.
        kind = "AutoTokenizer" if file_of(tokenizer.name_or_path, "tokenizer.json") else "LlamaTokenizer"
        tokenizer = _load(base, kind, add_prefix_space=True)
        if not _is_as_meta(tokenizer):
            problem = "has Llama 2's vocabulary, and its ids of a text are others than Llama 2's"
            raise _wrong(base, problem, "take another copy")
    return tokenizer


def template_beside(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template that came with a ``tokenizer``; of several, the default one; None without any."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def file_of(location: str, name: str) -> Path | None:
    """A file of a base, from its folder or the hub; None where it has none of that name, or the hub can't be asked.

    Args:
        location: a folder or a hub id.
        name: the file's.
    """
    if Path(location).is_dir():
        return stored_file(location, name)
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(location, name))
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError):
        return stored_file(location, name)


def tokenizer_rules(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What a ``tokenizer`` does with a text, as its tokenizer.json would have it: a copy."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return rules


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """The tokens that a ``tokenizer`` calls special: how they are spelled, by their ids."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end an answer by the generation_config.json beside a ``tokenizer``, as far as it has them.

    Raises UserError where that file can't be read.
    """
    file = file_of(tokenizer.name_or_path, "generation_config.json")
    stated = read_object(file).get("eos_token_id") if file else None
    special = [*special_tokens(tokenizer)]
    wrong = [tokenizer.bos_token_id, tokenizer.unk_token_id]  # as early conversions of Llama have it
    return [one for one in (stated if isinstance(stated, list) else [stated]) if one in special and one not in wrong]


def _load(base: str, kind: str = "AutoTokenizer", **changes: bool) -> "PreTrainedTokenizerBase":
    """Load a tokenizer by the class that tokenizer_config.json names, or by the class ``kind``."""
    import transformers

    location = str(demo.BASE) if base == "demo" else base
    stated: dict[str, Any] = {}
    try:
        stated = _check_config(base, location)
        tokenizer: PreTrainedTokenizerBase = getattr(transformers, kind).from_pretrained(
            location,
            # As of every base; what its config.json says else is not asked.
            config=transformers.LlamaConfig.from_dict({"name_or_path": location}),
            # Left unsaid, whoever sits at a terminal is asked, and a "y" runs the code.
            trust_remote_code=False,
            **changes,
        )
    except UserError:
        raise
    except Exception as error:  # its files come from anywhere, and the library assumes that it wrote them
        _check_not_empty(base, stated.get)
        if "auto_map" in stated and not hasattr(transformers, str(stated.get("tokenizer_class", "AutoTokenizer"))):
            problem = "is code of its own, and code that comes with a base is never run"
            raise _wrong(base, problem, "take a copy whose tokenizer is one of the library") from error
        problem = f"no tokenizer could be loaded from {excerpt(base)}: {_load_failure(error, location)}"
        raise UserError(problem, option="model.base") from error
    _check_named(base, tokenizer)
    if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
        raise UserError(
            f"the tokenizer of {excerpt(base)} splits words at random (dropout), so a text has other ids each time",
            option="model.base",
            remedy='write "dropout": null into its tokenizer.json, in the section model',
        )
    return tokenizer


def _check_config(base: str, location: str) -> dict[str, Any]:
    """The content of tokenizer_config.json. Raises UserError for a value on which the library would fail."""
    file = file_of(location, "tokenizer_config.json")
    if file is None:
        return {}
    place = f"no tokenizer could be loaded from {excerpt(base)}"
    try:
        stated = read_object(file, place)
        for key, kind in TOKENIZER_KEYS.items():
            if key in stated:
                check(f"{place}: tokenizer_config.json", key, kind, stated[key])
    except UserError as error:
        raise error.within("model.base") from error
    return stated


def _check_not_empty(base: str, token_of: Callable[[str], Any]) -> None:
    """Raises UserError where one of the special tokens, by its name, is no text at all.

    The library gives an empty one the id of the unknown token, and searches endlessly for an empty unknown one.
    """
    for name, usual in LLAMA_TOKENS.items():
        if token_of(name) == "":
            remedy = f"write its text into tokenizer_config.json (Llama's is {usual}), or take another copy"
            raise _wrong(base, f"has an empty {name}, as early conversions do", remedy)


def _check_named(base: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UserError where EOS lacks, or Llama 2's BOS, or one of the special tokens is no text at all."""
    _check_not_empty(base, lambda name: getattr(tokenizer, name))
    if tokenizer.bos_token is None and _is_llama_2(tokenizer):  # not all have a BOS: Qwen's have none
        problem = "has Llama 2's vocabulary and no BOS token, with which all of its texts begin"
        raise _wrong(base, problem, "name it in tokenizer_config.json (bos_token, <s>), or take another copy")
    if tokenizer.eos_token is None:
        remedy = "name it in tokenizer_config.json (eos_token), or take another copy"
        raise _wrong(base, "has no EOS token, so that no answer would end", remedy)


def _is_class(name: Any) -> bool:
    """True if ``name`` is a tokenizer class of the library, which would load any other class of its own, too.

    A name that the library does not have stands for the plain tokenizer of its kind, or is refused as code.
    """
    import transformers

    kind = getattr(transformers, name, transformers.PreTrainedTokenizerBase) if isinstance(name, str) else None
    return isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)


def _load_failure(error: Exception, location: str) -> str:
    """The reason in the library's words, unless those are misleading."""
    if isinstance(error, RecursionError):
        return "its files are nested too deep, or name each other"
    if not isinstance(error, OSError | ValueError):
        return f"tokenizer_config.json or a file beside it is not as it was saved ({one_line(error)})"
    if Path(location).is_dir() and not file_of(location, "tokenizer.json"):  # the library's last guess is another file
        if not file_of(location, "tokenizer.model"):
            return "it has neither tokenizer.json nor tokenizer.model; copy one of them there, or take another copy"
        if find_spec("sentencepiece") is None:
            return "it has no tokenizer.json, and a tokenizer.model needs sentencepiece; pip install sentencepiece"
        return "it has no tokenizer.json, and its tokenizer.model is no whole one of sentencepiece; copy it again"
    return first_line(error)


def _is_as_meta(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if a text starts as in Meta's code."""
    return bool(tokenizer("[INST]", add_special_tokens=False)["input_ids"] == INST)


def is_byte_level(rules: Mapping[str, Any]) -> bool:
    """True if ``rules``, a tokenizer.json, split bytes, as Qwen's, Llama 3's and SmolLM2's do; others write U+2581."""
    parts = rules.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in (parts, *parts.get("pretokenizers", ())))


def _is_llama_2(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(tokenizer.convert_tokens_to_ids([*LLAMA_2_IDS]) == [*LLAMA_2_IDS.values()])


def _is_as_saved(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if it gives the ids of the tokenizer.json that it is from, or there is none."""
    from tokenizers import Tokenizer

    file = file_of(tokenizer.name_or_path, "tokenizer.json")
    if file is None:
        return True
    saved, loaded = Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    return all(
        saved.encode(text, add_special_tokens=False).ids == loaded.encode(text, add_special_tokens=False).ids
        for text in TEXT_PROBES
    )
