"""Owns what a secret looks like on a command line, in a config file and in a message, and that none is taken or told.

Options are kept in config.yaml and shown in messages, so none takes a secret: ``HF_TOKEN`` comes from the environment
alone. Knows the names of no option.
"""

import re
from collections.abc import Sequence

from lit_qlora.errors import UserError

HIDDEN = "***"
_NAME = (
    r"[\w.-]*(?:token|api[-_]?key|access[-_]?key(?:[-_]?id)?|secret|passw(?:or)?d|passphrase|signature|credentials?"
    r"|authorization)|(?:[\w.-]*[-_.])?(?:sig|pwd)"
)
"""Of an option, or of a parameter in a URL."""
_SCHEME = r"\w[\w+.-]+:/{1,2}"  # pathlib may have taken a slash
_SECRETS = (
    # The user of a URL, with or without a password.
    re.compile(rf"""({_SCHEME})[^/?#\s'"]+(?=@)"""),
    # user:password@ further behind, or with a password that no URL should hold; a port is no password.
    re.compile(rf"""((?:{_SCHEME}|//)(?:[^\s'"]*/)?)[^\s'"/:@]*:(?!\d+(?:/|$))[^\s'"]+(?=@)"""),
    # ?token=… of one, and a signature.
    re.compile(rf"""([?&;#](?:{_NAME}|key|auth|pass|jwt)=)[^&;#\s'"]+""", re.IGNORECASE),
    # What the hub and other services give out.
    re.compile(r"\b()(?:hf_(?:oauth_)?|api_org_|gh[opsur]_|github_pat_)\w{20,}"),
    re.compile(r"\b()(?:glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}\b|xox[abeprs]-[\w-]{20,}|AIza[\w-]{35})"),
    re.compile(r"\b()sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"),
    re.compile(r"\b()eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    re.compile(r"(\bBearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE),
)
_LOGIN = re.compile(r"""(?<![\w/.])()(?!mailto:)[\w.+%-]{2,}:(?!/)[^\s:@'"]+(?=@[\w-])""")
"""user:password@host without a scheme: in a text of several words, a colon and a mail address may look like it."""
_ANY = re.compile(r"\w[\w+.-]+:/{1,2}.*:(?!\s|\d+(?:/|$)).*@.*", re.DOTALL)
"""A value that begins as a URL, with a password of whatever characters."""


def redact(text: str) -> str:
    """``text`` with each secret replaced."""
    for secret in (*_SECRETS, _LOGIN):
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


def _holds_one(value: str) -> bool:
    is_word = len(value.split()) == 1
    return (
        any(secret.search(value) for secret in _SECRETS)
        or (is_word and _LOGIN.match(value) is not None)
        or (_ANY.fullmatch(value.strip()) is not None)
    )


def check_no_secret(name: str, value: str, place: str | None = None) -> None:
    """Raises UserError, which does not tell it, where option ``name`` is meant for a secret or ``value`` holds one.

    ``place`` is the file and line that the option stands in.
    """
    last = name.rpartition(".")[2]
    if not (re.fullmatch(_NAME, last, re.IGNORECASE) or _holds_one(value)):
        return
    raise UserError(
        "it holds a password or a token, and options are kept in the run's files",
        option=redact(name),
        place=place,
        remedy="put a token for the hub into the environment as HF_TOKEN, and fetch by hand what else needs one",
    )


def check_no_secrets(args: Sequence[str]) -> None:
    """`check_no_secret` for a whole command line, ``--name value`` and ``--name=value``."""
    name = "the command"
    for arg in args:
        option, _, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        name = option.removeprefix("--") or name
        check_no_secret(name, value)
