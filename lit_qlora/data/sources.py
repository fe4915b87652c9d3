"""Owns where rows come from: the demo, local files and folders, or data sets on the hub; and what splits are called.

`sources_of` reads what ``data.source`` and its kin say, `find_splits` lists the splits of one source, `read_source`
reads the rows of one split. Knows no form of row; file formats are in files.py.
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
from lit_qlora.data.files import COMPRESSED, ENDINGS, INSTEAD, OTHER_NAMES, PACKED, Row, SourceError, kind_of, read_rows
from lit_qlora.data.forms import columns_of, forms_for
from lit_qlora.errors import UserError, excerpt, require, suggestion
from lit_qlora.storage.files import parse_json

T = TypeVar("T")

SPLITS = {
    "train": ("train", "training", "train_sft"),
    "validation": (
        "validation", "valid", "val", "dev", "development", "eval", "evaluation",
        "validation_sft", "valid_sft", "val_sft", "dev_sft", "eval_sft",
    ),
    "test": ("test", "testing", "test_sft"),
}  # fmt: skip
"""What a split is for, and the names that it has in folders and on the hub, in small letters."""
SPLIT_NAMES = {name for names in SPLITS.values() for name in names}

SourceOption = str | list[str | dict[str, str | float | dict[str, str]]] | dict[str, str | float | dict[str, str]]
"""What an option for sources takes: one, or a list of them, each a text, or a table with the keys of `Source`."""

PLAIN = (*ENDINGS, *OTHER_NAMES)
FILES = (*PLAIN, *(ending + packing for ending in PLAIN for packing in PACKED))
"""Endings of files with rows, the plain ones first."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""How an id on the hub is written."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files about a data set."""
SHARD = re.compile(r"^(.+?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?$")
"""One of the files that a split of the hub's is kept in: train-00000-of-00002, with a hash behind it in older ones."""


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
    columns_option: str = field(default="data.columns", compare=False)

    def __str__(self) -> str:
        """What it is called in messages."""
        return self.path + (f", {self.name}" if self.name else "")

    @property
    def place(self) -> "Source":
        """The same by an absolute path: equal for two sources that are one."""
        path = str(Path(self.path).expanduser().resolve()) if not is_hub_id(self) else self.path
        return Source(path, self.name, self.split, self.revision)

    def called(self, split: str) -> str:
        """What one of its splits is called in messages."""
        return f"{self} ({split})" if split != "train" else str(self)


KEYS = ("path", "name", "split", "revision", "share", "columns")


def sources_of(value: Any, option: str = "data.source") -> tuple[Source, ...]:
    """The sources that the value of an option stands for: at least one.

    Args:
        value: a text, a table or a list of them, as `SourceOption` has it; also a list or a table written as JSON.
        option: for messages.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, str) and value.startswith(("[", "{")):  # as `as_text` writes it, or a command line
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


def as_text(value: Any) -> str | None:
    """The value of an option for sources as a text, which `sources_of` reads."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def paths_of(value: Any) -> list[str]:
    """The paths of the sources that the value of an option stands for."""
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
    expected = f"a source, a table of {', '.join(KEYS)}, or a list of them"
    require(isinstance(value, Mapping), option, expected, value)
    for key in value:
        if key not in KEYS:
            known = f"expected {', '.join(KEYS)}{suggestion(str(key), [*KEYS])}"
            raise UserError(f"{excerpt(key)} is unknown, {known}", option=option)
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


@dataclass(frozen=True)
class Splits:
    """The splits of a source.

    Args:
        source: the demo, a file, a folder, a pattern or a hub id.
        names: of each kind in `SPLITS` that it has, its name there.
        unread: what else it holds that looks like rows: other splits, or files.
        beside: of a file or folder named for training, those named for other splits, which stand in the same folder.
        is_chosen: whether the source itself names the split, which is the training rows then.
    """

    source: str
    names: Mapping[str, str]
    unread: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()
    is_chosen: bool = False

    def training(self) -> str:
        """The name of the rows to train on.

        Raises:
            UserError: there are none.
        """
        if "train" not in self.names:
            found = [*self.names.values(), *self.unread]
            remedy = f"name the one to train on in the source, such as {{path: …, split: {found[0]}}}"
            raise SourceError(self.source, f"has no split 'train', found: {' and '.join(found)}", remedy)
        return self.names["train"]

    def first(self, *kinds: str) -> str | None:
        """The name of the first of ``kinds`` that is there; None without any."""
        return next((self.names[kind] for kind in kinds if kind in self.names), None)

    def for_scoring(self, *kinds: str) -> str:
        """The name of the rows to score where the source is there for that: the chosen one, or the first of ``kinds``.

        Raises:
            UserError: as `training`, which is taken where there is none of them.
        """
        return self.training() if self.is_chosen else self.first(*kinds) or self.training()


def find_splits(source: str | Source) -> Splits:
    """Find the splits of a source; a file is all "train".

    Raises:
        UserError: when the source isn't found, has not the split that it names, or the hub can't be asked.
    """
    source = _source(source, "data.source")
    files = _find_files(source)
    if files is None:
        import datasets

        ask = datasets.get_dataset_split_names
        found = [str(name) for name in _ask_hub(source, ask, config_name=source.name)]
    else:
        found = [*files]
    # On the hub, the plainest name is taken where there are several of a kind; a folder has one at most.
    names = {
        kind: name for kind, known in SPLITS.items() for one in reversed(known) for name in found if name.lower() == one
    }
    chosen = [re.sub(r"\[.*", "", part).strip() for part in source.split.split("+")] if source.split else []
    for name in chosen:
        _check_split(source, name, found)
    if source.split:
        others = {kind: name for kind, name in names.items() if kind != "train" and name not in chosen}
        names = {"train": source.split} | others
    unread = [name for name in found if name not in (*names.values(), *chosen)]
    unread += [] if files is None else _beside(source, files)
    return Splits(str(source), names, tuple(unread), _others_beside(source.path), bool(source.split))


def _check_split(source: Source, name: str, found: Sequence[str]) -> None:
    if name not in found:
        problem = f"has no split {excerpt(name)}, found: {' and '.join(found)}{suggestion(name, found)}"
        is_made_up = not {"[", "+"}.isdisjoint(name)  # as the hub's library reads it, of the hub's alone
        remedy = "of local rows, a share gives a part, and a list of sources several splits"
        raise SourceError(source, problem, remedy if is_made_up else "choose another")


def _beside(source: Source, files: Mapping[str, list[Path]]) -> list[str]:
    """What else a folder holds that looks like rows: files, and folders of such."""
    folder = Path(source.path).expanduser()
    if source.path == "demo" or not folder.is_dir():
        return []
    used = {path for paths in files.values() for path in paths}
    around = {parent for path in used for parent in path.parents}
    found: list[Path] = []
    for place in [folder, *sorted(around - {folder, *folder.parents})]:
        # A packed one beside a used one is the same rows.
        found += [path for path in _entries(place) if not {path, path.with_suffix("")} & (used | around)]
    plain = [path for path in found if _is_data(path)]
    full = [path for path in found if path.is_dir() and any(map(_is_data, _entries(path)))]
    return [str(path.relative_to(folder)) for path in plain] + [f"{path.relative_to(folder)}/" for path in full]


def _others_beside(source: str) -> tuple[Path, ...]:
    """Where ``source``, or the folder of its file, is named for training, what is named likewise for another split."""
    path = Path(source).expanduser()
    for ours in (path, path.parent) if path.is_file() else (path,):
        kind, others = _named(ours)
        if kind == "train" and ours.exists():
            there = [one for one in _entries(ours.parent) if _named(one) in (("validation", others), ("test", others))]
            return tuple(one for one in there if any(map(_is_data, _entries(one) if one.is_dir() else [one])))
    return ()


def _named(path: Path) -> tuple[str | None, list[str]]:
    """What the rows of a file or folder are for by its name, and the other words of it."""
    name = path.name.lower() if path.is_dir() else _split_name(path)
    words = [name] if name in SPLIT_NAMES else re.split(r"[^a-z0-9]+", name)
    return _kind_named(*words), [word for word in words if word not in SPLIT_NAMES]


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, by name; empty if it can't be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(FILES) and path.name not in NO_ROWS and path.is_file()


def local_bytes(source: str | Source, split: str = "train") -> int | None:
    """The size of a split's files on this machine; None for one on the hub.

    Args:
        source: where rows come from.
        split: name of the split there.

    Raises:
        UserError: as `read_source`.
    """
    source = _source(source, "data.source")
    files = _find_files(source)
    if files is None:
        return None
    _check_split(source, split, [*files])
    return sum(path.stat().st_size for path in files[split] if path.is_file())


def read_source(source: str | Source, split: str = "train", columns: Sequence[str] = ()) -> list[Row]:
    """Read the rows of one split, by its name there.

    Args:
        source: that one.
        split: the split's name.
        columns: names of columns, beside those of the known forms, that the first line of a .csv may have.

    Raises:
        UserError: when the source or the split isn't found, or a file can't be read.
    """
    source = _source(source, "data.source")
    files = _find_files(source)
    if files is not None:
        _check_split(source, split, [*files])
        known = [*columns, *columns_of(forms_for("training"))]
        return [row for path in files[split] for row in read_rows(path, known)]
    import datasets

    def rows(*path: str, **given: str | None) -> list[dict[str, Any]]:
        return list(datasets.load_dataset(*path, split=split, **given))

    values = _ask_hub(source, rows, name=source.name)
    return [Row(f"{source} ({split}): row {number}", value) for number, value in enumerate(values, 1)]


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
    if source.name and (source.path == "demo" or not Path(source.path).expanduser().is_dir()):
        raise SourceError(source.path, f"is no folder, and has no {excerpt(source.name)}", remedy)
    return files


def _files_here(source: Source) -> dict[str, list[Path]] | None:
    if source.path == "demo":
        return {"train": [demo.TRAIN], "test": [demo.TEST]}
    path = Path(source.path).expanduser()
    if path.is_dir():
        named = [path / source.name, path / "data" / source.name] if source.name else [path]
        within = next((one for one in named if one.is_dir()), None)
        return _find_in_folder(within) if within else _refuse_name(path, source.name)
    if path.exists():
        return {"train": [path]}
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  # of any folder
    if found:
        return _by_names([one for one in found if _is_data(one)] or found)
    if _looks_like_hub_id(source.path):
        return None
    if page := re.match(rf"https?://[^/]+/datasets/({HUB_ID.pattern})", source.path, re.ASCII):
        raise SourceError(source.path, "is a page of the hub", f"give the id alone, {page[1]}")
    if "://" in source.path:
        raise SourceError(source.path, "is an address", "download the file, and give the file here")
    if glob.has_magic(source.path):
        raise SourceError(source.path, "no such file: the pattern matches none", "check its folder and its ending")
    names = ["demo", *((entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ())]
    remedy = (
        f"expected 'demo', a file ({', '.join(ENDINGS)}), a folder with train.jsonl, or a hub id such as owner/name"
    )
    raise SourceError(source.path, f"no such file{suggestion(path.name, names)}", remedy)


def _refuse_name(folder: Path, name: str | None) -> NoReturn:
    """Raises SourceError for a ``name`` that ``folder`` does not have, with what is to do without one."""
    remedy = "leave the name out"
    try:
        _find_in_folder(folder)
    except SourceError as error:
        remedy += f", and {error.remedy}"
    names = [path.name for place in (folder, folder / "data") for path in _entries(place) if path.is_dir()]
    raise SourceError(folder, f"has no folder {excerpt(name)}{suggestion(str(name), names)}", remedy)


def _by_names(paths: list[Path]) -> dict[str, list[Path]]:
    """Files of a pattern: each is training rows, if no name says that it is another split.

    As in a folder, that is the file's whole name, or its folder's, or else a part of its name.
    """
    exact = [_kind(path) if _is_exact(path) else None for path in paths]
    by_folder = [_kind_named(path.parent.name.lower()) for path in paths]
    kinds = next((one for one in (exact, by_folder, [*map(_kind, paths)]) if "train" in one), exact)
    files: dict[str, list[Path]] = {}
    for path, kind in zip(paths, kinds, strict=True):
        files.setdefault(kind or "train", []).append(path)
    return files if "train" in files else {"train": paths}


def _find_in_folder(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder's splits.

    It may be as ``save_to_disk`` leaves one, or have a file for each split, or the parts of it, itself or in a folder
    ``data``; or a folder for each split; or files that have the split somewhere in their names; or a single file.
    """
    if (folder / "dataset_dict.json").is_file():
        names = parse_json((folder / "dataset_dict.json").read_bytes())["splits"]
        return {str(name): _saved(folder / str(name)) for name in names}
    if (folder / "state.json").is_file():
        return {"train": _saved(folder)}
    for place in (folder, folder / "data"):
        data = [path for path in _entries(place) if _is_data(path)]
        exact, named = [path for path in data if _is_exact(path)], [path for path in data if _kind(path)]
        files = _by_split(place, exact) or _by_folder(place)
        if not files and any(_kind(path) == "train" for path in named):
            files = _by_split(place, named)
        if files:
            return files
    within = [path for place in (folder, folder / "data") for path in _entries(place) if _has_splits(path)]
    if len(within) == 1:
        return _find_in_folder(within[0])
    data = [path for place in (folder, folder / "data") for path in _entries(place) if _is_data(path)]
    if len(data) == 1 and not within:
        return {"train": data}
    expected = (
        f"expected train.jsonl ({', '.join(ENDINGS)}), found: {excerpt([path.name for path in _entries(folder)])}"
    )
    problem = f"no train, validation or test file in this folder, {expected}"
    if within:
        names = ", ".join(path.name for path in within)
        raise SourceError(folder, problem, f"name one of its folders ({names}), such as {within[0]}")
    if data:
        pattern = f"{data[0].parent}/*{data[0].suffix}"
        remedy = f"rename yours, or name the file itself, such as {data[0]}, or all with {pattern}"
        raise SourceError(folder, problem, remedy)
    raise SourceError(folder, problem, "put one there, or name the file itself")


def _has_splits(folder: Path) -> bool:
    return any(_is_data(path) and _is_exact(path) for path in _entries(folder)) or bool(_by_folder(folder))


def _saved(folder: Path) -> list[Path]:
    """The files of rows that ``datasets`` saved in a folder. Raises SourceError where one is gone."""
    try:
        state = parse_json((folder / "state.json").read_bytes())
        paths = [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "can't be read as datasets.save_to_disk left it"
        raise SourceError(folder / "state.json", problem, "save it again") from error
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise SourceError(folder, f"has no {gone[0]}, which its state.json names", "copy it again")
    return paths


def _by_split(folder: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """``paths`` by the name of their split. Raises SourceError where two files are one split, or a part is gone."""
    files: dict[str, list[Path]] = {}
    for kind in SPLITS:
        found = [path for path in paths if _kind(path) == kind]
        # A packed one beside is the same rows.
        plain = [path for path in found if path.name.lower().endswith(PLAIN)]
        found = plain or found
        if not found:
            continue
        shards = [SHARD.match(_bare(path)) for path in found]
        parts = [shard for shard in shards if shard]
        if len(found) > 1 and (len(parts) < len(found) or len({(part[1], part[3]) for part in parts}) > 1):
            both = f", or give both: data.source [{found[0]}, {found[1]}]" if kind == "train" else ""
            remedy = f"keep one of them{both}"
            raise SourceError(folder, f"holds both {found[0].name} and {found[1].name}, expected one", remedy)
        if parts and (missing := {*range(int(parts[0][3]))} - {int(part[2]) for part in parts}):
            of_all = f"has {len(parts)} of the {int(parts[0][3])} parts of {parts[0][1]}"
            raise SourceError(folder, f"{of_all}: number {min(missing):05} is missing", "copy the others, too")
        name = parts[0][1] if parts else _bare(found[0])
        files[name if _is_exact(found[0]) else kind] = found
    return files


def _by_folder(folder: Path) -> dict[str, list[Path]]:
    """Of folders that are named as splits, the files."""
    found = {path.name: [one for one in _entries(path) if _is_data(one)] for path in _entries(folder) if path.is_dir()}
    return {name: paths for name, paths in found.items() if name.lower() in SPLIT_NAMES and paths}


def _bare(path: Path) -> str:
    """A file's name without its ending."""
    ending = next((one for one in sorted(FILES, key=len, reverse=True) if path.name.lower().endswith(one)), "")
    return path.name[: len(path.name) - len(ending)] if ending else ""


def _split_name(path: Path) -> str:
    """A file's name in small letters, without its ending and the number of its shard."""
    return SHARD.sub(r"\1", _bare(path)).lower()


def _is_exact(path: Path) -> bool:
    """Whether a file's name is a split's, and nothing else."""
    return _split_name(path) in SPLIT_NAMES


def _kind(path: Path) -> str | None:
    """What the rows of a file are for, if its name says it somewhere: ``train``, ``validation`` or ``test``."""
    words = [_split_name(path)] if _is_exact(path) else re.split(r"[^a-z]+", _bare(path).lower())
    return _kind_named(*words)


def _kind_named(*words: str) -> str | None:
    """The first of `SPLITS` that one of ``words`` names."""
    return next((kind for kind, known in SPLITS.items() if {*words} & {*known}), None)


def check_here(value: Any, option: str = "data.source") -> None:
    """Raises UserError for a file or folder in the value of an ``option`` for sources that is not there, or no rows."""
    for source in sources_of(value, option):
        if not is_hub_id(source):
            find_splits(source)
            if (path := Path(source.path).expanduser()).is_file():
                kind_of(path)


def check_sources(options: Mapping[str, Any]) -> None:
    """Raises UserError for the first source in the section ``data`` that is not there, or no rows.

    A list of sources that is still a text is passed.
    """
    for name in ("source", "validation_source", "test_source"):
        value = options.get(name)
        if value and not (isinstance(value, str) and value.lstrip().startswith(("[", "{"))):
            check_here(value, f"data.{name}")


def are_here(value: Any) -> bool:
    """True if each source in an option's value is local and there."""
    try:
        check_here(value)
    except UserError:
        return False
    return not any(map(is_hub_id, sources_of(value, "data.source")))


def is_hub_id(source: str | Source) -> bool:
    """True if a source is a hub id: nothing of that name is local, and it is written as an id."""
    path = _source(source, "data.source").path
    return path != "demo" and not Path(path).expanduser().exists() and _looks_like_hub_id(path)


def _looks_like_hub_id(source: str) -> bool:
    is_file = source.lower().endswith((*PLAIN, *COMPRESSED, *filter(None, INSTEAD)))
    return not is_file and HUB_ID.fullmatch(source) is not None


def _ask_hub(asked: Source, ask: Callable[..., T], **given: str | None) -> T:
    """What ``ask`` of `datasets` returns for a source, its revision and what else is ``given``. Raises SourceError."""
    import datasets

    source = asked.path
    page = f"https://huggingface.co/datasets/{source}"
    given = {name: value for name, value in (given | {"revision": asked.revision}).items() if value is not None}
    try:
        return ask(source, **given)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            remedy = f"accept its terms at {page} and set HF_TOKEN"
            raise SourceError(source, "is gated on the hub", remedy) from error
        if asked.revision and "Revision" in str(error):
            remedy = "give a branch, a tag or a commit that it has, or leave the revision out"
            raise SourceError(source, f"has no revision {excerpt(asked.revision)} on the hub", remedy) from error
        remedy = "check the spelling, or set HF_TOKEN if it's private"
        raise SourceError(source, "not found on the hub, and no such file here", remedy) from error
    except ConnectionError as error:
        remedy = "check the network (and HF_HUB_OFFLINE), or give a local file"
        raise SourceError(source, "no such file here, and the hub can't be reached", remedy) from error
    except Exception as error:  # any other failure of `datasets` with the hub's files is no bug of ours
        configs = re.search(r"(?:[Cc]onfig name is missing|BuilderConfig .* not found).*?(\[.*?\])", str(error), re.S)
        if configs:
            what = f"no configuration {excerpt(asked.name)}" if asked.name else "has several configurations"
            remedy = f"give data.source as {{path: {source}, name: CONFIGURATION}}"
            raise SourceError(source, f"{what}, expected one of {excerpt(configs[1])}", remedy) from error
        # Of most faults of a file, `datasets` says this alone; what it was stands behind it, or in the cause.
        opens = "An error occurred while generating the dataset"
        while not (said := str(error).removeprefix(opens).strip()) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        cause = said.partition("\n")[0]
        if isinstance(error, datasets.table.CastError):  # its first line is "Couldn't cast"
            cause = error.details()
        problem = f"the hub's files can't be loaded ({type(error).__name__}: {cause})"
        raise SourceError(source, problem, f"see {page}") from error
