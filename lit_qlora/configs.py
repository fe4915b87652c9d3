"""Owns the check of a config file before it is parsed, for mistakes that would be accepted: each names its line.

Knows no option's meaning.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import yaml

from lit_qlora.data.row_files import TABLES
from lit_qlora.errors import SecretError, UserError, excerpt, likely_meant, nearest
from lit_qlora.options import LINKED
from lit_qlora.place import CONFIGS
from lit_qlora.secrecy import holds_secret
from lit_qlora.storage.config_file import NoReferences, problem_of
from lit_qlora.storage.files import NO_VALUE, decoded
from lit_qlora.storage.run import RunFolder
from lit_qlora.text.conversation import HALF, is_encodable

_QUOTE = "put quotes around the value"
YAML_REMEDIES = (
    (r"\0\t", "indent with spaces, not with tabs"),
    (r"\0:", f"{_QUOTE}, if ': ' is in it, or indent the line as those before it"),
    (r"\0[@`%*]|\*\0", _QUOTE),
    (r'\0"[^"]*\\', "put ' in place of \" around the value"),
    (r"\0[\w.]+(:\S|\s*=)", "write 'option: value', with a space behind the colon"),
)
"""Remedies for common mistakes, by the text around ``\\0``, the place of the mistake."""


def _no_config(path: Path) -> UserError:
    """The error for a config file that is not there, or holds rows."""
    if path.is_file():
        remedy = f"give it as --data.source {quote(str(path))}"
        return UserError(f"{path} is a file of rows, expected a YAML file", option="config", remedy=remedy)
    folder = path.parent if path.parent.is_dir() else Path("configs")
    known = [str(file) for file in sorted(folder.glob("*.y*ml"))]
    own = [file.stem for file in sorted(CONFIGS.glob("*.yaml"))]
    near = nearest(str(path), known, 0.6) or nearest(path.stem, own, 0.6)
    others = f"give a file, or one of {', '.join(own)}, which come with lit-qlora"
    remedy = likely_meant(near and Path(near)) or others
    return UserError(f"no file {path}", option="config", remedy=remedy)


def check_config_file(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> None:
    """Check a config file for errors that would be accepted: doubled keys, empty sections, a ``config`` inside, linked
    options, a secret.

    Args:
        path: the file.
        loader: reads its YAML.

    Raises:
        UserError: with file and line, for the first that is found; for what is no file, or no YAML.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a YAML file", option="config")
    if not path.is_file() or path.suffix in (".jsonl", *TABLES):
        raise _no_config(path)
    text = decoded(path.read_bytes(), place=path)
    root: yaml.Node | None = None
    try:
        root = yaml.compose(text, Loader=loader)
        yaml.load(text, Loader=loader)  # finds tags, keys and dates that can't be
        values = [*_values(root)] if root else []
    except RecursionError as error:
        raise UserError("something in it stands within itself (& and *), or is nested too deep", place=path) from error
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # a number, date or tag that does not fit
        line, problem = _misfit_value(root, loader) if root else (1, NO_VALUE)
        raise UserError(f"no valid YAML: {problem}", place=f"{path}:{line}") from error
    except yaml.YAMLError as error:
        # What does not end is wrong where it begins: PyYAML stops behind it. Of a wrong character, only its position.
        is_open = str(getattr(error, "context", None)).startswith(("while scanning a", "while parsing a flow"))
        mark = getattr(error, "context_mark" if is_open else "problem_mark", None)
        line = mark.line + 1 if mark else text[: getattr(error, "position", 0)].count("\n") + 1
        around = f"{text[: mark.index]}\0{text[mark.index :]}" if mark else ""
        remedy = next((remedy for pattern, remedy in YAML_REMEDIES if re.search(pattern, around)), None)
        raise UserError(f"no valid YAML: {problem_of(error)}", place=f"{path}:{line}", remedy=remedy) from error
    if root is None:
        raise UserError("the file is empty", place=path)
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        raise UserError(f"expected 'option: value' lines, got a {kind}", place=f"{path}:1")
    for name, node in values:
        place = f"{path}:{node.start_mark.line + 1}"
        if holds_secret(name, node.value):
            raise SecretError(name, place)
        if not is_encodable(node.value):
            raise UserError(f"it {HALF}", option=name, place=place)
    for line, problem in _problems(root):
        raise UserError(problem, place=f"{path}:{line}")


def check_config_of(run: RunFolder) -> None:
    """Check the configuration that ``run`` keeps. Raises UserError as `check_config_file`, with what to do about it."""
    try:
        check_config_file(run.config, NoReferences)
    except UserError as error:
        raise error.advise(run.config_remedy()) from error


def _values(node: yaml.Node, name: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Each single value with its dotted name, and each key with its section's."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _values(key, name)
            yield from _values(value, f"{name}.{key.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _values(item, name)
    else:
        yield name, node


def _misfit_value(root: yaml.Node, loader: type[yaml.SafeLoader]) -> tuple[int, str]:
    """Line and problem of the first single value that is invalid for its type, such as a date in month 13."""
    for _, node in _values(root):
        try:
            loader("").construct_object(node)
        except (ValueError, LookupError, AttributeError):
            return node.start_mark.line + 1, f"{excerpt(node.value)} can't be read as {node.tag.rpartition(':')[2]}"
    return 1, NO_VALUE


def _problems(
    node: yaml.MappingNode, section: str = "", seen: dict[str, int] | None = None
) -> Iterator[tuple[int, str]]:
    """Line and problem of each key of a section that would be ignored, or would take the place of another.

    ``seen`` has the lines of the names before it, dotted or nested, added to (``+``) or set.
    """
    seen = {} if seen is None else seen
    for key, value in node.value:
        line, name = key.start_mark.line + 1, f"{section}{key.value}"
        bare = name.removesuffix("+")
        if bare in seen:
            yield line, f"{excerpt(name)} stands here a second time (first in line {seen[bare]}); keep one"
        seen[bare] = line
        if not section and key.value == "config":
            yield line, "a config file can't name another; give several with --config A --config B"
        if name in LINKED:
            yield line, f"{name} can't be given, it is always {LINKED[name]}; set that one"
        if isinstance(value, yaml.MappingNode):
            yield from _problems(value, f"{name}.", seen)
        elif not section and key.value in ("model", "data", "trainer", "samples"):
            empty = value.tag == "tag:yaml.org,2002:null"
            held = excerpt(value.value) if isinstance(value, yaml.ScalarNode) else "a list"
            found = "is empty; fill it or remove the line" if empty else f"holds {held}, expected 'option: value' lines"
            yield line, f"section {excerpt(name)} {found}"
