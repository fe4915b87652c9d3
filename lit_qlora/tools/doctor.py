"""Owns the verb doctor: findings, choices and remedies, in a form that can be pasted into an issue.

Parses its options without jsonargparse, which may be what is missing. The findings are in `surroundings`.
"""

import argparse
import os
import platform
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_qlora import __version__
from lit_qlora.console import fitted
from lit_qlora.devices.launchers import check_whole, ignore_launchers
from lit_qlora.errors import UserError, meant
from lit_qlora.forecast.host import run_folder_bytes
from lit_qlora.place import CLONE, COMMAND, DEMO_CONFIG, INSTALL, PROGRAM, find_config
from lit_qlora.quiet import quieten
from lit_qlora.storage.files import size
from lit_qlora.tools.doctoring import surroundings
from lit_qlora.tools.doctoring.surroundings import Finding

NOTEBOOKS = {"COLAB_RELEASE_TAG": "Colab", "KAGGLE_KERNEL_RUN_TYPE": "Kaggle"}
"""Services that run notebooks, by a variable of their environment."""
DESCRIPTION = """Report what is wrong here, what to do about it, and what a fit would choose.

Without options, it checks for the demo. The output contains no token and no folder name, so it can be pasted into an
issue. Status 0 if nothing would stop a fit (a note does not), else 2. Changes nothing.
"""
DEFAULTS: dict[str, Any] = {
    "model.rank": 16, "model.target_modules": "all-linear", "model.optimizer": "adamw", "keep_checkpoints": 2,
}  # fmt: skip
"""The options of fit, where they can't be read for want of a package."""
LISTED = "the accepted options are listed by --help"


def parser() -> argparse.ArgumentParser:
    """The parser of doctor's options."""
    made = argparse.ArgumentParser(
        f"{PROGRAM} doctor", description=DESCRIPTION, allow_abbrev=False, exit_on_error=False
    )
    made.add_argument("--config", metavar="FILE", help="config of the fit to check; default: the demo's")
    made.add_argument("--base", metavar="ID|DIR", help="base of that fit; default: the config's, or the demo's")
    made.add_argument("--run", metavar="DIR", help="folder that its run is written to; default: runs")
    return made


def main(args: list[str]) -> int:
    """Print the findings.

    Args:
        args: the options, as on the command line.

    Returns:
        The exit status: 2 if something would stop a fit.

    Raises:
        UserError: for a wrong option.
    """
    try:
        options, unknown = parser().parse_known_args(["--help" if arg == "--help=all" else arg for arg in args])
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except argparse.ArgumentError as error:
        raise UserError(error.message, option=(error.argument_name or "").lstrip("-"), remedy=LISTED) from error
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown option {name!r}", remedy=meant(name, vars(options)) or LISTED)
    options.config = find_config(options.config) if options.config else None
    if options.config and not Path(options.config).is_file():
        raise UserError(
            f"no file {options.config}", option="config", remedy="give that of a fit, such as configs/colab_t4.yaml"
        )
    is_bare = options.run is not None and not {"/", os.sep} & {*options.run}
    run = Path("runs", options.run or "") if is_bare or not options.run else Path(options.run).expanduser()
    counts = Counter[str]()
    for kind, text, remedy in examine(options.config, options.base, run):
        counts[kind] += 1
        for mark, words in ((kind, text), ("->", remedy)):
            if words:  # at once: importing takes some seconds
                print(fitted(without_private_parts(f"{mark:>7}  {words}")), flush=True)
    found = f"problems: {counts['problem']}, notes: {counts['note']}"
    print()
    print(fitted(f"{found}; all of it may be pasted into an issue, it names no token or folder"))
    return 2 if counts["problem"] else 0


def examine(config: str | None, base: str | None, run: Path) -> Iterator[Finding]:
    """Inspect this machine, and what a fit would do on it.

    Args:
        config: config file of that fit; None for the demo's.
        base: its base; None for that of the config.
        run: its run folder.

    Yields:
        Findings, as they are made; no failure here ends it.
    """
    quieten()
    notebook = next((f", {name}" for mark, name in NOTEBOOKS.items() if mark in os.environ), "")
    yield Finding("ok", f"lit-qlora {__version__}{_commit()}, {platform.platform()}{notebook}")
    python = f"Python {platform.python_version()}"
    if sys.version_info < (3, 11):  # noqa: UP036  # reported before anything that needs it is imported
        yield Finding("problem", f"{python}: 3.11 or newer is expected", "take another Python")
    else:
        yield Finding("ok", python)
    try:
        check_whole()
        for one in ignore_launchers():
            yield Finding("note", one)
    except UserError as error:
        yield Finding("problem", error.problem, error.remedy or "")
    yield from _guarded("packages", surroundings.packages())
    quieten()  # lightning sets levels of its own
    for part in (surroundings.torchao, surroundings.gpu, surroundings.four_bit, surroundings.host_memory):
        yield from _guarded(part.__name__, part())
    yield from _guarded("token", surroundings.token())
    yield from _guarded("base", _base_and_choices(config, base, run))


def _guarded(what: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except Exception as error:
        yield Finding("problem", f"{what}: can't be inspected ({surroundings.reason(error)})")


def _commit() -> str:
    """The clone's commit, in brackets; empty if it can't be found."""
    try:
        command = ["git", "-C", str(CLONE), "rev-parse", "--short", "HEAD"]
        return f" ({subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()})"
    except Exception:
        return ""


# The base, and what a fit would do with it


def _base_and_choices(config: str | None, asked: str | None, run: Path) -> Iterator[Finding]:
    fit = [*(["--config", config] if config else []), *(["--model.base", asked] if asked else [])]
    options: Any = None
    try:
        from lit_qlora.precheck import options_of_fit

        options = options_of_fit(fit)
        name = options["model.base"]
    except UserError as error:
        yield Finding("problem", f"fit: {error}")
        return
    except Exception:  # reported with its package already
        text = Path(config or DEMO_CONFIG).read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^  base: (\S+)", text, re.MULTILINE)
        name = asked or (named[1] if named else "demo")
    base: Any = None
    try:
        from lit_qlora.model.base import find_base

        base = find_base(name)
        yield Finding("ok", f"base: {base.public_name} may be read, {size(2 * base.shape.num_parameters)} in 16 bits")
    except UserError as error:
        is_offline = type(error.__cause__).__name__ == "LocalEntryNotFoundError"
        offline = " (offline: whether it is gated is unknown)" if is_offline else ""
        yield Finding("problem", f"base: {error.problem}{offline}", error.remedy or "")
    except ImportError as error:  # the hub's library comes with transformers and datasets
        yield Finding("problem", f"base: {name} can't be searched for ({surroundings.reason(error)})", INSTALL)
    base = base or _known(name)
    given = options or DEFAULTS
    num_lora = base.shape.num_lora(given["model.rank"], given["model.target_modules"]) if base else 0
    download, states = 0, 2
    try:
        from lit_qlora.model.base import missing_bytes

        download = missing_bytes(base) if base else 0
        from lit_qlora.model.optimizer import OPTIMIZERS

        states = OPTIMIZERS[given["model.optimizer"]].states
    except ImportError:  # reported with its package already
        pass
    needed = run_folder_bytes(num_lora, given["keep_checkpoints"], states)
    yield from surroundings.disk("the run folder", run, needed, "give --run on another disk")
    yield from surroundings.disk("the hub's cache", surroundings.hub_cache(), download, "set HF_HOME to another disk")
    if base and options:
        try:
            yield from _choices(base, options, fit)
        except UserError as error:
            yield Finding("problem", f"fit: {error}")
        except Exception as error:
            yield Finding("note", f"chosen: unknown ({surroundings.reason(error)})")
    elif base:
        yield Finding("note", "chosen: unknown until the packages are in order", INSTALL)


def _known(name: str) -> Any:
    """A base whose sizes are known without the hub; None for any other."""
    from lit_qlora.model.base import Base
    from lit_qlora.model.shape import known_config

    config = known_config(name)
    return Base(name, name, config) if config else None


def _choices(base: Any, options: Any, fit: list[str]) -> Iterator[Finding]:
    """The choices of that fit on this device, and why."""
    from lit_qlora.data.templates import check_template_of_base
    from lit_qlora.model.checkpointing import choose_checkpointing
    from lit_qlora.model.decoder import why_not_by_settings
    from lit_qlora.model.device import (
        check_attention,
        check_compile,
        choose_precision,
        compiles_kernels,
        current_device,
    )
    from lit_qlora.model.lora import has_bias
    from lit_qlora.model.optimizer import OPTIMIZERS

    check_template_of_base(options["data.template"], base.location)
    device = current_device(options["trainer.accelerator"])
    rank, optimizer = options["model.rank"], options["model.optimizer"]
    precision, why = choose_precision(options["trainer.precision"], device, base.shape.num_parameters)
    yield Finding("ok", f"chosen: precision {precision} ({why})")
    check_attention(options["model.attention"], device)
    no_flash = ""
    try:
        check_attention("flash_attention_2", device)
    except UserError as error:
        no_flash = f" ({error.problem})"
    yield Finding("ok", f"chosen: attention {options['model.attention']}{no_flash}")
    state = OPTIMIZERS[optimizer].state_bytes * base.shape.num_lora(rank, options["model.target_modules"])
    yield Finding("ok", f"chosen: optimizer {optimizer} (its state is {size(state)} at rank {rank})")
    wanted, on_gpu = options["model.compile"], device.is_gpu
    lacks = check_compile(wanted, device)
    why = f"{lacks} missing" if lacks else "as asked" if wanted != "auto" else "a GPU" if on_gpu else "no GPU"
    compiled = f"compile {str(compiles_kernels(wanted, on_gpu, lacks)).lower()} ({why})"
    if not on_gpu:
        adapter = options["model.adapter"]
        slow = why_not_by_settings(
            base.config,
            options["model.own_layers"],
            options["model.dora"],
            has_bias(Path(adapter) if adapter else None),
        )
        chosen = choose_checkpointing(options["model.checkpointing"], on_gpu, not slow)
        yield Finding("ok", f"chosen: checkpointing {chosen}, {compiled}")
        return
    yield Finding("ok", f"chosen: {compiled}")
    from lit_qlora.command import complete
    from lit_qlora.forecast.words import kept_words
    from lit_qlora.tools import plan
    from lit_qlora.tools.planning.words import verdict

    forecast = plan.PlanCLI.of(complete(["plan", *fit])).found.forecast
    found = verdict(forecast)
    kept = f"checkpointing {options['model.checkpointing']} ({kept_words(forecast.step)}: a forecast)"
    yield Finding("ok", f"chosen: {kept}")
    if found.fits:
        yield Finding("ok", found.words)
    else:
        yield Finding("note", found.words, f"{' '.join([f'{COMMAND} plan', *fit])} shows more")


# Redaction

PATH = re.compile(r"(?<![\w:/.\\])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"():,;]+)+")


def without_private_parts(text: str) -> str:
    """``text`` without tokens, addresses, this machine's name, and all but the last part of each path."""
    for name in surroundings.TOKEN_VARIABLES:
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "(token)")
    text = re.sub(r"hf_\w{6,}", "(token)", text)
    text = re.sub(r"\w+://\S+", "(address)", text)
    text = re.sub(r"host='[^']*'", "host=(host)", text)
    host = socket.gethostname()
    if len(host) > 2:
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "(host)", text)
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], text)
