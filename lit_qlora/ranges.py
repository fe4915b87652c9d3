"""Owns which values an option may have beyond its type: ranges, and options that don't go together.

The one table of such rules: `checked_arguments` holds a constructor's arguments to it, `precheck` a command line before
anything heavy is imported, `training` the whole configuration. Knows plain values alone: what depends on a base, a
device or files is checked where these are known.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from lit_qlora.errors import require


def max_time_s(text: str) -> float:
    """Parse a duration in the form that Lightning's own option has.

    Args:
        text: ``DD:HH:MM:SS``.

    Returns:
        Seconds; 0 for any other text.
    """
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", text)
    days, hours, minutes, seconds = map(int, found.groups()) if found else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _is_limit(value: int | float) -> bool:
    return 0 < value <= 1 if isinstance(value, float) else value >= 1


def _are_devices(value: int | str | list[int]) -> bool:
    if isinstance(value, list):
        return len(value) == len({*value}) > 0 and min(value) >= 0
    if isinstance(value, str):
        return value == "auto" or (value.strip().isdecimal() and int(value) >= 1)
    return value >= 1


def _is_named(value: str) -> bool:
    return bool(value.strip()) and len(value.splitlines()) == 1


def _is_folder(value: str) -> bool:
    return _is_named(value) and "://" not in value


BELOW_ONE = "a share from 0 to below 1", lambda value: 0 <= value < 1
LIMIT_WORDS = "a whole number of micro-batches, or a share up to 1.0"

RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a whole number from 1", lambda value: value >= 1,
        "model.rank model.loss_rows trainer.log_every_n_steps trainer.accumulate_grad_batches trainer.num_nodes "
        "save_every_steps max_nonfinite_losses",
    ),
    ("a whole number from 1", lambda value: value >= 1 or value == -1, "trainer.max_epochs"),
    ("a whole number from 1, or -1", lambda value: value >= 1 or value == -1, "trainer.max_steps"),
    ("a whole number from 2", lambda value: value >= 2, "keep_checkpoints"),
    ("none, or a whole number from 1", lambda value: value >= 1, "early_stopping"),
    ("a whole number from 0 to 4,294,967,295", lambda value: 0 <= value < 2**32, "seed_everything"),
    ("a whole number from 0, below 2**64", lambda value: 0 <= value < 2**64, "seed"),
    ("at least 1", lambda value: value >= 1, "max_new_tokens batch_size"),
    ("at least 1 token", lambda value: value >= 1, "batch_tokens"),
    ("at least 100", lambda value: value >= 100, "draws"),
    ("at least 1 row", lambda value: value >= 1, "data.batch_size"),
    ("at least 8 tokens", lambda value: value >= 8, "data.max_length max_length"),
    ("1 to 65535", lambda value: 0 < value < 2**16, "port"),
    ("a number above 0", lambda value: 0 < value < float("inf"), "model.alpha trainer.val_check_interval"),
    ("a number above 0, at most 1", lambda value: 0 < value <= 1, "model.learning_rate"),
    ("a number of GiB above 0", lambda value: 0 < value < float("inf"), "gpu-gib"),
    ("none, or a number above 0", lambda value: value > 0, "trainer.gradient_clip_val save_every_minutes"),
    ("a number from 1e-9 to 1e9; 1 is none", lambda value: 1e-9 <= value <= 1e9, "repetition_penalty"),
    ("0, or a number from 1e-9", lambda value: value == 0 or 1e-9 <= value < float("inf"), "temperature"),
    ("0 or more", lambda value: 0 <= value < float("inf"), "model.weight_decay samples.count rows"),
    ("0 or more processes", lambda value: value >= 0, "data.num_workers"),
    ("a number of tokens, or 0 for all", lambda value: value >= 0, "top_k"),
    (*BELOW_ONE, "model.dropout model.warmup_ratio data.validation_share"),
    ("a share above 0, at most 1", lambda value: 0 < value <= 1, "top_p"),
    ("a share from 0 to 1", lambda value: 0 <= value <= 1, "min_p"),
    (
        "a whole number of micro-batches, or a share of an epoch up to 1.0",
        lambda value: isinstance(value, int) or value <= 1, "trainer.val_check_interval",
    ),
    (LIMIT_WORDS, _is_limit, "trainer.limit_train_batches trainer.limit_test_batches"),
    (LIMIT_WORDS, lambda value: value == 0 or _is_limit(value), "trainer.limit_val_batches"),
    ("a number from 1, auto, or a list of GPUs' numbers", _are_devices, "trainer.devices"),
    ("a row's number, or FILE:NUMBER", lambda value: bool(re.search(r"(^|[: ])\d+$", value)), "row"),
    (
        "two numbers as in 8.6, from 6.0 on, where bitsandbytes begins",
        lambda value: bool(re.fullmatch(r"\d+\.\d", value)) and float(value) >= 6, "gpu-capability",
    ),
    ("DD:HH:MM:SS, such as 00:03:30:00", lambda value: max_time_s(value) > 0, "max_time"),
    ("a folder, named in one line", _is_named, "run model.adapter"),
    ("a folder, named in one line (no URL: mount what is elsewhere)", _is_folder, "mirror"),
    ("auto, none, or a folder", _is_folder, "model.quantized_cache"),
    ("a hub id or a folder", lambda value: bool(value.strip()), "data.tokenizer"),
    ("a text, or none", lambda value: bool(value.strip()), "data.opening"),
    ("no empty ones", lambda value: all(text.strip() for text in value), "samples.prompts"),
    ("texts of at least one character", lambda value: all(text and isinstance(text, str) for text in value), "stop"),
)  # fmt: skip
"""Rules on single options: what is expected, the check of a value, and the options' names; none is always allowed."""

TOGETHER: tuple[tuple[str, Callable[..., bool], str], ...] = (
    (
        "a whole number from 1, or one for trainer.max_steps",
        lambda epochs, steps: max(epochs, steps) >= 1, "trainer.max_epochs trainer.max_steps",
    ),
    (
        "none where trainer.limit_val_batches is 0",
        lambda patience, limit: patience is None or limit != 0, "early_stopping trainer.limit_val_batches",
    ),
    (
        "none, or at least data.max_length ({1})",
        lambda tokens, longest: tokens is None or tokens >= longest, "data.batch_tokens data.max_length",
    ),
    (
        "data.batch_tokens beside it, say 2048",
        lambda packing, tokens: not packing or tokens is not None, "data.packing data.batch_tokens",
    ),
    (
        "all, for plain text is learned whole",
        lambda learned, form: form != "text" or learned == "all", "data.train_on data.form",
    ),
    (
        "auto or false with dropout or dora, or without own_layers",
        lambda graphs, own, dropout, dora: graphs is not True or (own and not (dropout or dora)),
        "model.cuda_graphs model.own_layers model.dropout model.dora",
    ),
    (
        "auto or false with dora or cuda_graphs true, or without own_layers",
        lambda shard, own, dora, graphs: shard is not True or (own and not dora and graphs is not True),
        "model.shard model.own_layers model.dora model.cuda_graphs",
    ),
    (
        "auto or false with data.packing",
        lambda graphs, packing: graphs is not True or not packing, "model.cuda_graphs data.packing",
    ),
    *((
        "it left out at temperature 0, which takes the likeliest token",
        lambda value, temperature, default=default: bool(temperature) or value == default, f"{name} temperature",
    ) for name, default in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))),
)  # fmt: skip
"""Rules on several options: what is expected of the first, the check on the values of all, and the options."""


def check_scored(verb: str, limit: Any) -> None:
    """Check that validate has something to score.

    Args:
        verb: the subcommand; others than validate may score nothing.
        limit: of trainer.limit_val_batches, as given.

    Raises:
        UserError: no micro-batch is left.
    """
    holds = verb != "validate" or limit != 0
    require(holds, "trainer.limit_val_batches", "micro-batches to score, 1.0 for all", limit)


def check_ranges(values: Mapping[str, Any], section: str = "") -> None:
    """Raises UserError for the first of ``values`` that breaks a rule; rules on options not among them don't count.

    Args:
        values: Values of the right type, by the option's dotted name.
        section: What stands before a name in the error.
    """
    for expected, holds, names in RANGES:
        for name in names.split():
            if values.get(name) is not None:
                require(holds(values[name]), section + name, expected, values[name])
    for expected, holds, names in TOGETHER:
        option, *others = names.split()
        if values.keys() >= {option, *others}:
            got = [values[name] for name in (option, *others)]
            require(holds(*got), section + option, expected.format(*got), got[0])
