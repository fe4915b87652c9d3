"""Owns where rows come from: the demo, a local file or folder, or a dataset on the hub.

`read_source` gives the rows of one split. Knows no form of row; the formats of files are files.py's.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lit_qlora import demo
from lit_qlora.data.files import COMPRESSED, ENDINGS, Row, excerpt, nearest, read_rows
from lit_qlora.errors import UserError

T = TypeVar("T")


def has_split(source: str, split: str) -> bool:
    """Whether a source has a split: the demo and folders may have both, a file is all "train".

    Raises:
        UserError: when the source isn't found, or the hub can't be asked.
    """
    files = _find_files(source)
    if files is not None:
        return split in files
    import datasets

    return split in _ask_hub(source, lambda: datasets.get_dataset_split_names(source))


def read_source(source: str, split: str) -> tuple[list[Row], bool]:
    """Reads the rows of one split, and tells whether a wrong one can be mended in an editor.

    Raises:
        UserError: when the source or the split isn't found, or a file can't be read.
    """
    files = _find_files(source)
    if files is not None:
        if split not in files:
            raise UserError(f"{source}: has no split {split!r}, found: {' and '.join(files)}; choose another")
        return read_rows(files[split]), files[split].suffix.lower() != ".parquet"
    import datasets

    values = _ask_hub(source, lambda: list(datasets.load_dataset(source, split=split)))
    return [Row(f"{source} ({split}): row {number}", value) for number, value in enumerate(values, 1)], False


def _find_files(source: str) -> dict[str, Path] | None:
    """Returns a local source's files by split, or None for a dataset on the hub."""
    if not source.strip() or not source.isprintable():
        raise UserError(f"data.source: is {source!r}, expected 'demo', a file, a folder or a hub id")
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
        f"{source}: no such file{nearest(path.name, names)}; expected 'demo', a file ({', '.join(ENDINGS)}),"
        " a folder with train.jsonl, or a hub id such as owner/name"
    )


def _find_in_folder(folder: Path) -> dict[str, Path]:
    names = sorted(entry.name for entry in folder.iterdir())
    files: dict[str, Path] = {}
    for split in ("train", "test"):
        found = [name for name in names if name in {f"{split}{ending}" for ending in ENDINGS}]
        if len(found) > 1:
            raise UserError(f"{folder}: holds both {found[0]} and {found[1]}, expected one; keep one of them")
        if found:
            files[split] = folder / found[0]
    if not files:
        raise UserError(
            f"{folder}: no train or test file in this folder, expected train.jsonl ({', '.join(ENDINGS)}),"
            f" found: {excerpt(names)}; rename yours, or name the file itself"
        )
    return files


def is_hub_id(source: str) -> bool:
    """Whether a source is meant for the hub: nothing of that name is here, and it is written as an id."""
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
            raise UserError(f"{source}: is gated on the hub; accept its terms at {page} and set HF_TOKEN") from error
        raise UserError(
            f"{source}: not found on the hub, and no such file here; check the spelling, or set HF_TOKEN"
            " if it's private"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{source}: no such file here, and the hub can't be reached; check the network (and"
            " HF_HUB_OFFLINE), or give a local file"
        ) from error
    except Exception as error:  # whatever else the hub's files do to `datasets` is no fault of ours
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{source}: the hub's files can't be loaded ({type(error).__name__}: {cause}); see {page}"
        ) from error
