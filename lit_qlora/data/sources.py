"""Owns where rows come from: the demo, a local file or folder, or a dataset on the hub; and what its splits are called.

`find_splits` lists the splits, `read_source` reads the rows of one. Knows no form of row; file formats are in files.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lit_qlora import demo
from lit_qlora.data.files import COMPRESSED, ENDINGS, Row, read_rows
from lit_qlora.data.forms import columns_of, forms_for
from lit_qlora.errors import UserError, excerpt, suggestion

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


@dataclass(frozen=True)
class Splits:
    """The splits of a source.

    Args:
        source: the demo, a file, a folder or a hub id.
        names: of each kind in `SPLITS` that it has, its name there.
        unread: what else it holds that looks like rows: other splits, or files.
        beside: of a file with training rows, those of the other splits, which stand in the same folder.
    """

    source: str
    names: Mapping[str, str]
    unread: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()

    def training(self) -> str:
        """The name of the rows to train on.

        Raises:
            UserError: there are none.
        """
        if "train" not in self.names:
            found = " and ".join([*self.names.values(), *self.unread])
            raise UserError(f"has no split 'train', found: {found}", place=self.source, remedy="choose another")
        return self.names["train"]

    def first(self, *kinds: str) -> str | None:
        """The name of the first of ``kinds`` that is there; None without any."""
        return next((self.names[kind] for kind in kinds if kind in self.names), None)


def find_splits(source: str) -> Splits:
    """Find the splits of a source; a file is all "train".

    Raises:
        UserError: when the source isn't found, or the hub can't be asked.
    """
    files = _find_files(source)
    if files is None:
        import datasets

        found = [str(name) for name in _ask_hub(source, lambda: datasets.get_dataset_split_names(source))]
    else:
        found = [*files]
    # On the hub, the plainest name is taken where there are several of a kind; a folder has one at most.
    names = {kind: name for kind, known in SPLITS.items() for name in reversed(known) for name in _named(found, name)}
    unread = [name for name in found if name not in names.values()] if files is None else _beside(source, files)
    return Splits(source, names, tuple(unread), _others_beside(source))


def _named(found: Iterable[str], name: str) -> list[str]:
    return [one for one in found if one.lower() == name]


def _beside(source: str, files: Mapping[str, Path]) -> list[str]:
    """What else a folder holds that looks like rows: files, and folders of such."""
    folder = Path(source).expanduser()
    if source == "demo" or not folder.is_dir():
        return []
    paths = [path for path in _entries(folder) if path not in files.values()]
    return [path.name for path in paths if _is_data(path)] + [
        f"{path.name}/" for path in paths if path.is_dir() and any(map(_is_data, _entries(path)))
    ]


def _others_beside(source: str) -> tuple[Path, ...]:
    """Where ``source`` is one file, named as a train split, the files of other splits in its folder."""
    path = Path(source).expanduser()
    if not path.is_file() or _stem(path.name, ENDINGS) not in SPLITS["train"]:
        return ()
    others = (*SPLITS["validation"], *SPLITS["test"])
    return tuple(one for one in _entries(path.parent) if _stem(one.name, ENDINGS) in others)


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, by name; empty if it can't be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_data(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ENDINGS)


def read_source(source: str, split: str = "train") -> list[Row]:
    """Read the rows of one split, by its name there.

    Raises:
        UserError: when the source or the split isn't found, or a file can't be read.
    """
    files = _find_files(source)
    if files is not None:
        if split not in files:
            raise UserError(
                f"has no split {excerpt(split)}, found: {' and '.join(files)}", place=source, remedy="choose another"
            )
        return read_rows(files[split], columns_of(forms_for("training")))
    import datasets

    values = _ask_hub(source, lambda: list(datasets.load_dataset(source, split=split)))
    return [Row(f"{source} ({split}): row {number}", value) for number, value in enumerate(values, 1)]


def _find_files(source: str) -> dict[str, Path] | None:
    """Returns a local source's files by the name of their split, or None for a dataset on the hub."""
    if not source.strip() or not source.isprintable():
        raise UserError(f"is {excerpt(source)}, expected 'demo', a file, a folder or a hub id", option="data.source")
    if source == "demo":
        return {"train": demo.TRAIN, "test": demo.TEST}
    path = Path(source).expanduser()
    if path.is_dir():
        return _find_in_folder(path)
    if path.exists():
        return {"train": path}
    if _looks_like_hub_id(source):
        return None
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(
        f"no such file{suggestion(path.name, names)}",
        place=source,
        remedy=(
            f"expected 'demo', a file ({', '.join(ENDINGS)}), a folder with train.jsonl, or a hub id such as owner/name"
        ),
    )


def _find_in_folder(folder: Path) -> dict[str, Path]:
    names = sorted(entry.name for entry in folder.iterdir())
    files: dict[str, Path] = {}
    for known in SPLITS.values():
        found = [name for name in names if _stem(name, ENDINGS) in known]
        # A compressed one beside is the same rows; by itself, it is refused when it is read.
        found = found or [name for name in names if _stem(_stem(name, COMPRESSED), (*ENDINGS, "")) in known]
        if len(found) > 1:
            raise UserError(
                f"holds both {found[0]} and {found[1]}, expected one", place=folder, remedy="keep one of them"
            )
        files |= {re.split(r"[.]|-0+-of-", name)[0]: folder / name for name in found}
    if not files:
        raise UserError(
            f"no train, validation or test file in this folder, expected train.jsonl ({', '.join(ENDINGS)}), "
            f"found: {excerpt(names)}",
            place=folder,
            remedy=_remedy(folder),
        )
    return files


def _stem(name: str, endings: Iterable[str]) -> str:
    """``name`` in small letters without the one of ``endings`` that it has; empty where it has none of them.

    Nor has it the number that the hub's files have, of a split that is whole in one of them: train-00000-of-00001.
    """
    name = name.lower()
    stem = next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), "")
    return re.sub(r"-0+-of-0*1$", "", stem)


def _remedy(folder: Path) -> str:
    """The remedy for a folder without a file named after a split."""
    files = [path for place in (folder, folder / "data") for path in _entries(place) if _is_data(path)]
    if any(_stem(path.name, ENDINGS) in known for path in files for known in SPLITS.values()):
        return f"give {folder / 'data'}"
    parts = [path for path in files if re.search(r"-\d+-of-0*[2-9]", path.name)]
    if parts:
        return f"put the parts of a split, such as {parts[0].relative_to(folder)}, together in one file, and name it"
    if files:
        return f"rename yours, or name the file itself, such as {files[0]}"
    return "put one there, or name the file itself"


def is_hub_id(source: str) -> bool:
    """True if a source is a hub id: nothing of that name is local, and it is written as an id."""
    return source != "demo" and not Path(source).expanduser().exists() and _looks_like_hub_id(source)


def _looks_like_hub_id(source: str) -> bool:
    is_file = Path(source).suffix.lower() in (*ENDINGS, *COMPRESSED, ".txt", ".tsv", ".xlsx")
    return not is_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None


def _ask_hub(source: str, ask: Callable[[], T]) -> T:
    import datasets

    page = f"https://huggingface.co/datasets/{source}"
    try:
        return ask()
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                "is gated on the hub", place=source, remedy=f"accept its terms at {page} and set HF_TOKEN"
            ) from error
        raise UserError(
            "not found on the hub, and no such file here",
            place=source,
            remedy="check the spelling, or set HF_TOKEN if it's private",
        ) from error
    except ConnectionError as error:
        raise UserError(
            "no such file here, and the hub can't be reached",
            place=source,
            remedy="check the network (and HF_HUB_OFFLINE), or give a local file",
        ) from error
    except Exception as error:  # any other failure of `datasets` with the hub's files is no bug of ours
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the hub's files can't be loaded ({type(error).__name__}: {cause})", place=source, remedy=f"see {page}"
        ) from error
