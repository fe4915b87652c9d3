"""Owns how numbers of things are written, 1 row, 2 rows, and what a value of a file is called.

Words are given in the plural. Knows nothing of what is counted.
"""

import re

NOUNS = (
    "answer|character|checkpoint|conversation|device|epoch|file|layer|machine|prompt|question|row|sample|source|step|"
    "text|token|turn"
)
IN_ES = "micro-batch|process"
VERBS = {"are": "is", "were": "was", "do": "does", "hold": "holds", "have": "has", "stand": "stands", "spell": "spells"}
_HEAD = r"(?:(?!(?:at|by|in|of|than|to|with)\b)[\w-]+ ){0,2}"
_VERB = rf"({'|'.join(VERBS)})\b"
_SUBJECT = re.compile(rf"({_HEAD})(?:({NOUNS})s|({IN_ES})es)\b((?: that| there)?)(?: {_VERB})?")
_OF_ALL = re.compile(rf"(of [\d,]+ {_HEAD}(?:(?:{NOUNS})s|(?:{IN_ES})es) |)" + _VERB)


def number_of(count: int, words: str) -> str:
    """``count`` of what ``words`` begin with, such as ``rows left out: no answer``; see `of_number`."""
    return f"{count:,} {of_number(count, words)}"


def of_number(count: int, words: str) -> str:
    """``words`` in the number of ``count``: for 1, the noun that they begin with and its verb are in the singular.

    Words such as ``of 20 rows are`` keep their noun.
    """
    if count != 1:
        return words
    if subject := _SUBJECT.match(words):
        before, noun, in_es, then, verb = subject.groups()
        return f"{before}{noun or in_es}{then}{f' {VERBS[verb]}' if verb else ''}{words[subject.end() :]}"
    return _OF_ALL.sub(lambda found: f"{found[1]}{VERBS[found[2]]}", words, count=1) if _OF_ALL.match(words) else words


def kind(value: object) -> str:
    """The kind of a value, in words of the files."""
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "one object",
    }
    return kinds.get(type(value), type(value).__name__)
