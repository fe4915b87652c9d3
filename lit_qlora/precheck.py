"""Owns the first look at a command line of fit and its kin, before seconds go into importing PyTorch and Lightning.

It finds what can be found so: names, types, values out of range, files and folders that are nowhere, rows that begin as
no rows do, a run of other settings. The parser proper comes behind it, and finds the rest, such as a class that is not
there; each of these mistakes is one there too, in the same words.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_qlora.command import Command, check_same_run, complete, kept_options
from lit_qlora.data.faults import accepted_kinds
from lit_qlora.data.held_out import Parts, check_early_to_score
from lit_qlora.data.records import Reading
from lit_qlora.data.sources import check_sources
from lit_qlora.data.templates import check_template_of_base, is_of_base, read_template
from lit_qlora.devices import asked
from lit_qlora.devices.world import is_first, world
from lit_qlora.errors import UserError, recorded_in
from lit_qlora.forecast.cards import find_card
from lit_qlora.model.base import check_context, check_lora, find_base, split_names
from lit_qlora.model.lora_config import require_adapter
from lit_qlora.model.shape import known_config
from lit_qlora.options import LINKED, check_once, lacks, no_class, no_option, take_option
from lit_qlora.ranges import check_ranges, check_scored
from lit_qlora.signatures import (
    CLASSES,
    LEARNING,
    OBSERVING,
    OF_LIGHTNING,
    UNKNOWN,
    arguments_of,
    classes_for,
    defaults_of,
    is_of_lightning,
    options_of,
    parser_of,
)
from lit_qlora.storage import settings
from lit_qlora.storage.config_file import as_sections, flat
from lit_qlora.storage.files import page_path
from lit_qlora.storage.folders import verify_folder
from lit_qlora.storage.lock import RunLock
from lit_qlora.storage.mirror import check_no_file
from lit_qlora.storage.run import FOR_ONE_START, RunFolder, folder_to_score, unnamed_run


def check_first(command: Command) -> int:
    """Find what is wrong with a command line before anything heavy is imported; pass what can't be judged so.

    Args:
        command: of fit, or of a verb that takes its options.

    Returns:
        How many processes it asks for; 1 where it takes more to know.

    Raises:
        UserError: as the parser proper would.
    """
    verb, *args = command.args
    options = {one.name: one for one in options_of(verb)}
    check_once(args, {name: one.type for name, one in options.items()})
    sections = [section for section, *_ in CLASSES]
    for section in sections:
        texts = take_option(args, f"--{section}")[0]
        text = (texts[-1] or "") if texts else None
        if text is not None and not text.lstrip().startswith("{") and not Path(text).is_file():
            raise no_option(section, text, [*options])
    given = {arg.partition("=")[0].lstrip("-").rstrip("+") for arg in args if arg.startswith("-")}
    for name in given & {*LINKED}:
        raise UserError(f"can't be given, it is always {LINKED[name]}", option=name, remedy="set that one")
    if given & {*sections, "print_config", ""}:  # which the parser proper alone knows
        return 1
    values, config = _given(verb, args)
    kept = kept_options(command.kept) if command.kept else {}
    whole = defaults_of(verb) | kept | values
    if command.kept:
        _check_with_kept(verb, values, command.kept, flat(kept) | flat(values))
        _check_devices(verb, whole)
    else:
        _check_whole(verb, whole, config)
    return _number_of(whole["trainer.devices"])


def options_of_fit(args: Sequence[str]) -> dict[str, Any]:
    """All options of a fit by name, checked as far as they need no base, no device, no rows and no run.

    Args:
        args: its own, as on the command line; a config among them, or the default one, gives others.

    Raises:
        UserError: as the parser proper would.
    """
    values, _ = _given("fit", complete(["fit", *args]).args[1:])
    values = defaults_of("fit") | values
    _check_together(values)
    return values | {"model.target_modules": split_names(values["model.target_modules"])}


def _given(verb: str, args: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The options that ``args`` and their config files give, and the last of these files.

    Raises UserError for what is wrong with one whatever the others are.
    """
    plain, of_classes = _without_classes(args)
    parser = parser_of(options_of(verb))
    found = parser.parse_args(plain)
    names = {one.name.replace("-", "_"): one.name for one in options_of(verb)}
    values = {names[name]: value for name, value in found.items() if name in names}
    parser.check_values(values)
    _check_alone(values)
    for name in OF_LIGHTNING:
        _check_classes(name, values.get(name), of_classes.get(name, {}))
    configs = found.get("config")
    return values, str(configs[-1]) if configs else None


def _check_with_kept(verb: str, values: Mapping[str, Any], kept: RunFolder, both: Mapping[str, Any]) -> None:
    """Raises UserError for wrong ``values`` where other options are those of ``kept``; ``both`` are all of these."""
    check_scored(verb, both.get("trainer.limit_val_batches"))
    option = {"validate": "data.validation_source", "test": "data.test_source"}.get(verb)
    if option:
        if values.get(option):
            check_early_to_score(values[option], option, Reading.of(as_sections(both).get("data", {})))
        check_sources(as_sections(values).get("data", {}))
    if "model.base" in both and "model.base" not in values:
        with recorded_in(kept.path, "give --model.base if the base is elsewhere now"):
            find_base(both["model.base"], weights=False)
    if verb in LEARNING and both.get("model.adapter"):
        with recorded_in(kept.path, "give --model.adapter if the adapter is elsewhere now"):
            require_adapter(Path(both["model.adapter"]))
    if verb == "fit":
        _check_run(values, kept)
    is_done = verb == "fit" and (kept.finished_mark.exists() or values.get("mirror"))
    has_own = (both if verb == "test" else values).get(option) if option else None
    if not is_done and not (has_own and kept.rows.is_file()):  # the record says which rows were learned
        _check_kept_rows(verb, as_sections(both).get("data", {}), kept)


def _check_kept_rows(verb: str, data: Mapping[str, Any], kept: RunFolder) -> None:
    """Raises UserError for rows of the run ``kept`` that are not where they were, as after a move of either."""
    needed = ("source",) if verb == "test" else ("source", "validation_source")
    for name in needed:
        with recorded_in(kept.path, f"give --data.{name} if the rows are elsewhere now"):
            check_sources({name: data.get(name)})


def _check_whole(verb: str, values: Mapping[str, Any], config: str | None) -> None:
    """Raises UserError for ``values`` of all options that are wrong; ``config`` is the last config file."""
    _check_together(values)
    _check_base(verb, values)
    _check_devices(verb, values)
    named = values.get("run")  # as `complete` has it
    run = RunFolder(Path(named or unnamed_run(config, values["model.base"])))
    if verb == "fit" and named:
        _check_run(values, run)
    elif verb == "fit":
        run.check_place()
        run = run.first_meant(
            lambda one: not settings.refused(*_run_settings(values, one), one.rows.is_file)
        )  # as far as is known here
    is_done = verb == "fit" and (run.finished_mark.exists() or bool(values.get("mirror")))
    if not is_done:  # a run that is finished, here or there, needs no rows
        _check_rows(values, any_number=verb == "inspect")


def _check_together(values: Mapping[str, Any]) -> None:
    """Raises UserError for ``values`` of all options that are wrong on every machine and with every base."""
    check_ranges(values)
    check_ranges({name.removeprefix("samples."): value for name, value in values.items()}, "samples.")
    Reading(str(values["data.form"]), columns=values["data.columns"]).check()
    read_template(values["data.template"])


def _number_of(devices: int | str | list[int]) -> int:
    """How many processes a value of trainer.devices asks for; 1 where it takes torch to know, as for auto."""
    if isinstance(devices, list):
        devices = len({*devices})
    number = int(devices) if str(devices).strip().isdecimal() else 1
    return number if number <= asked.MOST_ON_CPU else 1


def _check_alone(values: Mapping[str, Any]) -> None:
    """Raises UserError for what is wrong whatever the other options are."""
    check_ranges(values)
    if values.get("gpu"):
        find_card(values["gpu"])
    if values.get("model.adapter"):
        require_adapter(Path(values["model.adapter"]))
    if values.get("mirror"):
        check_no_file(Path(values["mirror"]).expanduser())
    accepted_kinds(values.get("accept"))
    if values.get("html"):
        page_path(values["html"])
    scored = str(values.get("ckpt_path", "best"))
    if scored not in ("best", "last", "base"):
        folder_to_score(scored, lambda folder: folder.exists() or verify_folder(folder))


def _check_base(verb: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a base that is nowhere, or that options don't fit."""
    name = values["model.base"]
    base = find_base(name, weights=verb == "fit" and not known_config(name))
    check_template_of_base(values["data.template"], base.location)
    check_lora(base, values["model.rank"], split_names(values["model.target_modules"]))
    check_context(base, values["data.max_length"])


def _check_devices(verb: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for devices that can't be here, or of which a step or a base has too little to share.

    GPUs are counted as those that can be there at most: torch may see fewer, which is found later.
    """
    devices, num_nodes, here = values["trainer.devices"], values["trainer.num_nodes"], world()
    accelerator, number = values["trainer.accelerator"], _number_of(devices)
    is_here = verb not in ("plan", "inspect")
    has_none = is_here and not asked.has_driver()
    is_on_cpu = accelerator == "cpu" or has_none
    if has_none and accelerator in asked.GPUS:
        raise asked.no_gpu(accelerator)
    if is_here and isinstance(devices, int | list):
        if is_on_cpu:
            asked.check_on_cpu(devices, accelerator, max(asked.MOST_ON_CPU, here.local_size))
        elif num_gpus := asked.most_gpus():
            asked.check_there(devices, num_gpus)
        if (devices, num_nodes) != (1, 1):
            asked.check_world(number, num_nodes)
    num_processes = number * num_nodes if here.size == 1 else here.size
    if verb in LEARNING:
        asked.check_shares(num_processes, values["trainer.accumulate_grad_batches"])
    if devices == 1 or is_on_cpu:  # else as many as there are GPUs
        asked.check_shard(values["model.shard"], values["model.shard_to"], num_processes)
    if is_here and here.size == 1 and num_nodes > 1:
        asked.check_started(devices, number, num_nodes)


def _check_run(values: Mapping[str, Any], run: RunFolder) -> None:
    """Raises UserError for plain settings that would make it another run than ``run``, and for one that is in use."""
    run.check_place()
    if is_first():
        run.check_writable()
        RunLock(run.path).check()
    check_same_run(run, *_run_settings(values, run), run.rows.is_file)  # the rows are not read yet


def _run_settings(values: Mapping[str, Any], run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain settings of ``run``, and ``values`` of the same; none for one that has not begun."""
    if not run.has_begun() or not run.config.is_file():
        return {}, {}
    left_out = {*FOR_ONE_START, *(one.name for one in options_of("fit") if one.type is UNKNOWN)}
    now = {name: value for name, value in values.items() if name not in left_out}
    if "model.target_modules" in now:
        now["model.target_modules"] = split_names(now["model.target_modules"])
    if is_of_base(now.get("data.template")) or now.get("model.adapter"):
        now.pop("data.template", None)  # the base has it, or the adapter
    elif now.get("data.template"):
        now["data.template"] = read_template(now["data.template"])
    kept = run.read_options().items()
    was = {key: value for key, value in kept if any(f"{key}.".startswith(f"{one}.") for one in now)}
    return was, now


def _check_rows(values: Mapping[str, Any], any_number: bool) -> None:
    """Raises UserError for rows that are nowhere on this machine and can't be on the hub, or begin as no rows do."""
    check_sources(as_sections(values).get("data", {}))
    reading = Reading.of(as_sections(values)["data"])._replace(any_number=any_number)
    source, held_out, share = (values[f"data.{name}"] for name in ("source", "validation_source", "validation_share"))
    parts = Parts(source, held_out, share, values["seed_everything"], reading)
    parts.check_early()
    if values.get("row") is not None:
        parts.check_row(values["row"])


def _without_classes(args: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """A command line without the arguments of classes, and these: by the option of the class, and by name."""
    plain, of_classes, rest = list[str](), dict[str, dict[str, str]](), iter(args)
    for arg in rest:
        name, equals, value = arg.removeprefix("--").partition("=")
        option = next((one for one in OF_LIGHTNING if arg.startswith(f"--{one}.")), None)
        if option:
            its = name.removeprefix(f"{option}.").removeprefix("init_args.")
            of_classes.setdefault(option, {})[its] = value if equals else next(rest, "")
        else:
            plain.append(arg)
    return plain, of_classes


def _check_classes(option: str, given: Any, more: Mapping[str, str]) -> None:
    """Raises UserError for a class that is not there, and for arguments that one of Lightning's can't be made with.

    Imports none: a config file may be a stranger's. Passes what is nested deeper, and classes of the user's own.

    Args:
        option: option that takes classes.
        given: one or more, each a name, or a table with ``class_path`` and ``init_args``.
        more: what the command line gives to the last one.
    """
    classes = given if isinstance(given, list) else [given]
    for one in classes:
        table = one if isinstance(one, dict) else {"class_path": one if one not in ("true", "false") else None}
        path, arguments = table.get("class_path"), table.get("init_args") or {}
        if not isinstance(path, str) or "class_path" in more:
            continue
        name = path.rpartition(".")[2]
        if not is_of_lightning(option, path):
            top = path.partition(".")[0]
            if top and top not in sys.modules and not find_spec(top):
                raise no_class(path, option, (), f"No module named {top!r}")
        elif name not in classes_for(option):
            raise no_class(path, option, classes_for(option))
        elif option != "trainer.logger" and name not in OBSERVING:
            continue  # the parser proper refuses it, or a plugin of the kind
        elif isinstance(arguments, dict) and (len(classes) == 1 or not more):
            _check_arguments(option, name, {**arguments, **more})


def _check_arguments(option: str, name: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for ``values`` that Lightning's class ``name`` for ``option`` can't be made with."""
    known, needed, takes_more = arguments_of(option, name) or ([], [], True)
    if takes_more:
        return
    plain = {key: value for key, value in values.items() if isinstance(value, str | int | float | None)}
    try:
        parser_of(tuple(known)).parse_object({key: value for key, value in plain.items() if "." not in key})
    except UserError as error:
        raise error.replace(option=f"{option}.{error.option}" if error.option else option) from error
    missing = [one for one in needed if one not in {*values, "save_dir"}]  # a logger writes into the run's folder
    if missing:
        raise lacks(name, option, missing)
