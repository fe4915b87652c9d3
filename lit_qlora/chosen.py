"""Owns which adapter the options of a verb name, with its base and the run that trained it. Loads no model."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_qlora.command import kept_options
from lit_qlora.console import say_imports
from lit_qlora.errors import UserError, recorded_in, require
from lit_qlora.model.base import Base, find_base
from lit_qlora.model.lora_config import require_adapter
from lit_qlora.quiet import quieten
from lit_qlora.signatures import defaults_of
from lit_qlora.storage.adapter import require_trained
from lit_qlora.storage.config_file import as_sections
from lit_qlora.storage.run import RunFolder, open_run

if TYPE_CHECKING:
    from lit_qlora.data.encode import Encoder


class ResolvedAdapter(NamedTuple):
    """An adapter, with what it takes to use it.

    Args:
        base: its base.
        adapter: its folder.
        run: the run that trained it; None for an adapter folder of its own.
        options: those that it was trained with, by section; fit's defaults without a run.
    """

    base: Base
    adapter: Path
    run: RunFolder | None
    options: dict[str, Any]

    def encoder(self, max_length: int | None = None) -> "Encoder":
        """The encoder of training, for conversations of at most ``max_length`` tokens; default: the base's context.

        Raises:
            UserError: for an altered prompt format, and a tokenizer that is not the base's.
        """
        from lit_qlora.data.encode import Encoder
        from lit_qlora.data.tokenizer import load_tokenizer
        from lit_qlora.model.lora import read_format

        prompt_format = read_format(self.adapter)
        length = max_length or self.base.context_tokens
        encoder = Encoder(load_tokenizer(self.base.location), length, prompt_format=prompt_format)
        encoder.check_vocabulary(self.base.shape.vocabulary, self.base.name)
        return encoder


def choose_adapter(run: str | None = None, adapter: str | None = None, base: str | None = None) -> ResolvedAdapter:
    """The adapter and the base that the options of a verb name.

    Args:
        run: a run folder, for its best adapter; default: the newest run.
        adapter: an adapter folder instead.
        base: the base; default: the one that run or folder names.

    Raises:
        UserError: if there is no such run, adapter or base, or both run and adapter are given.
    """
    quieten()  # an adapter's patterns are peft's to match, which imports bitsandbytes
    if adapter is None:
        folder = trained_run(run)
        options = _options(folder)
        its_base = _find(base or options["model"]["base"], None if base else folder.path)
        _say_imports()
        return ResolvedAdapter(its_base, folder.adapter, folder, options)
    if run:
        raise UserError(f"{adapter} is given, and a run ({run}) too", option="adapter", remedy="give one of the two")
    require_adapter(Path(adapter))
    _say_imports()
    from lit_qlora.model.lora import read_format, read_record

    # Its own record has a base's name alone, and a run the folder of a local one.
    holder = RunFolder(Path(adapter).absolute().parent)
    is_of_run = holder.adapter.name == Path(adapter).name and holder.config.is_file() and holder.has_begun()
    named = base or (_options(holder)["model"]["base"] if is_of_run else read_record(Path(adapter))["base"])
    if named is None:
        raise UserError(f"{adapter} does not name its base", option="adapter", remedy="give --base")
    its_base = _find(named, None if base else holder.path if is_of_run else Path(adapter))
    chosen = ResolvedAdapter(its_base, Path(adapter), None, _options(None))
    prompts = read_format(chosen.adapter)
    if prompts.is_assumed:  # on standard error, since an answer may be piped
        print(f"({adapter} does not record its prompt format: {prompts.assumption})", file=sys.stderr)
    return chosen


def _say_imports() -> None:
    """Say on a terminal what takes the first seconds; elsewhere an answer or an error is the only line."""
    if sys.stderr.isatty():
        say_imports(sys.stderr)


def _options(run: RunFolder | None) -> dict[str, Any]:
    """All plain options of fit as ``run`` was trained with them, by section; the defaults without one.

    Raises UserError as `kept_options`, and where no base is named.
    """
    kept = kept_options(run) if run else {}
    if run:
        require("model.base" in kept, "model.base", "a text", None, place=run.config)
    return as_sections(defaults_of("fit") | kept)


def trained_run(run: str | None) -> RunFolder:
    """Open a run that has an adapter.

    Args:
        run: a run folder or its name; None for the newest run.

    Returns:
        The run, whose adapter is there.

    Raises:
        UserError: if there is no such run, or no adapter in it.
    """
    folder = open_run(run)
    require_trained(folder, "run", "adapter", "train it first, or give --adapter")
    return folder


def _find(base: str, place: Path | None) -> Base:
    """The base of that name, which the option gives, or what lies at ``place``. Raises UserError as `find_base`."""
    with recorded_in(place, "give --base if the base is elsewhere now") if place else nullcontext():
        try:
            return find_base(base)
        except UserError as error:  # which calls it by its name in a config
            raise error.replace(option="base") from error
