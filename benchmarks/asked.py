"""Owns what the benchmarks' own options may be: refused in one line, status 2, before anything is measured."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path


def whole(text: str) -> int:
    """Return the whole number from 1 that ``text`` writes; for ``type=`` of argparse, as the next three.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


def above_0(text: str) -> float:
    """Return the finite number above 0 that ``text`` writes.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def existing(text: str) -> Path:
    """Return the path ``text`` of a folder that exists.

    Raises:
        argparse.ArgumentTypeError: There is no such folder.
    """
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and {text} is none")
    return Path(text)


def new(text: str) -> Path:
    """Return the path ``text``, at which there is nothing yet.

    Raises:
        argparse.ArgumentTypeError: A file or folder is there.
    """
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} exists already; give another, or remove it")
    return Path(text)


def refuse_unused(
    parser: argparse.ArgumentParser, options: argparse.Namespace, given: str, names: Sequence[str]
) -> None:
    """Refuse options that another one leaves without a use: ends with exit status 2 if one is not at its default.

    Args:
        parser: Parser of the options, which prints the error.
        options: Parsed options.
        given: The option that makes the others useless, as the error message names it.
        names: Names of the useless ones, as attributes of ``options``.
    """
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no use with {given}: leave one of them out")


def hide_gpus() -> None:
    """Hide GPUs from this process, if torch has not looked yet, and from those that it starts."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def require_gpus(parser: argparse.ArgumentParser, count: int, otherwise: str) -> None:
    """Refuse to begin with too few CUDA GPUs: ends with exit status 2.

    Args:
        parser: Parser of the options, which prints the error.
        count: Number of GPUs needed.
        otherwise: What to do instead, in the words of the error message.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        parser.error(f"expected {count} CUDA GPU{'s' * (count > 1)}, and there are {found} here; {otherwise}")
