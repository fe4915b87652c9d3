"""Owns where rows come from: the demo, local files and folders, or data sets on the hub.

`sources_of` reads what ``data.source`` and its kin say, `find_splits` lists the splits of one source, `read_source`
reads the rows of one split. Knows no form of row; file formats are in files.py, the names of splits in splits.py.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lit_qlora import demo
from lit_qlora.data import splits
from lit_qlora.data.forms import COLUMN_OPTIONS, columns_of, forms_for
from lit_qlora.data.row_files import COMPRESSED, ENDINGS, INSTEAD, Row, SourceError, kind_of, read_rows
from lit_qlora.data.splits import PLAIN_ENDINGS, Splits
from lit_qlora.errors import UserError, excerpt, first_line, require, suggestion
from lit_qlora.storage.files import names_around, parse_json
from lit_qlora.storage.reach import HUB_ID

T = TypeVar("T")

SourceOption = str | list[str | dict[str, str | float | dict[str, str]]] | dict[str, str | float | dict[str, str]]
"""What an option for sources takes: one, or a list of them, each a text, or a table with the keys of `Source`."""


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: the demo, a file, a folder, a pattern of files such as ``data/*.jsonl``, or a hub id.
        name: the configuration on the hub, or the folder that stands for it in a clone.
        split: the split to take; default: that of its purpose.
        revision: branch, tag or commit on the hub.
        share: of its training rows, that are used.
        columns: as in ``data.columns``, for its rows alone.
        columns_option: the option that its columns are given by, or would be: its own, where others are beside it.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    share: float = 1.0
    columns: tuple[tuple[str, str], ...] | None = None
    columns_option: str = field(default=COLUMN_OPTIONS["training"], compare=False)

    def __str__(self) -> str:
        """The source's name in messages."""
        return self.path + (f", {self.name}" if self.name else "")

    @property
    def is_on_hub(self) -> bool:
        """True if the source is written as an id of the hub, and nothing of that name is local."""
        return _looks_like_hub_id(self.path) and not self.here.exists()

    @property
    def here(self) -> Path:
        """The source's path on this machine, if it is local; nothing need be there."""
        return Path(self.path).expanduser()

    @property
    def place(self) -> "Source":
        """This source by its absolute path: equal for two sources that are one."""
        path = self.path if self.is_on_hub else str(self.here.resolve())
        return Source(path, self.name, self.split, self.revision)

    def called(self, split: str) -> str:
        """The name in messages of the source's ``split``."""
        return f"{self} ({split})" if split != "train" else str(self)


SOURCES = ("source", "validation_source", "test_source")
"""The options of a `ChatDataModule` that take sources."""
SOURCE_KEYS = ("path", "name", "split", "revision", "share", "columns")
ROWS_THEMSELVES = "for rows themselves, write them to a file as JSON lines, and name that"


def sources_of(value: Any, option: str = "data.source") -> tuple[Source, ...]:
    """The sources that the value of an option stands for: at least one.

    Args:
        value: a text, a table or a list of them, as `SourceOption` has it; also a list or a table written as JSON.
        option: for messages.

    Raises:
        UserError: it is none.
    """
    if _is_json(value):  # as `as_text` writes it, or a command line
        with suppress(ValueError):
            value = parse_json(value.encode())
    values = [*value] if isinstance(value, list | tuple) else [value]
    if not values:
        raise UserError("is an empty list, expected at least one source", option=option)
    sources = tuple(_source(one, option) for one in values)
    is_own = len(values) > 1 or option != "data.source" or sources[0].columns is not None
    if is_own and not isinstance(values[0], Source):
        sources = tuple(replace(one, columns_option=f"{option}.columns") for one in sources)
    whole = [replace(one, path=one.place.path) for one in sources]  # however its path is written
    if doubled := [one for number, one in enumerate(sources) if whole[number] in whole[:number]]:
        raise UserError(
            f"lists {excerpt(str(doubled[0]))} twice, and reads it once", option=option, remedy="list each source once"
        )
    return sources


def _is_json(value: Any) -> bool:
    """True for a list or a table that is still a text."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


def as_text(value: Any) -> str | None:
    """The ``value`` of an option for sources as a text, which `sources_of` reads."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def paths_of(value: Any) -> list[str]:
    """The paths of the sources that the ``value`` of an option stands for."""
    return [source.path for source in sources_of(value)]


def _source(value: Any, option: str) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    if isinstance(value, str):
        if not value.strip() or not value.isprintable():
            raise UserError(f"is {excerpt(value)}, expected 'demo', a file, a folder or a hub id", option=option)
        head, _, split = value.partition(":")
        is_known = head == "demo" or Path(head).expanduser().exists() or _looks_like_hub_id(head)
        if split and is_known and not Path(value).expanduser().exists():
            return Source(head, split=split)
        return Source(value)
    expected = f"a source, a table of {', '.join(SOURCE_KEYS)}, or a list of them"
    require(isinstance(value, Mapping), option, expected, value)
    for key in value:
        if key not in SOURCE_KEYS:
            known = f"expected {', '.join(SOURCE_KEYS)}{suggestion(str(key), [*SOURCE_KEYS])}"
            remedy = None if "path" in value else ROWS_THEMSELVES
            raise UserError(f"{excerpt(key)} is unknown, {known}", option=option, remedy=remedy)
    if not isinstance(value.get("path"), str):
        raise UserError(f"has no path, got {excerpt(value)}", option=option, remedy="say which file, folder or hub id")
    for key in ("name", "split", "revision"):
        require(isinstance(value.get(key), str | None), f"{option}.{key}", "a text", value.get(key))
    columns = value.get("columns")
    require(isinstance(columns, Mapping | None), f"{option}.columns", "a table", columns)
    given = _source(value["path"], option)
    return Source(
        given.path,
        value.get("name"),
        value.get("split") or given.split,
        value.get("revision"),
        _share(value.get("share", 1.0), option),
        None if columns is None else tuple((str(name), str(column)) for name, column in columns.items()),
    )


def _share(value: Any, option: str) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0
    is_share = 0 < share <= 1 and not isinstance(value, bool)
    require(is_share, f"{option}.share", "the share of its rows that is used, above 0 and up to 1", value)
    return share


def find_splits(source: Source) -> Splits:
    """Find the splits of a ``source``; a file is all "train".

    Raises:
        UserError: when the source isn't found, has not the split that it names, or the hub can't be asked.
    """
    files = _find_files(source)
    if files is None:
        import datasets

        ask = datasets.get_dataset_split_names
        found = [str(name) for name in _ask_datasets(source, ask, config_name=source.name)]
    else:
        found = [*files]
    names = splits.names_by_kind(found) | splits.names_beside(source.split or "", found)
    chosen = [re.sub(r"\[.*", "", part).strip() for part in source.split.split("+")] if source.split else []
    for name in chosen:
        _check_split(source, name, found)
    if source.split:
        others = {kind: name for kind, name in names.items() if kind != "train" and name not in chosen}
        names = {"train": source.split} | others
    unread = [name for name in found if name not in (*names.values(), *chosen)]
    unread += [] if files is None or source.path == "demo" else splits.beside(source.here, files)
    is_pattern = glob.has_magic(source.path) and not source.here.exists()
    note = splits.note_of(files, matching(source.here)) if files and is_pattern and not source.split else ""
    return Splits(str(source), names, tuple(unread), splits.others_beside(source.here), bool(source.split), note)


def _check_split(source: Source, name: str, found: Sequence[str]) -> None:
    if name not in found:
        problem = f"has no split {excerpt(name)}, found: {' and '.join(found)}{suggestion(name, found)}"
        is_made_up = not {"[", "+"}.isdisjoint(name)  # as the hub's library reads it, of the hub's alone
        remedy = "of local rows, a share gives a part, and a list of sources several splits"
        raise SourceError(source, problem, remedy if is_made_up else "choose another")


def local_bytes(source: Source, split: str) -> int | None:
    """The size of a split's files on this machine; None for one on the hub.

    Args:
        source: where rows come from.
        split: name of the split there.

    Raises:
        UserError: as `read_source`.
    """
    files = _files_of(source, split)
    return None if files is None else sum(path.stat().st_size for path in files if path.is_file())


def read_source(source: Source, split: str = "train", columns: Sequence[str] = ()) -> list[Row]:
    """Read the rows of one split, by its name there.

    Args:
        source: a file, a folder, a pattern, or an id of the hub.
        split: the split's name.
        columns: names of columns, beside those of the known forms, that the first line of a .csv may have.

    Returns:
        The rows in order; one that can't be read has its fault in place of its values.

    Raises:
        UserError: when the source or the split isn't found, or a file can't be read.
    """
    files = _files_of(source, split)
    if files is not None:
        known = [*columns, *columns_of(forms_for("training"))]
        return [row for path in files for row in read_rows(path, known)]
    import datasets

    def rows(*path: str, **given: str | None) -> list[dict[str, Any]]:
        return list(datasets.load_dataset(*path, split=split, **given))

    values = _ask_datasets(source, rows, name=source.name)
    return [Row(f"{source} ({split}): row {number}", value) for number, value in enumerate(values, 1)]


def _files_of(source: Source, split: str) -> list[Path] | None:
    """The files of one split of a local source; None for one on the hub."""
    files = _find_files(source)
    if files is None:
        return None
    _check_split(source, split, [*files])
    return files[split]


def _find_files(source: Source) -> dict[str, list[Path]] | None:
    """Returns a local source's files by the name of their split, or None for a dataset on the hub.

    Raises SourceError where there are none, or for a ``name`` or a ``revision`` that only others have.
    """
    files = _files_here(source)
    if files is None:
        return None
    remedy = "leave it out of the source"
    if source.revision:
        raise SourceError(source.path, "is on this machine, where there are no revisions", remedy)
    if source.name and (source.path == "demo" or not source.here.is_dir()):
        raise SourceError(source.path, f"is no folder, and has no {excerpt(source.name)}", remedy)
    return files


def matching(pattern: Path) -> list[Path]:
    """The files and folders that a ``pattern`` names, in order; ``**`` stands for any folders between."""
    return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207  # of any folder


def _files_here(source: Source) -> dict[str, list[Path]] | None:
    if source.path == "demo":
        return {"train": [demo.TRAIN], "test": [demo.TEST]}
    path = source.here
    if path.is_dir():
        named = [path / source.name, path / "data" / source.name] if source.name else [path]
        within = next((one for one in named if one.is_dir()), None)
        return splits.in_folder(within) if within else _refuse_name(path, source.name)
    if path.exists():
        return {"train": [path]}
    if found := matching(path):
        return splits.by_names(splits.data_among(found) or found)
    if _looks_like_hub_id(source.path):
        return None
    if page := re.match(rf"https?://[^/]+/datasets/({HUB_ID.pattern})", source.path, re.ASCII):
        raise SourceError(source.path, "is a page of the hub", f"give the id alone, {page[1]}")
    if "://" in source.path:
        raise SourceError(source.path, "is an address", "download the file, and give the file here")
    if glob.has_magic(source.path):
        raise SourceError(source.path, "no such file: the pattern matches none", "check its folder and its ending")
    remedy = (
        f"expected 'demo', a file ({', '.join(ENDINGS)}), a folder with train.jsonl, or a hub id such as owner/name"
    )
    raise SourceError(source.path, f"no such file{suggestion(path.name, ['demo', *names_around(path)])}", remedy)


def _refuse_name(folder: Path, name: str | None) -> NoReturn:
    """Raises SourceError for a ``name`` that ``folder`` does not have, with what is to do without one."""
    remedy = "leave the name out"
    try:
        splits.in_folder(folder)
    except SourceError as error:
        remedy += f", and {error.remedy}"
    names = [path.name for place in (folder, folder / "data") for path in splits.entries(place) if path.is_dir()]
    raise SourceError(folder, f"has no folder {excerpt(name)}{suggestion(str(name), names)}", remedy)


def check_here(value: Any, option: str = "data.source") -> None:
    """Check that what the ``value`` of an ``option`` for sources names here is there, and holds rows.

    Raises:
        UserError: for a file or folder that is not there, or no rows.
    """
    for source in sources_of(value, option):
        if not source.is_on_hub:
            find_splits(source)
            if source.here.is_file():
                kind_of(source.here)


def check_sources(options: Mapping[str, Any]) -> None:
    """Raises UserError for the first source in the ``options`` of the section ``data`` that is not there, or no rows.

    A list of sources that is still a text is passed.
    """
    for name in SOURCES:
        value = options.get(name)
        if value and not _is_json(value):
            check_here(value, f"data.{name}")


def are_here(value: Any) -> bool:
    """True if each source in an option's ``value`` is local and there."""
    try:
        check_here(value)
    except UserError:
        return False
    return not any(source.is_on_hub for source in sources_of(value))


def _looks_like_hub_id(source: str) -> bool:
    is_file = source.lower().endswith((*PLAIN_ENDINGS, *COMPRESSED, *filter(None, INSTEAD)))
    return not is_file and HUB_ID.fullmatch(source) is not None


def _ask_datasets(asked: Source, ask: Callable[..., T], **given: str | None) -> T:
    """The result of ``ask`` of `datasets` for a source, its revision and what is ``given``. Raises SourceError."""
    import datasets

    source = asked.path
    page = f"https://huggingface.co/datasets/{source}"
    given = {name: value for name, value in (given | {"revision": asked.revision}).items() if value is not None}
    try:
        return ask(source, **given)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SourceError(source, *_not_found(asked, page)) from error
    except ConnectionError as error:
        remedy = "check the network (and HF_HUB_OFFLINE), or give a local file"
        raise SourceError(source, "no such file here, and the hub can't be reached", remedy) from error
    except Exception as error:  # any other failure of `datasets` with the hub's files is no bug of ours
        if isinstance(error, ValueError) and (known := _configurations(asked)):
            what = f"no configuration {excerpt(asked.name)}" if asked.name else "has several configurations"
            remedy = f"give data.source as {{path: {source}, name: CONFIGURATION}}"
            raise SourceError(source, f"{what}, expected one of {excerpt(known)}", remedy) from error
        # Of most faults of a file, `datasets` says that there was one; what it was stands behind it.
        wraps = datasets.exceptions.DatasetGenerationError
        while isinstance(error, wraps) and isinstance(error.__context__, Exception):
            error = error.__context__
        # A CastError's first line is "Couldn't cast".
        cause = error.details() if isinstance(error, datasets.table.CastError) else first_line(error)
        problem = f"the hub's files can't be loaded ({type(error).__name__}: {cause})"
        raise SourceError(source, problem, f"see {page}") from error


def _not_found(asked: Source, page: str) -> tuple[str, str]:
    """Problem and remedy of a data set that `datasets` does not find, by the class of the hub's error."""
    import huggingface_hub as hub

    with suppress(Exception):  # whatever else it answers, if it does
        try:
            hub.auth_check(asked.path, repo_type="dataset")
        except hub.errors.GatedRepoError:
            return "is gated on the hub", f"accept its terms at {page} and set HF_TOKEN"
        if asked.revision and not hub.revision_exists(asked.path, asked.revision, repo_type="dataset"):
            remedy = "give a branch, a tag or a commit that it has, or leave the revision out"
            return f"has no revision {excerpt(asked.revision)} on the hub", remedy
    return "not found on the hub, and no such file here", "check the spelling, or set HF_TOKEN if it's private"


def _configurations(asked: Source) -> list[str]:
    """The configurations of a data set on the hub, if one of them has to be named and none is; else empty."""
    import datasets

    try:
        known: list[str] = datasets.get_dataset_config_names(asked.path, revision=asked.revision)
        chosen = asked.name or datasets.get_dataset_default_config_name(asked.path, revision=asked.revision)
    except Exception:  # which was the failure itself
        return []
    return known if chosen not in known else []
