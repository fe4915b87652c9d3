"""Owns what a secret looks like on a command line, in a config file and in a message, and that none is taken or told.

Options are kept in config.yaml and shown in messages, so none takes a secret: ``HF_TOKEN`` comes from the environment
alone. Knows the names of no option.
"""

import re
from collections.abc import Sequence

from lit_qlora.errors import UserError

HIDDEN = "***"
_WORD = (
    r"(?:[\w.-]*[-_.])?(?:token|api_?key|access_?key|secret|password|passwd|signature|sig|credentials?|authorization)"
)
_NAME = re.compile(_WORD, re.IGNORECASE)
_SECRETS = (
    # user:password@ of a URL, which pathlib may have taken a slash from.
    re.compile(r"""(\w[\w+.-]+:/{1,2})[^/?#\s'"]+(?=@)"""),
    # ?token=… of one, and a signature.
    re.compile(rf"""([?&;]{_WORD}=)[^&;#\s'"]+""", re.IGNORECASE),
    # A token of the hub.
    re.compile(r"\b()(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{20,}"),
)


def redact(text: str) -> str:
    """``text`` with each secret replaced."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


def check_no_secret(name: str, value: str, place: str = "") -> None:
    """Raises UserError, which does not tell it, where option ``name`` is meant for a secret or ``value`` holds one.

    ``place`` is put in front: the file and line that the option stands in.
    """
    if not (_NAME.fullmatch(name.rpartition(".")[2]) or redact(value) != value):
        return
    raise UserError(
        f"{place}{redact(name)}: it holds a password or a token, and options are kept in the run's files; put a token "
        "for the hub into the environment as HF_TOKEN, and fetch by hand what else needs one"
    )


def check_no_secrets(args: Sequence[str]) -> None:
    """`check_no_secret` for a whole command line, ``--name value`` and ``--name=value``."""
    name = "the command"
    for arg in args:
        option, _, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        name = option.removeprefix("--") or name
        check_no_secret(name, value)
