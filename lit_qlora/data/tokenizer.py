"""Owns the loading of a base's tokenizer, and whether its ids are those that the base knows.

Knows no conversation, no prompt format, no weights.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import demo
from lit_qlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_2 = {"▁[": 518, "▁Hello": 15043}
"""Tokens that Llama 2's vocabulary has at these ids, and no other one."""
INST = [518, 25580, 29962]
"""What Meta's code makes of a text that is "[INST]"."""


def load_tokenizer(base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of ``base``, a hub id or a local folder.

    With Llama 2's vocabulary it gives the ids of Meta's code, whatever tokenizer_config.json says.

    Raises UserError when there is none, when it comes as code, when it lacks a BOS or an EOS, or when it has
    Llama 2's vocabulary and can't be brought to give Llama 2's ids.
    """
    tokenizer = _load(base)
    if not _as_meta(tokenizer):
        tokenizer = _load(base, add_prefix_space=True)
        if not _as_meta(tokenizer):
            raise UserError(
                f"model.base: the tokenizer of {base!r} has Llama 2's vocabulary, and its ids of a text are others "
                "than Llama 2's; take another copy"
            )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {base!r} has no BOS or no EOS token; a Llama tokenizer has both")
    return tokenizer


def _load(base: str, **changes: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    location = demo.BASE if base == "demo" else base
    try:
        _check_class(location)
        # Left unsaid, whoever sits at a terminal is asked, and a "y" runs the code.
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False, **changes)
    except Exception as error:  # its files come from anywhere, and the library takes them to be as it writes them
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.base: the tokenizer of {base!r} is code of its own, and code that comes with a base is never "
                "run; take a copy with a Llama tokenizer"
            ) from error
        raise UserError(f"model.base: no tokenizer could be loaded from {base!r}: {_reason(error)}") from error


def _check_class(location: str | Path) -> None:
    """Raises ValueError where tokenizer_config.json names what is in the library, and no tokenizer: it would be loaded.

    A name that the library does not have stands for the plain tokenizer of its kind, or is refused as code.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = get_tokenizer_config(location).get("tokenizer_class") or "PreTrainedTokenizerFast"
    kind = getattr(transformers, name, transformers.PreTrainedTokenizerBase)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        raise ValueError(f"tokenizer_class {name} in its tokenizer_config.json is no tokenizer")


def _reason(error: Exception) -> str:
    """In the library's words, but where those lead astray."""
    if isinstance(error, RecursionError):
        return "its files are nested too deep, or name each other"
    if not isinstance(error, OSError | ValueError):
        return (
            f"tokenizer_config.json or a file beside it is not as it was saved ({' '.join(str(error).split())[:200]})"
        )
    words = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    if "tiktoken" in words:  # its next guess, once sentencepiece has failed
        if find_spec("sentencepiece") is None:
            return "it has no tokenizer.json, and a tokenizer.model needs sentencepiece; pip install sentencepiece"
        return "it has no tokenizer.json, and its tokenizer.model is no whole one of sentencepiece; copy it again"
    if words.endswith(":"):  # a list of what was tried follows
        return "it has neither tokenizer.json nor tokenizer.model; copy one of them there, or take another copy"
    return words


def _as_meta(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a text begins as in Meta's code; True as well where the vocabulary is not Llama 2's."""
    if tokenizer.convert_tokens_to_ids([*LLAMA_2]) != [*LLAMA_2.values()]:
        return True
    return bool(tokenizer("[INST]", add_special_tokens=False)["input_ids"] == INST)
