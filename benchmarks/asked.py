"""Owns what the benchmarks' own options may be: refused in one line, status 2, before anything is measured."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path


def whole(text: str) -> int:
    """A whole number from 1. For ``type=`` of argparse, as the next."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


def above_0(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def existing(text: str) -> Path:
    """A folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and {text} is none")
    return Path(text)


def new(text: str) -> Path:
    """A folder that is not there yet."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} exists already; give another, or remove it")
    return Path(text)


def refuse_unused(
    parser: argparse.ArgumentParser, options: argparse.Namespace, given: str, names: Sequence[str]
) -> None:
    """Refuses options, by their ``names``, that ``given`` leaves without a use."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no use with {given}: leave one of them out")


def hide_gpus() -> None:
    """Hides them from this process, if torch has not looked yet, and from those that it starts."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def require_gpus(parser: argparse.ArgumentParser, count: int, otherwise: str) -> None:
    """Refuses to begin with fewer than ``count`` CUDA GPUs; ``otherwise`` says what to do."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        parser.error(f"expected {count} CUDA GPU{'s' * (count > 1)}, and there are {found} here; {otherwise}")
