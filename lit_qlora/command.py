"""Owns what a command line of fit and its kin means: its config files, the run that gives the other options, and
whether it may continue the run.

Asked before anything heavy is imported. Knows no option's meaning, and no model.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from lit_qlora.configs import check_config_file, check_config_of
from lit_qlora.console import complain
from lit_qlora.data.records import Reading
from lit_qlora.data.sources import check_sources, sources_of
from lit_qlora.data.templates import is_template
from lit_qlora.errors import UserError, excerpt, require
from lit_qlora.options import (
    CONFIG,
    SEE_HELP,
    configs_first,
    did_you_mean,
    known_as,
    option,
    take_option,
)
from lit_qlora.place import DEMO_CONFIG, find_config
from lit_qlora.signatures import LEARNING, OF_LIGHTNING, options_of, parser_of
from lit_qlora.storage import settings
from lit_qlora.storage.config_file import as_sections, as_yaml, flat, read_options
from lit_qlora.storage.run import RunFolder, lies_in_run, named_folder, open_run

ELSEWHERE = {"mirror": "null", "model.quantized_cache": "auto"}
"""Options that name a folder outside of the run that is written to and cleaned up, with the value for none."""

CONFIG_REMEDY = "put that line right, or take it out"
"""The remedy for a run's own config.yaml."""


class Command(NamedTuple):
    """A command line of fit or its kin.

    Args:
        args: the verb and all that follows.
        kept: the run whose own options apply where the command gives none; None without one.
        is_newest: True if the command names no run, so that ``kept`` is the newest.
        started_at: time of the start in seconds, by ``time.monotonic``.
    """

    args: list[str]
    kept: RunFolder | None = None
    is_newest: bool = False
    started_at: float = 0.0


def complete(args: list[str]) -> Command:
    """Add the default config to the command, and the folder of the run that it names.

    Checks the config files. Without a named run, that of a fit is found once its full configuration is known.

    Args:
        args: from the verb on, of those that take fit's options.

    Raises:
        UserError: for a config file with a mistake, and a run that is not there.
    """
    started_at = time.monotonic()  # before imports that take seconds
    verb, rest = args[0], args[1:]
    rest = configs_first(rest, find_config)
    config, name, kept = option(rest, *CONFIG), option(rest, "--run"), None
    run = named_folder(name)
    base = option(rest, "--model.base")
    if config is None:
        if verb not in LEARNING:
            kept = open_run(name)
            run = kept.path
        elif run and RunFolder(run).config.is_file():
            kept = RunFolder(run)
        if kept:
            check_config_of(kept)
            check_elsewhere(kept.read_options(), kept.config, args)
        elif base in (None, "demo"):  # a base of one's own is not for the demo's learning rate
            rest = [CONFIG[0], str(DEMO_CONFIG), *rest]
    for file in filter(None, take_option(rest, *CONFIG)[0]):
        check_config_file(Path(file))
        if name is None and kept is None:
            found = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")).get("run")
            run = run if found is None else named_folder(str(found))
    is_newest = kept is not None and name is None
    return Command([verb, *rest, *(["--run", str(run)] if run else [])], kept, is_newest, started_at)


def kept_options(run: RunFolder) -> dict[str, Any]:
    """The `plain_options` of ``run``'s own configuration."""
    return plain_options(run.read_options(), run.config)


def plain_options(options: Mapping[str, Any], place: Path, verb: str = "fit") -> dict[str, Any]:
    """The options of a file in a run's folder, which may come from anywhere, by name and of their own types.

    Those that could name code, and folders outside of the run, are left out.

    Args:
        options: as they stand in the file, by their dotted names.
        place: the file.
        verb: verb that the options are for.

    Raises:
        UserError: one is no option, or its value is of another type.
    """
    known = {one.name: one for one in options_of(verb) if one.name not in OF_LIGHTNING and one.type is not None}
    given = dict[str, Any]()
    try:
        for name in ("model", "data", "trainer"):
            require(name not in options, name, "options below it", options.get(name))
        for name, value in options.items():
            if known_as(name, OF_LIGHTNING) or _is_elsewhere(name, value):
                continue
            if known_as(name, known) is None or "+" in name:
                remedy = f"{did_you_mean(name, [*known]) or SEE_HELP}; {CONFIG_REMEDY}"
                raise UserError(f"unknown option {excerpt(name)}", remedy=remedy)
            given[name] = value
        parser = parser_of(tuple(known.values()))
        found = parser.parse_object(as_sections(given))
        parser.check_values(found)
        sources_of(found.get("data.source", "demo"))
        Reading(str(found.get("data.form", "auto"))).check()
    except UserError as error:
        raise error.replace(place=place) from error
    return {name: value for name, value in found.items() if name in known}


def with_kept(command: Command) -> list[str]:
    """The command line of ``command`` with its run's `plain_options` in front.

    A config file that lies in a run folder is read as a run's own: either may come from a stranger.

    Args:
        command: as `complete` returns it.

    Raises:
        UserError: for a file in a run folder that is damaged, or has other than plain values.
    """
    verb, *rest = command.args

    def read(file: str) -> str:
        path = Path(file)
        if not lies_in_run(path):
            return file
        try:
            return _as_plain(read_options(path), path, command.args)
        except ValueError as error:
            raise UserError(f"damaged ({error})", place=path, remedy="put a copy of it back") from error

    rest = configs_first(rest, read)
    if command.kept:
        kept = command.kept.read_options()
        rest = [*(["--config", _as_plain(kept, command.kept.config, command.args)] if kept else []), *rest]
    return [verb, *rest]


def check_same_run(
    run: RunFolder, was: Mapping[str, Any], now: Mapping[str, Any], are_same_rows: Callable[[], bool]
) -> None:
    """Check that a start's settings are those of a run, but for what may change.

    Args:
        run: the run.
        was: its settings, in sections or by dotted names.
        now: those of the start, in sections or by dotted names.
        are_same_rows: as in `settings.refused`.

    Raises:
        UserError: others would make it another run; before that, for sources that are missing.
    """
    if others := settings.refused(was, now, are_same_rows):
        check_sources(as_sections(flat(now)).get("data", {}))
        raise another_run(run, others)


def another_run(run: RunFolder, changes: list[settings.ChangedSetting]) -> UserError:
    """The error for ``changes`` of settings that would make it another run than ``run``."""
    problem = f"{run.path} was started with other settings: {'; '.join(map(str, changes))}"
    return UserError(problem, option="run", remedy="give --run NAME to start another run")


def check_elsewhere(options: Mapping[str, Any], place: Path, args: list[str]) -> None:
    """Check that no folder outside of a run is taken from the run's own file, to write to: it may be a stranger's.

    Args:
        options: of that file, by their dotted names.
        place: the file.
        args: the command line, from the verb on. Only a fit writes to such folders; other verbs go without.

    Raises:
        UserError: a fit does not give one itself.
    """
    for name, none in ELSEWHERE.items():
        value = options.get(name)
        if args[0] == "fit" and _is_elsewhere(name, value) and option(args, f"--{name}") is None:
            raise UserError(
                f"is {excerpt(value)} in {place}, and no folder to write to is taken from a run's",
                option=name,
                remedy=f"give --{name} {quote(str(value))} once more, or --{name} {none}",
            )


def _is_elsewhere(name: str, value: object) -> bool:
    return name in ELSEWHERE and value not in (None, "auto", "none")


def _as_plain(options: Mapping[str, Any], place: Path, args: list[str]) -> str:
    """The `plain_options` of ``options``, from a file in a run folder, as YAML text.

    Options that could name code are left out, with a warning unless the command line ``args`` gives them itself.
    """
    check_elsewhere(options, place, args)
    kept, left_out = plain_options(options, place, args[0]), list[str]()
    template = kept.get("data.template")
    if template is not None and not is_template(template):
        problem = f"expected the text of a template, got {excerpt(template)}"
        raise UserError(problem, option="data.template", place=place, remedy=CONFIG_REMEDY)
    for name, value in options.items():
        of_class = known_as(name, OF_LIGHTNING)
        if of_class == name and (value is None or isinstance(value, bool)):
            kept[name] = value
        elif of_class and of_class not in left_out and not any(arg.startswith(f"--{of_class}") for arg in args):
            left_out.append(of_class)
    if left_out:
        complain(
            f"warning: {', '.join(left_out)} of {place} left out: it can name code, and none is taken from a run "
            "folder; give it on the command line to have it"
        )
    return as_yaml(as_sections(kept))
