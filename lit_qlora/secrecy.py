"""Owns the recognition of secrets in options, config files and messages: none is accepted or printed.

Options are saved in config.yaml and shown in messages, so none takes a secret: ``HF_TOKEN`` is read from the
environment only. Knows no option's name.
"""

import re

HIDDEN = "***"
_SECRET_NAME = (
    r"[\w.-]*(?:token|api[-_]?key|access[-_]?key(?:[-_]?id)?|secret|passw(?:or)?d|passphrase|signature|credentials?"
    r"|authorization)|(?:[\w.-]*[-_.])?(?:sig|pwd)"
)
"""Names of options, and of parameters in a URL, that hold secrets."""
_VOCABULARY = r"(?:\w+_)?(?:bos|eos|pad|unk|sep|cls|mask)_token"
"""Names of options that are about a token of the tokenizer, and hold no secret."""
_NONE = ("", "null", "none", "~", "true", "false", "0")
"""Values that are no secret under any name, such as the default of a callback's own argument, which a run keeps."""
_SCHEME = r"\w[\w+.-]{1,30}:/{1,2}"  # pathlib may have taken a slash
_SECRETS = (
    # The user of a URL, with or without a password.
    re.compile(rf"""({_SCHEME})[^/?#\s'"]+(?=@)"""),
    # user:password@ further behind, or with a password that no URL should hold; a port is no password.
    re.compile(rf"""((?:{_SCHEME}|//)(?:[^\s'"]*/)?)[^\s'"/:@]*:(?!\d+(?:/|$))[^\s'"]+(?=@)"""),
    # ?token=… of one, and a signature.
    re.compile(rf"""([?&;#](?:{_SECRET_NAME}|key|auth|pass|jwt)=)[^&;#\s'"]+""", re.IGNORECASE),
    # Tokens of the hub and other services.
    re.compile(r"\b()(?:hf_(?:oauth_)?|api_org_|gh[opsur]_|github_pat_)\w{20,}"),
    re.compile(r"\b()(?:glpat-[\w-]{20,}|AKIA[0-9A-Z]{16}\b|xox[abeprs]-[\w-]{20,}|AIza[\w-]{35})"),
    re.compile(r"\b()sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"),
    re.compile(r"\b()eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    re.compile(r"(\bBearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE),
)
_LOGIN = re.compile(r"""(?<![\w/.])()(?!mailto:)[\w.+%-]{2,}:(?!/)[^\s:@'"]+(?=@[\w-])""")
"""user:password@host without a scheme; in a text of several words, a colon and a mail address may look like it."""
_ANY = re.compile(r"\w[\w+.-]+:/{1,2}.*:(?!\s|\d+(?:/|$)).*@.*", re.DOTALL)
"""A value that starts as a URL, with a password of any characters."""


def redact(text: str) -> str:
    """``text`` with each secret replaced."""
    # Patterns with a user take long on a long text without an @.
    for secret in (*_SECRETS, _LOGIN) if "@" in text else _SECRETS[2:]:
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


def holds_secret(name: str, value: str) -> bool:
    """True if an option is meant for a secret, or its value holds one.

    Args:
        name: of the option, as it was written.
        value: as text.
    """
    is_word, name = len(value.split()) == 1, name.rpartition(".")[2]
    is_meant = re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) and not re.fullmatch(_VOCABULARY, name, re.IGNORECASE)
    return (
        bool(is_meant and value.strip().lower() not in _NONE)
        or any(secret.search(value) for secret in _SECRETS)
        or (is_word and _LOGIN.match(value) is not None)
        or (_ANY.fullmatch(value.strip()) is not None)
    )
