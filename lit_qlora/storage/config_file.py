"""Owns a configuration as a file: YAML, read from anywhere and written for people, its options by dotted names.

Knows no option.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_qlora.errors import one_line
from lit_qlora.storage.files import NO_VALUE, unreadable


class _Readable(yaml.SafeDumper):
    """A dumper that writes multi-line texts, such as templates, line by line, and nothing by reference."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_number = re.fullmatch(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+", text)  # to jsonargparse, and not to PyYAML
    style = "|" if "\n" in text else "'" if is_number else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _write_text)


class NoReferences(yaml.SafeLoader):
    """A loader without references, by which a few lines of a folder from elsewhere could stand for billions."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node as the base class does. Raises ComposerError at a reference."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a value given by reference (& and *); write it out", mark)
        return super().compose_node(parent, index)


def problem_of(error: yaml.YAMLError) -> str:
    """The problem of a text that is no YAML, from PyYAML's ``error``, in its words without its places."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"unacceptable character #x{error.character:04x}"
    return one_line(getattr(error, "problem", None) or error)


def read_options(config: Path) -> dict[str, Any]:
    """The options of a run's configuration file, ``config``, by their dotted names, nested in the file or not.

    Raises ValueError for a damaged file.
    """
    try:
        found = yaml.load(config.read_text(encoding="utf-8-sig"), Loader=NoReferences)
    except yaml.YAMLError as error:
        raise ValueError(problem_of(error)) from error
    except (RecursionError, UnicodeDecodeError, OSError) as error:
        raise ValueError(unreadable(error)) from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(NO_VALUE) from error
    if not isinstance(found, Mapping):
        raise ValueError("no 'option: value' lines")
    options = flat(found)
    as_sections(options)
    return options


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration, ``config``, as YAML text, in its own order."""
    return yaml.dump(config, Dumper=_Readable, sort_keys=False, allow_unicode=True)


def flat(config: Mapping[Any, Any], section: str = "") -> dict[str, Any]:
    """Options by their dotted names.

    Args:
        config: options in sections, or with dotted names.
        section: stands before their names, with a dot behind it.

    Raises:
        ValueError: one is given both nested and dotted.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{section}{key}"
        for leaf, held in (flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}).items():
            if leaf in found:
                raise ValueError(f"{leaf} is given twice")
            found[leaf] = held
    return found


def as_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``options`` from dotted ones: the inverse of `flat`.

    Raises:
        ValueError: for a name that is both a section and an option.
    """
    config: dict[str, Any] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        within = config
        for section in sections:
            within = within.setdefault(section, {})
            if not isinstance(within, dict):
                raise ValueError(f"{section} is both a section and an option")
        if last in within:
            raise ValueError(f"{name} is both a section and an option")
        within[last] = value
    return config
