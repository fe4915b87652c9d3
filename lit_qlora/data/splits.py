"""Owns the names of splits, training, validation and test; and by them, which files on this machine are which.

The hub and columns of tables have the same names. In a folder a split may be a file, the parts of one, a folder, or
what datasets.save_to_disk has left. Asks no hub; knows no form of row, and nothing of what the files hold.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lit_qlora.data.row_files import ENDINGS, OTHER_NAMES, PACKED, SourceError
from lit_qlora.errors import excerpt
from lit_qlora.storage.files import parse_json
from lit_qlora.wording import number_of

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
HELD_KINDS = ("validation", "test")
SAY_NOTHING = {"data", "dataset", "set", "split", "rows", "file"}
"""Words beside a split's name that say no more: ``val_data.jsonl``."""

COLUMNS = ("split", "subset", "partition", "set", "fold", "data_split", "dataset_split")
"""Columns of a table that may name the split of each row, in small letters."""

PLAIN_ENDINGS = (*ENDINGS, *OTHER_NAMES)
FILES = (*PLAIN_ENDINGS, *(ending + packing for ending in PLAIN_ENDINGS for packing in PACKED))
"""Endings of files with rows, the plain ones first."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files about a data set."""
MOST_FILES = 8
"""Most files to name; of more, their number."""
SHARD = re.compile(r"^(.+?)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?$")
"""One of the files that a split of the hub's is kept in: train-00000-of-00002, with a hash behind it in older ones."""


@dataclass(frozen=True)
class Splits:
    """The splits of a source.

    Args:
        source: the demo, a file, a folder, a pattern or a hub id.
        names: name of the split of each kind in `SPLITS` that the source has.
        unread: other splits or files of it that look like rows.
        beside: files or folders for other splits, beside a file or folder that is named for training.
        is_chosen: True if the source itself names the split, which is the training rows then.
        note: a line on which files of a pattern are the training rows; empty for none.
    """

    source: str
    names: Mapping[str, str]
    unread: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()
    is_chosen: bool = False
    note: str = ""

    def without(self, taken: Collection[str | None]) -> "Splits":
        """These splits without those called ``taken``, except for the training rows."""
        names = {kind: name for kind, name in self.names.items() if kind == "train" or name not in taken}
        return replace(self, names=names, unread=tuple(name for name in self.unread if name not in taken))

    def training(self) -> str:
        """The name of the rows to train on.

        Raises:
            UserError: there are none.
        """
        if "train" not in self.names:
            found = [*self.names.values(), *self.unread]
            files = [one for one in self.unread if one.endswith((*FILES, "/"))]
            split = next(iter((*self.unread, *self.names.values())), "NAME")
            remedy = f"name the one to train on in the source, such as {{path: …, split: {split}}}"
            if files:
                name = "train/" if files[0].endswith("/") else f"train{files[0].removeprefix(_stem(Path(files[0])))}"
                remedy = f"rename {files[0]} {name}, or give {self.source}/{files[0]} itself"
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


class _Name(NamedTuple):
    """What the name of a file or folder says: the kind of its split, that kind if it says nothing else, other words."""

    kind: str | None
    exact: str | None
    others: list[str]


def _name_of(path: Path) -> _Name:
    """What a name says, without the ending and the number of a shard."""
    name = path.name if path.is_dir() else SHARD.sub(r"\1", _stem(path))
    words = [_without_set(word) for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+|[0-9]+", name)]
    words = [name.lower()] if name.lower() in SPLIT_NAMES else words
    kind = next((kind for kind, known in SPLITS.items() if {*words} & {*known}), None)
    return _Name(
        kind, kind if name.lower() in SPLIT_NAMES else None, [word for word in words if word not in SPLIT_NAMES]
    )


def _without_set(word: str) -> str:
    """A word of a name in small letters, and a split's without what may be written behind it: ``trainset``."""
    word = word.lower()
    return next((short for end in ("set", "data") if (short := word.removesuffix(end)) in SPLIT_NAMES), word)


def _stem(path: Path) -> str:
    """A file's name without its ending; empty where that is not one of rows."""
    ending = next((one for one in sorted(FILES, key=len, reverse=True) if path.name.lower().endswith(one)), "")
    return path.name[: len(path.name) - len(ending)] if ending else ""


def entries(folder: Path) -> list[Path]:
    """The entries of a ``folder``, by name; empty if it can't be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def is_data(path: Path) -> bool:
    """True for a file of rows at ``path``, by its name."""
    return path.name.lower().endswith(FILES) and path.name not in NO_ROWS and path.is_file()


def data_among(paths: Sequence[Path]) -> list[Path]:
    """The files of rows among ``paths``, without packed ones beside the same unpacked."""
    return [
        path for path in paths if is_data(path) and (path.suffix not in PACKED or path.with_suffix("") not in paths)
    ]


def _data_in(folder: Path) -> list[Path]:
    return data_among(entries(folder))


def kind_named(name: object) -> str | None:
    """The kind of the split called ``name``; None for any other value."""
    return next((kind for kind, known in SPLITS.items() if str(name).strip().lower() in known), None)


def names_by_kind(found: Sequence[str]) -> dict[str, str]:
    """The split in ``found`` that is named for each kind in `SPLITS`; the plainest name of several, as on the hub."""
    return {
        kind: name for kind, known in SPLITS.items() for one in reversed(known) for name in found if name.lower() == one
    }


def names_beside(chosen: str, found: Sequence[str]) -> dict[str, str]:
    """The split of each other kind that is named like a given one: ``test_prefs`` beside ``train_prefs``.

    Args:
        chosen: name of a split.
        found: names of all.
    """
    likely = {kind: [chosen.replace("train", word) for word in words] for kind, words in SPLITS.items()}
    named = {kind: name for kind, names in likely.items() for name in reversed(names) if name in found}
    return {kind: name for kind, name in named.items() if kind != "train" and name != chosen}


def by_names(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of a pattern, ``paths``, by split: training rows, if no name says that it is another one.

    As in a folder, that is the file's whole name, or its folder's, or else a part of its name; where none is named for
    training, a part beside the name of another file.
    """
    names = [_name_of(path) for path in paths]
    whole = [_whole_kind(path) for path in paths]
    plain = [name.others for name in names if not name.kind]
    of_plain = [kind or (name.kind if name.others in plain else None) for kind, name in zip(whole, names, strict=True)]
    kinds = next((one for one in (whole, [name.kind for name in names]) if "train" in one), of_plain)
    files: dict[str, list[Path]] = {}
    for path, kind in zip(paths, kinds, strict=True):
        files.setdefault(kind or "train", []).append(path)
    return files if "train" in files else {"train": [*paths]}


def _whole_kind(path: Path) -> str | None:
    """The kind of split that a file's name says and nothing else, or its folder's."""
    name = _name_of(path)
    return name.kind if {*name.others} <= SAY_NOTHING else _name_of(path.parent).exact


def note_of(files: Mapping[str, list[Path]], matched: Sequence[Path]) -> str:
    """A note on a pattern's ``files``: how many are training rows, which look held out, which part is missing.

    It may be meant so, unlike in a folder: a pattern can ask for some of the parts. What it ``matched`` beside them is
    not read, and named; but neither a folder without rows of its own, nor a packed file beside the same unpacked.
    """
    paths = files["train"]
    others = {path.name: kind for path in paths if (kind := _whole_kind(path) or _name_of(path).kind) in HELD_KINDS}
    found = f"{number_of(len(paths), 'files')} to train on"
    for name, kind in [*others.items()][:1]:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        found += f", with {name}{more}: if it is for {kind}, leave it out and give it as data.{kind}_source"
    used = [path for paths in files.values() for path in paths]
    around = {*used, *(parent for path in used for parent in path.parents)}
    left = [one for one in matched if not {one, one.with_suffix("")} & around and (one.is_file() or _data_in(one))]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in left[:MOST_FILES]]
    names += [f"{len(left) - MOST_FILES:,} more"] if len(left) > MOST_FILES else []
    return "; ".join([found, *([f"not read: {', '.join(names)}"] if left else []), *_missing(used)])


def in_folder(folder: Path) -> dict[str, list[Path]]:
    """The files of the splits in a ``folder``, by the name of the split.

    It may be as ``save_to_disk`` leaves one, or have a file for each split, or the parts of it, itself or in a folder
    ``data``; or a folder for each split; or files that have the split somewhere in their names; or a single file.
    Raises UserError for none of these, and where a file is there twice or not whole.
    """
    if (folder / "dataset_dict.json").is_file():
        return {name: _saved(folder / name) for name in _named_in(folder / "dataset_dict.json", "splits")}
    if (folder / "state.json").is_file():
        return {"train": _saved(folder)}
    places = (folder, folder / "data")
    for place in places:
        named = {path: name for path in _data_in(place) if (name := _name_of(path)).kind}
        files = _by_folder(place) | _by_split(place, {path: name for path, name in named.items() if name.exact})
        if "train" not in names_by_kind([*files]) and any(name.kind == "train" for name in named.values()):
            files = _by_folder(place) | _by_split(place, named)
        if files:
            return files
    within = [path for place in places for path in entries(place) if _has_splits(path)]
    if len(within) == 1:
        return in_folder(within[0])
    data = [path for place in places for path in _data_in(place)]
    if len(data) == 1 and not within:
        return {"train": data}
    found = excerpt([path.name for path in entries(folder)])
    expected = f"expected train.jsonl ({', '.join(ENDINGS)}), found: {found}"
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
    return any(_name_of(path).exact for path in _data_in(folder)) or bool(_by_folder(folder))


def _saved(folder: Path) -> list[Path]:
    """The files of rows that ``datasets`` saved in a folder. Raises SourceError where one is gone."""
    paths = [folder / name for name in _named_in(folder / "state.json", "_data_files", "filename")]
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise SourceError(folder, f"has no {gone[0]}, which its state.json names", "copy it again")
    return paths


def _named_in(file: Path, key: str, within: str | None = None) -> list[str]:
    """The names that ``datasets`` wrote into a file. Raises SourceError where it can't be read."""
    try:
        found = parse_json(file.read_bytes())[key]
        names = [str(one if within is None else one[within]) for one in found]
        if not names:
            raise ValueError("names nothing")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SourceError(file, "can't be read as datasets.save_to_disk left it", "save it again") from error
    return names


def _by_split(folder: Path, named: Mapping[Path, _Name]) -> dict[str, list[Path]]:
    """Files by the name of their split. Raises SourceError where two files are one split, or a part is gone."""
    files: dict[str, list[Path]] = {}
    for kind in SPLITS:
        found = [path for path, name in named.items() if name.kind == kind]
        if not found:
            continue
        parts = [shard for path in found if (shard := SHARD.match(_stem(path)))]
        if len(found) > 1 and (len(parts) < len(found) or len({(part[1], part[3]) for part in parts}) > 1):
            endings = {path.name.removeprefix(_stem(path)) for path in found}
            both = f"{folder}/*{min(endings)}" if len(endings) == 1 else f"data.source [{found[0]}, {found[1]}]"
            remedy = "keep one of them" + (f", or give both: {both}" if kind == "train" else "")
            raise SourceError(folder, f"holds both {found[0].name} and {found[1].name}, expected one", remedy)
        _check_parts(folder, found)
        name = parts[0][1] if parts else _stem(found[0])
        files[name if named[found[0]].exact else kind] = found
    return files


def _by_folder(folder: Path) -> dict[str, list[Path]]:
    """The files of subfolders that are named as splits, by the subfolder's name."""
    found = {path: _data_in(path) for path in entries(folder) if path.is_dir() and path.name.lower() in SPLIT_NAMES}
    for path, paths in found.items():
        _check_parts(path, paths)
    return {path.name: paths for path, paths in found.items() if paths}


def _check_parts(folder: Path, paths: Sequence[Path]) -> None:
    """Raises SourceError where a part of a split is gone."""
    if missing := _missing(paths):
        raise SourceError(folder, missing[0], "copy the others, too")


def _missing(paths: Sequence[Path]) -> list[str]:
    """A line for each split of which ``paths`` has some parts, but not all."""
    numbers = dict[tuple[Path, str, int], set[int]]()
    for path in paths:
        if part := SHARD.match(_stem(path)):
            numbers.setdefault((path.parent, part[1], int(part[3])), set()).add(int(part[2]))
    found = []
    for (_, name, count), there in numbers.items():
        first = 1 if count in there else 0  # as some count
        if gone := {*range(first, first + count)} - there:
            found.append(f"has {len(there)} of the {count} parts of {name}: number {min(gone):05} is missing")
    return found


def beside(folder: Path, files: Mapping[str, list[Path]]) -> list[str]:
    """Files and folders in a folder that look like rows, beside the files of its splits.

    Args:
        folder: the source's; empty for a file.
        files: of its splits, by their names.
    """
    if not folder.is_dir():
        return []
    used = {path for paths in files.values() for path in paths}
    around = {parent for path in used for parent in path.parents}
    found: list[Path] = []
    for place in [folder, *sorted(around - {folder, *folder.parents})]:
        # A packed one beside a used one is the same rows.
        found += [path for path in entries(place) if not {path, path.with_suffix("")} & (used | around)]
    plain = [path for path in found if is_data(path)]
    full = [path for path in found if path.is_dir() and _data_in(path)]
    return [str(path.relative_to(folder)) for path in plain] + [f"{path.relative_to(folder)}/" for path in full]


def others_beside(path: Path) -> tuple[Path, ...]:
    """Files or folders named like ``path``, or its folder, but for another split, if that is named for training."""
    for ours in (path, path.parent) if path.is_file() else (path,):
        own = _name_of(ours)
        if own.kind == "train" and ours.exists():
            named = {one: _name_of(one) for one in entries(ours.parent)}
            there = [one for one, name in named.items() if name.others == own.others and name.kind in HELD_KINDS]
            return tuple(one for one in there if (_data_in(one) if one.is_dir() else is_data(one)))
    return ()
